"""Folders and files that appear whole or not at all, as each is written beside its final path."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ._errors import OccupiedError, not_written

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
    with fresh_file(final, argument) as folder:
        folder.mkdir()
        yield folder


@contextlib.contextmanager
def fresh_file(path: Where, argument: str) -> Iterator[Path]:
    """Yields a path to write a file to; it becomes `path` at the end, or is removed on failure.

    A folder that is written there becomes `path` too, also if an empty folder is there.

    Raises:
        FileExistsError: if `path` exists.
        OSError: as `fresh`.
    """
    final = Path(os.path.abspath(to_path(path, argument)))
    scratch = None
    try:
        with contextlib.suppress(FileExistsError):
            os.makedirs(final.parent)
        # On the same disk, in a hidden folder that is removed in the end.
        scratch = tempfile.mkdtemp(prefix=".jlora-", dir=final.parent)
        yield (new := Path(scratch, final.name))
        # On disk before the rename, so that a crash leaves nothing or the whole.
        for each in filter(Path.is_file, (new, *new.rglob("*"))):
            with open(each, "rb+") as file:
                os.fsync(file.fileno())
        check_vacant(final, argument, is_file=new.is_file())
        os.rename(new, final)
    except Exception as e:
        if isinstance(e, OccupiedError) or (number := _number_of(e, final)) is None:
            raise
        raise not_written(argument, final, os.strerror(number), number) from e
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def check_vacant(out: os.PathLike[str], argument: str = "out", is_file: bool = False) -> None:
    """Raises unless a folder, or a file, can appear at `out`."""
    if os.path.ismount(out):  # nothing is renamed to one
        raise OccupiedError(argument, f"{out} is a mount point; give a folder in it.", path=out)
    is_empty = os.path.isdir(out) and not os.path.islink(out) and not os.listdir(out)
    if os.path.lexists(out) and (is_file or not is_empty):
        raise OccupiedError(
            argument,
            f"{out} exists and is not an empty folder; nothing is ever overwritten. "
            "Give another path, or remove it first.",
            path=out,
        )


# Errors that only writing can cause.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _number_of(error: Exception, final: Path) -> int | None:
    """Returns the number of a system error that is about writing `final`, else None."""
    if isinstance(error, OSError):
        name = str(error.filename)
        is_near = name == str(final.parent) or name.startswith(f"{final.parent}{os.sep}.")
        return error.errno if is_near or error.errno in _WRITING else None
    # The words of safetensors' writer, which is not written in Python.
    found = re.search(r"I/O error: .*\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])
