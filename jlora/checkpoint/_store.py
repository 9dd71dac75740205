"""The border to Orbax: one atomic write, and errors that say what to do."""

import errno
import glob
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from ._together import brief, by_first, in_step, shared_token

Where = str | os.PathLike[str]


def place(path: Where) -> epath.Path:
    """`path` as Orbax wants it: absolute, or a URL such as `gs://…`."""
    name = os.fspath(path)
    return epath.Path(name if "://" in name else os.path.abspath(name))


def write(path: Where, handler: Any, args: Any) -> None:
    """A checkpoint at `path`, complete or not at all, by all processes together.

    Orbax writes into a folder that no other writer uses, and process 0 renames it in the end: a
    rename onto a folder that is there fails, so that of two writers one is told. Where there is
    no such rename, as in object stores, Orbax's own protocol is all that there is.
    """
    final = place(path)
    local = "://" not in os.fspath(path)
    stage = final.parent / f".{final.name}.{shared_token()}" if local else final
    try:
        by_first(lambda: _check_vacant(final))
        with ocp.Checkpointer(handler) as checkpointer:
            in_step(lambda: checkpointer.save(stage, args=args))
        if local:
            by_first(lambda: _commit(Path(stage), Path(final)))
    except FileExistsError:
        raise
    except Exception as e:
        raise OSError(
            f"`path`: could not write the checkpoint {final}: {brief(e)}. Nothing is left of it, "
            "and nothing else was touched. Make room or permission there, or give another path."
        ) from e
    finally:
        if local and jax.process_index() == 0:
            for left in Path(final.parent).glob(f"{glob.escape(stage.name)}*"):
                shutil.rmtree(left, ignore_errors=True)


def _check_vacant(final: epath.Path) -> None:
    if "://" not in os.fspath(final) and os.path.ismount(final):  # nothing is renamed to one
        raise FileExistsError(f"`path`: {final} is a mount point; give a folder in it.")
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise _occupied(final)


def _occupied(final: Any) -> FileExistsError:
    return FileExistsError(
        f"`path`: {final} exists and is not an empty folder; nothing is ever overwritten. "
        "Give another path, or remove it first."
    )


def _commit(stage: Path, final: Path) -> None:
    for file in stage.rglob("*"):
        if file.is_file():
            _sync(file)
    try:
        os.rename(stage, final)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _occupied(final) from None
        raise


def _sync(file: Path) -> None:
    # On disk before the rename, so that after a crash the folder is not there or whole.
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
