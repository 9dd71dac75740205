"""`examples/pod.py` on eight devices of one process; several, and faults, are in `test_pod.py`."""

import contextlib
import dataclasses

import jax
import numpy as np
import pod
from models import gpt

from jlora import checkpoint


def test_one_process(tmp_path, monkeypatch, capsys):
    """Trains, saves and merges."""
    monkeypatch.setattr(pod, "connect", lambda args: None)  # too late in this process
    monkeypatch.setattr(pod, "end_process_on_error", contextlib.nullcontext)
    model = gpt.GPT(dataclasses.replace(pod.SMALL, layers=1))
    monkeypatch.setitem(pod.SHAPES, "small", pod.Shape(model, 64))
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 128, (96, 17), np.int32))
    paths = f"--out {tmp_path / 'out'} --data {tmp_path / 'ids.npy'}"
    sizes = "--batch 8 --length 16 --save-every 2 --log-every 1 --steps"
    with jax.enable_x64(False):
        pod.main(f"train {paths} {sizes} 3".split())
    assert capsys.readouterr().out.count(": loss ") == 3
    assert sorted(x.name for x in (tmp_path / "out" / "checkpoints").iterdir()) == ["2", "3"]
    assert checkpoint.read(tmp_path / "out" / "checkpoints" / "3").step == 3
    assert (tmp_path / "out" / "merged" / "3").is_dir()
