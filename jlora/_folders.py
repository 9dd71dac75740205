"""Folders and files that appear whole or not at all, as each is written beside its final path."""

import contextlib
import errno
import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ._errors import OccupiedError, not_written

PATIENCE = 10.0  # seconds to wait for threads that still write
Where = str | os.PathLike[str]


def to_path(path: Where, argument: str = "path") -> Path:
    """Returns the path that an argument is; raises `TypeError` if it is none."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`{argument}` must be a path, a str or a pathlib.Path; got a {type(path).__name__}. "
            "Is it in the place of another argument?"
        )
    return Path(path)


@contextlib.contextmanager
def fresh(path: Where, argument: str) -> Iterator[Path]:
    """Yields a folder to write into; it becomes `path` at the end, or is removed on failure.

    Args:
        path: the final path.
        argument: the name of the argument, for errors.

    Raises:
        FileExistsError: if `path` exists and is not an empty folder, or is a mount point.
        OSError: if there is no room or no permission to write it.
    """
    final = Path(os.path.abspath(to_path(path, argument)))
    check_vacant(final, argument)
    with scratch(final, argument) as stage:
        yield stage
        commit(stage, final, argument)


@contextlib.contextmanager
def fresh_file(path: Where, argument: str) -> Iterator[Path]:
    """Yields a path to write a file to; it becomes `path` at the end, or is removed on failure.

    Raises:
        FileExistsError: if `path` exists.
        OSError: as `fresh`.
    """
    final = Path(os.path.abspath(to_path(path, argument)))
    with scratch(final, argument) as stage:
        yield stage / final.name
        _sync(stage / final.name)
        if os.path.lexists(final):
            raise _occupied(final, argument)
        os.rename(stage / final.name, final)


@contextlib.contextmanager
def scratch(final: Path, argument: str) -> Iterator[Path]:
    """Yields a folder next to `final`, on the same disk, and removes it in the end."""
    remove_leftovers(final)
    stage = beside(final, token())
    try:
        stage.mkdir(parents=True)
        yield stage
    except Exception as e:
        if isinstance(e, FileExistsError) or (number := _error_number(e, stage)) is None:
            raise
        raise not_written(argument, final, os.strerror(number), number) from e
    finally:
        discard(stage)


# Errors that only writing can cause.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _error_number(error: Exception, stage: Path) -> int | None:
    """Returns the number of a system error that concerns `stage` or its disk, else None."""
    if isinstance(error, OSError):
        number = error.errno
        path = str(error.filename or "")
        about = path.startswith(str(stage)) or path == str(stage.parent)
        return number if number in _WRITING or (number and about) else None
    if type(error).__name__ != "SafetensorError":
        return None
    # The words of safetensors' writer, which is not written in Python.
    found = re.search(r"I/O error: .*\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


def check_vacant(path: os.PathLike[str], argument: str = "path") -> None:
    """Raises unless a folder can appear at `path`."""
    if os.path.ismount(path):  # nothing is renamed to one
        raise OccupiedError(
            f"`{argument}`: {path} is a mount point; give a folder in it.", path=path
        )
    is_empty = os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path)
    if os.path.lexists(path) and not is_empty:
        raise _occupied(path, argument)


def token() -> str:
    """Names a folder in the making: the machine, the process, and a random part."""
    return f"{_machine()}-{os.getpid()}-{secrets.token_hex(8)}"


def beside(final: Path, token: str) -> Path:
    """Returns the path at which `final` is made; names are cut, as they have at most 255 bytes."""
    name = final.name
    while len(os.fsencode(name)) > 100:
        name = name[:-1]
    return final.with_name(f".{name}.{token}")


def commit(stage: Path, final: Path, argument: str) -> None:
    """Renames `stage` to `final`; raises if a folder with files has appeared there."""
    for path in stage.rglob("*"):
        if path.is_file():
            _sync(path)
    try:
        os.rename(stage, final)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _occupied(final, argument) from None
        raise


def discard(stage: Path, quiet: float = 0.02) -> None:
    """Removes a folder, and Orbax's folders beside it, whose names begin with its name.

    Threads that still write make folders anew, so it looks again after `quiet` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    pattern = f"{glob.escape(stage.name)}*"
    while (left := list(stage.parent.glob(pattern))) and time.monotonic() < deadline:
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(quiet)


def remove_leftovers(final: Path) -> None:
    """Removes what killed processes of this machine left when they made `final`."""
    if os.name != "posix":  # elsewhere asking for a process may end it
        return
    name = re.escape(beside(final, "").name)
    ours = re.compile(rf"{name}{_machine()}-(?P<process>\d+)-[0-9a-f]{{16}}(\..*)?")
    for path in final.parent.glob(".*"):
        if (found := ours.fullmatch(path.name)) and not _is_running(int(found["process"])):
            shutil.rmtree(path, ignore_errors=True)


def _machine() -> str:
    """Identifies the machine, or the container on it, to which process numbers belong."""
    try:
        numbered = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbered = ""
    return hashlib.sha256(f"{platform.node()} {numbered}".encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as e:
        return not isinstance(e, ProcessLookupError)
    return True


def _occupied(path: os.PathLike[str], argument: str) -> OccupiedError:
    return OccupiedError(
        f"`{argument}`: {path} exists and is not an empty folder; nothing is ever overwritten. "
        "Give another path, or remove it first.",
        path=path,
    )


def _sync(path: Path) -> None:
    # On disk before the rename, so that a crash leaves no folder or a whole one.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
