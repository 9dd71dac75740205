"""Folders and files appear whole or not at all."""

import errno
import pathlib
import re
import subprocess
from typing import Any

import disks
import numpy as np
import processes
import pytest
from messages import refused
from peft_files import Folder, assert_equal

import jlora
from jlora import checkpoint, peft
from jlora._folders import fresh, fresh_file


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


def test_a_file_appears_whole(tmp_path: Folder) -> None:
    """Also beside others in its folder; it replaces none that was made meanwhile."""
    (tmp_path / "other").touch()
    with fresh_file(tmp_path / "m.x", "OUT") as file:
        file.write_text("x")
        assert not (tmp_path / "m.x").exists()
    assert (tmp_path / "m.x").read_text() == "x"
    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), fresh_file(tmp_path / "n.x", "OUT") as file:
            file.write_text("x")
            raise error
    other = tmp_path / "o.x"
    with refused(FileExistsError, "OUT", other), fresh_file(other, "OUT") as file:
        file.write_text("x")
        other.touch()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["m.x", "o.x", "other"]
    assert not (tmp_path / "o.x").read_text()


GUIDES = pathlib.Path(__file__).parents[1] / "notebooks"
KILLED = """
import os, pathlib, sys
from jlora._folders import fresh
with fresh(sys.argv[1], "OUT") as folder:
    (folder / "file").write_text("x")
    os.kill(os.getpid(), 9)
"""


def test_what_is_left_of_a_killed_write(tmp_path: Folder) -> None:
    """One hidden folder, which the guide's line removes."""
    processes.run("-c", KILLED, tmp_path / "m")
    [left] = tmp_path.iterdir()
    assert [p.name for p in left.rglob("*")] == ["m", "file"]
    [line] = re.findall(r"```bash\n(.*)\n```", (GUIDES / "files_and_serving.md").read_text())
    subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


LAYOUT = jlora.types.Layout((), (0,), (1,))
A, B, W = (np.ones(shape, np.float32) for shape in ((4, 1), (1, 3), (4, 3)))
ADAPTER = {"w": {"kernel": jlora.types.LowRank(A, B, 1.0, LAYOUT)}}
ROWS = [peft.Name("(.*)/kernel", r"\1", "io")]
WRITERS = {
    "peft": lambda path: peft.save(path, {"w": {"kernel": W}}, ADAPTER, ROWS),
    "image": lambda path: peft.save(
        path, {"w": {"kernel": W}}, ADAPTER, ROWS, dialect="diffusers", prefix="unet"
    ),
    "orbax": lambda path: checkpoint.save(path, ADAPTER, ()),
}
READERS = {
    "peft": lambda path: peft.read(path).leaves,
    "image": lambda path: peft.read(path).leaves,
    "orbax": checkpoint.restore,
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def contents(folder: Folder) -> dict[str, bytes | None]:
    """All that is in a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


def test_where_another_was_first(tmp_path: Folder) -> None:
    """Of two that write at once one is refused."""
    final = tmp_path / "m"
    said = "nothing is ever overwritten. Give"
    with refused(FileExistsError, "OUT", final, said), fresh(final, "OUT") as folder:
        (folder / "ours").touch()
        final.mkdir()
        (final / "theirs").touch()
    assert contents(tmp_path) == {"m": None, "m/theirs": b""}


LONG = ["a" * 255, "漢" * 80, "é" * 127, "a" + "\U0001d54f" * 60]


@pytest.mark.parametrize("name", LONG, ids=["ascii", "three", "two", "four"])
def test_names_as_long_as_the_disk_takes(name: str, tmp_path: Folder) -> None:
    """A name has at most 255 bytes, that of the folder in the making too."""
    WRITERS["peft"](tmp_path / name)
    assert (tmp_path / name).is_dir() and not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk_costs_nothing_else(what: str, tmp_path: Folder) -> None:
    """What is there stays, to the byte; with room the same call is right.

    Orbax leaves a folder, which it removes when it writes there again.
    """
    write, read = WRITERS[what], READERS[what]
    write(tmp_path / "old")
    before = contents(tmp_path)
    with disks.full(), refused(OSError, "out", tmp_path / "new", "Make room or permission"):
        write(tmp_path / "new")
    left = {path: x for path, x in contents(tmp_path).items() if ".orbax-" not in path}
    assert left == before
    write(tmp_path / "new")
    assert_equal(read(tmp_path / "new"), read(tmp_path / "old"))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["new", "old"]


@writers
def test_where_nobody_may_write(write: Any, tmp_path: Folder) -> None:
    write(tmp_path / "locked" / "old")
    before = contents(tmp_path)
    with disks.read_only(tmp_path / "locked"):
        message = r"`out`: could not write .*(Read-only|Permission denied).* Make room"
        with pytest.raises(OSError, match=message) as caught:
            write(tmp_path / "locked" / "new")
        given = caught.value.errno in (errno.EROFS, errno.EACCES)
        assert given or write is WRITERS["orbax"]  # whose errors have no number
        assert contents(tmp_path) == before


def test_a_folder_within_a_file(tmp_path: Folder) -> None:
    """It cannot be made; a file that cannot be read is another error."""
    (tmp_path / "file").write_text("")
    final = tmp_path / "file" / "m"
    with refused(OSError, "OUT", final, "Not a directory"), fresh(final, "OUT"):
        pass
    with pytest.raises(FileNotFoundError, match="of-theirs"), fresh(tmp_path / "m", "OUT"):
        (tmp_path / "of-theirs").read_text()


@pytest.mark.parametrize("kind", ["file", "link", "full"])
@writers
def test_what_is_there_stays(write: Any, kind: str, tmp_path: Folder) -> None:
    (tmp_path / "x").mkdir()
    if kind == "file":
        (tmp_path / "m").write_text("theirs")
    elif kind == "link":
        (tmp_path / "m").symlink_to(tmp_path / "x")
    else:
        write(tmp_path / "m")
    before = contents(tmp_path)
    with refused(FileExistsError, "out", tmp_path / "m", "exists and is not an empty folder"):
        write(tmp_path / "m")
    assert contents(tmp_path) == before


@writers
def test_where_a_folder_may_appear(write: Any, tmp_path: Folder) -> None:
    """In one that is there and empty, but no mount point."""
    write(tmp_path)
    assert contents(tmp_path)
    with refused(FileExistsError, "out", "/", "is a mount point", "give a folder in it."):
        write("/")
