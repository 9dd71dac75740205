"""Folders appear whole or not at all, and what a killed process leaves is cleaned up."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from jlora import _folders, peft
from jlora._folders import fresh

Folder = pathlib.Path


def test_a_folder_appears_whole(tmp_path: Folder) -> None:
    with fresh(tmp_path / "deep" / "m", "OUT") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "m").exists()
    assert [p.name for p in tmp_path.rglob("*")] == ["deep", "m", "file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_of_what_failed(error: BaseException, tmp_path: Folder) -> None:
    with pytest.raises(type(error)), fresh(tmp_path / "m", "OUT") as folder:
        (folder / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_where_another_was_first(tmp_path: Folder) -> None:
    message = r"OUT: .*m exists and is not an empty folder; nothing is ever overwritten\. Give"
    with pytest.raises(FileExistsError, match=message), fresh(tmp_path / "m", "OUT"):
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "theirs").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["m", "theirs"]


@pytest.mark.parametrize("kind", ["file", "link", "full"])
def test_what_is_there_stays(kind: str, tmp_path: Folder) -> None:
    (tmp_path / "x").mkdir()
    if kind == "file":
        (tmp_path / "m").write_text("theirs")
    elif kind == "link":
        (tmp_path / "m").symlink_to(tmp_path / "x")
    else:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "theirs").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(FileExistsError, match=r"OUT: .*m exists and is not"),
        fresh(tmp_path / "m", "OUT"),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_living_make_stays(tmp_path: Folder) -> None:
    """Only of this machine's processes, of those that are gone, and for this very folder."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        "dead": _folders.token().replace(f"-{os.getpid()}-", f"-{gone.pid}-"),
        "ours": _folders.token(),
        "elsewhere": f"00000000-{gone.pid}-{'0' * 16}",
        "odd": "by-hand",
    }
    for name in names.values():
        (tmp_path / f".m.{name}").mkdir()
        (tmp_path / f".other.{name}").mkdir()
    with fresh(tmp_path / "m", "OUT"):
        pass
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"m"} | {f".other.{n}" for n in names.values()} | {
        f".m.{n}" for what, n in names.items() if what != "dead"
    }


KILLED = """
import sys
from jlora import peft
peft.export_merged(*sys.argv[1:])
"""


def killed(root: Folder, count: int) -> int:
    """Kills merges at moments spread over a run; gives how many were killed while they wrote."""
    (root / "base").mkdir()
    (root / "a").mkdir()
    draw = np.random.default_rng(0)
    weights = {f"h.{i}.q.weight": draw.standard_normal((512, 512), np.float32) for i in range(24)}
    save_file(weights, root / "base" / "model.safetensors")
    save_file(
        {
            f"base_model.model.h.{i}.q.lora_{x}.weight": np.ones(s, np.float32)
            for i in range(24)
            for x, s in (("A", (2, 512)), ("B", (512, 2)))
        },
        root / "a" / "adapter_model.safetensors",
    )
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}'
    (root / "a" / "adapter_config.json").write_text(config)
    (root / "out").mkdir()
    out, while_writing = root / "out" / "m", 0
    for i in range(count):
        command = [sys.executable, "-c", KILLED, root / "base", root / "a", out]
        process = subprocess.Popen(command)
        while not list((root / "out").iterdir()):
            assert process.poll() is None
            time.sleep(0.0005)
        time.sleep(0.3 * i / count)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # it was done before
            assert (out / "model.safetensors").stat().st_size == (
                root / "base" / "model.safetensors"
            ).stat().st_size
            (out / "model.safetensors").unlink()
            out.rmdir()
            continue
        while_writing += 1
        [left] = (root / "out").iterdir()
        assert re.match(r"\.m\.", left.name)
    peft.export_merged(root / "base", root / "a", out)
    assert [p.name for p in (root / "out").iterdir()] == ["m"]
    return while_writing


def test_killed_while_it_merges(tmp_path: Folder) -> None:
    """Never half a model; and the next run removes what is left."""
    assert killed(tmp_path, 2) > 0


@pytest.mark.slow
def test_killed_at_thirty_moments(tmp_path: Folder) -> None:
    assert killed(tmp_path, 30) > 5
