"""`examples/pod.py` on eight devices of one process; several, and faults, are in `test_pod.py`."""

import contextlib

import jax
import numpy as np
import pod

from jlora import checkpoint


def test_one_process(tmp_path, monkeypatch, capsys):
    """Trains, saves and merges."""
    monkeypatch.setattr(pod, "connect", lambda args: None)  # too late in this process
    monkeypatch.setattr(pod, "end_process_on_error", contextlib.nullcontext)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 128, (96, 17), np.int32))
    paths = f"--out {tmp_path / 'out'} --data {tmp_path / 'ids.npy'}"
    sizes = "--batch 8 --length 16 --save-every 4 --log-every 1 --steps"
    with jax.enable_x64(False):
        pod.main(f"train {paths} {sizes} 5".split())
    printed = capsys.readouterr().out
    assert [f"step {n}: loss" in printed for n in range(7)] == [False, *[True] * 5, False]
    assert sorted(x.name for x in (tmp_path / "out" / "checkpoints").iterdir()) == ["4", "5"]
    assert checkpoint.read(tmp_path / "out" / "checkpoints" / "5").step == 5
    assert (tmp_path / "out" / "merged" / "5").is_dir()
