"""Folders appear whole or not at all, and what a killed process leaves is cleaned up."""

import errno
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import disks
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
from jlora import _folders, checkpoint, peft
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


LONG = ["a" * 255, "漢" * 80, "é" * 127, "a" + "\U0001d54f" * 60]


@pytest.mark.parametrize("name", LONG, ids=["ascii", "three", "two", "four"])
def test_names_as_long_as_the_disk_takes(name: str, tmp_path: Folder) -> None:
    """A name has at most 255 bytes, those of the folder in the making too, and Orbax's."""
    ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    adapter = {"w": {"kernel": jlora.types.LowRank(ones(4, 1), ones(1, 3), 1.0, LAYOUT)}}
    base = {"w": {"kernel": ones(4, 3)}}
    rows = [peft.Name("(.*)/kernel", r"\1", "io")]
    (tmp_path / "orbax").mkdir()
    peft.save(tmp_path / name, base, adapter, rows)
    checkpoint.save(tmp_path / "orbax" / name, adapter, ())
    left = list(tmp_path.rglob(".*"))
    assert (tmp_path / name).is_dir() and (tmp_path / "orbax" / name).is_dir() and not left


LAYOUT = jlora.types.Layout((), (0,), (1,))


@pytest.mark.parametrize("kind", ["nothing", "readonly", "nested"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_disk_that_cannot_be_written(kind: str, number: int, tmp_path: Folder) -> None:
    """The argument, the folder and the reason, with the error's number; errors of reading stay."""
    final = tmp_path / "m"
    message = (
        f"OUT: could not write {final}: {os.strerror(number)}. Nothing is left of it, and nothing "
        "else was touched. Make room or permission there, or give another path."
    )
    said = re.escape(message)
    with pytest.raises(OSError, match=rf"\A{said}\Z") as caught, fresh(final, "OUT") as folder:
        if kind == "nested":  # a folder in a folder in the making
            with fresh(folder / "inner", "OUT"):
                raise OSError(number, "x")
        raise OSError(number, "x", "elsewhere" if kind == "nothing" else str(folder / "file"))
    assert caught.value.errno == number and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Folder) -> None:
    """Within a file, or where nobody may write; a file that cannot be read is another error."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"^OUT: could not write .*file/m: Not a directory\. Nothing"),
        fresh(tmp_path / "file" / "m", "OUT"),
    ):
        pass
    (tmp_path / "locked").mkdir()
    with (
        disks.read_only(tmp_path / "locked"),
        pytest.raises(OSError, match=r"^OUT: could not write .*locked/m: (Read-only|Permission)"),
        fresh(tmp_path / "locked" / "m", "OUT"),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="of-theirs"), fresh(tmp_path / "m", "OUT"):
        (tmp_path / "of-theirs").read_text()


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
getattr(peft, sys.argv[1])(*sys.argv[2:])
"""
SIDE, LAYERS, RANK = 512, 24, 100


def inputs(root: Folder) -> None:
    """A model and an adapter of some 25 MB each."""
    draw = np.random.default_rng(0)
    sides = {"A": (RANK, SIDE), "B": (SIDE, RANK)}
    for name in ("base", "a", "out"):
        (root / name).mkdir()
    weights = {
        f"h.{i}.q.weight": draw.standard_normal((SIDE, SIDE), np.float32) for i in range(LAYERS)
    }
    save_file(weights, root / "base" / "model.safetensors")
    tensors = {
        f"base_model.model.h.{i}.q.lora_{x}.weight": draw.standard_normal(shape, np.float32)
        for i in range(LAYERS)
        for x, shape in sides.items()
    }
    save_file(tensors, root / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "target_modules": ["q"]}
    (root / "a" / "adapter_config.json").write_text(json.dumps(config))


def killed(root: Folder, command: list[str], count: int) -> int:
    """Kills a command at moments spread over its writing; how often it had not ended by then."""
    out = root / "out" / "m"
    work = functools.partial(getattr(peft, command[0]), *command[1:])
    work(root / "whole")
    expected = {p.name: p.read_bytes() for p in (root / "whole").iterdir()}
    while_writing = 0
    for i in range(count):
        process = subprocess.Popen([sys.executable, "-c", KILLED, *command, out])
        while not list((root / "out").iterdir()):
            assert process.poll() is None
            time.sleep(0.0002)
        time.sleep(0.3 * i / count)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # whole, if there at all
            assert {p.name: p.read_bytes() for p in out.iterdir()} == expected
            shutil.rmtree(out)
            continue
        while_writing += 1
        [left] = (root / "out").iterdir()
        assert re.match(r"\.m\.", left.name)
    work(out)
    assert [p.name for p in (root / "out").iterdir()] == ["m"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == expected
    return while_writing


@pytest.mark.parametrize(
    ("what", "count"),
    [
        pytest.param("export_merged", 30, marks=pytest.mark.slow),
        pytest.param("convert", 30, marks=pytest.mark.slow),
    ],
)
def test_killed_while_it_writes(what: str, count: int, tmp_path: Folder) -> None:
    """Never half a folder; and the next run removes what is left."""
    inputs(tmp_path)
    model = [str(tmp_path / "base")] if what == "export_merged" else []
    assert killed(tmp_path, [what, *model, str(tmp_path / "a")], count) > 0
