"""Orbax's files: checks before reading, and one atomic write by all processes together."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from .. import _folders
from .._errors import (
    InputError,
    MissingError,
    OccupiedError,
    blame,
    check_values,
    not_written,
    printable,
    show,
)
from .._folders import Where

# ------------------------------------------------------------------------------- several processes
# If one process fails, all raise, and none waits for another.

LENGTH = 1000  # bytes of a text that is sent to the other processes
MISMATCH = "sync_global_devices name mismatch"  # from JAX's error

T = TypeVar("T")


def by_all(work: Callable[[], T]) -> T:
    """Calls `work` on every process. If one raises, all raise before any continues.

    Raises:
        RuntimeError: on processes where `work` did not raise; it says which raised, and why.
    """
    result: Any = None
    error = None
    try:
        result = work()
    except Exception as e:
        error = e
    texts = _gather("" if error is None else f"{type(error).__name__}: {one_line(error)}")
    if error is not None:
        raise error
    if any(texts):
        failed = [f"process {i}: {text}" for i, text in enumerate(texts) if text]
        raise RuntimeError("; ".join(failed))
    return result


def by_first(work: Callable[[], None]) -> None:
    """Calls `work` on process 0. If it raises, all processes raise."""
    by_all(work if jax.process_index() == 0 else lambda: None)


def in_step(work: Callable[[], T]) -> T:
    """Calls `work` on every process, like `by_all`; processes may wait for each other in it.

    Between its steps, Orbax makes processes wait for each other at named barriers. A process that
    fails joins the barrier under another name, so that JAX raises on all.
    """

    def meet() -> Any:
        try:
            return work()
        except Exception as e:
            if MISMATCH in str(e):
                return None  # another process failed; `by_all` raises its error
            with contextlib.suppress(AssertionError):
                multihost_utils.sync_global_devices("jlora: failed")
            raise

    return by_all(meet)


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes, cut to `LENGTH`; each process gets the same list."""
    row = np.frombuffer(text.encode()[:LENGTH].ljust(LENGTH), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, LENGTH)
    return [bytes(x).decode(errors="replace").rstrip() for x in rows]


def one_line(error: Exception) -> str:
    """Returns the message of an error in one line, without TensorStore's details."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.split(r" \[(?:tensorstore_spec|source locations)", text)[0].rstrip(".")
    return printable(text)


# ------------------------------------------------------------------------------------ Orbax's files

SAVE_AGAIN = "Take another checkpoint, or save this one again."
LIMIT = 64 * 2**20  # bytes of a file with metadata
DENSEST = 100_000  # bytes of an array in a byte of a file, of which zeros need a third
_DESCRIBING = {
    "metadata",
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "_sharding",
    "manifest.ocdbt",
    "commit_success.txt",
    ".zarray",
    "zarr.json",
}
_BY_PROCESS = "array_metadatas"  # a folder of such files


def place(path: Where) -> epath.Path:
    """Returns `path` in Orbax's form: absolute, or a URL such as `gs://…`."""
    _folders.to_path(path)  # raises if it is none
    name = os.fspath(path)
    return epath.Path(name if "://" in name else os.path.abspath(name))


def find(path: Where) -> epath.Path:
    """Returns the place of a checkpoint; raises `FileNotFoundError` if nothing is there."""
    folder = place(path)
    if not folder.exists():
        raise MissingError(f"`path`: there is no checkpoint at {folder}.", path=folder)
    return folder


@contextlib.contextmanager
def damage(folder: Where, what: str, remedy: str = SAVE_AGAIN) -> Iterator[None]:
    """Turns any error about a folder into an `InputError` with `what`, the reason and a remedy.

    Orbax closes its event loop at the first error. Python then prints "Event loop is closed" for
    each read of TensorStore that ends later.
    """
    try:
        yield
    except Exception as e:
        reason = one_line(e)
        if len(reason) > 600:  # TensorStore puts the cause at the end
            reason = f"{reason[:300]} ... {reason[-300:]}"
        why = f"`path`: {what} ({type(e).__name__}: {reason}). {remedy}"
        raise InputError(why, path=folder) from e


def check_files(folder: Where) -> None:
    """Raises if reading might never end, or need more memory than a checkpoint should.

    Orbax reads all metadata, and any file that it finds, even pipes and devices.

    Raises:
        ValueError: for a local folder with such a file.
    """
    if "://" in os.fspath(folder):
        return
    for parent, _, names in os.walk(folder):
        for path in filter(Path.exists, (Path(parent, name) for name in names)):
            if not path.is_file():
                why = "is not a regular file. Take another checkpoint."
                raise InputError(f"`path`: {show(str(path))} {why}", path=path)
            if path.name not in _DESCRIBING and path.parent.name != _BY_PROCESS:
                continue
            if (size := path.stat().st_size) > LIMIT:
                why = f"has {size} bytes; expected at most {LIMIT}. Take another checkpoint."
                raise InputError(f"`path`: {path} {why}", path=path)
            with blame("path", path):
                check_values(path.read_bytes())


def check_size(folder: Where, arrays: Iterable[Any]) -> None:
    """Raises `ValueError` for arrays that the files of a local folder cannot hold.

    Where a file lacks a part of an array, reading makes it up, however large it is.
    """
    if "://" in os.fspath(folder):
        return
    held = sum(x.stat().st_size for x in Path(folder).rglob("*") if x.is_file())
    needed = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays)
    if needed > DENSEST * held:
        raise ValueError(f"its arrays need {needed} bytes, more than its files can hold")


def write(path: Where, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs) -> None:
    """Writes a checkpoint to `path`, complete or not at all, with all processes together.

    Orbax writes into a folder that no other writer uses. In the end, process 0 renames it. If two
    writers have the same `path`, the second rename fails. Object stores have no such rename; there
    Orbax's own protocol is used.
    """
    final = place(path)
    local = "://" not in os.fspath(path)
    stage = final

    def save() -> None:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(stage, args=args)

    try:
        by_first(lambda: _check(final, local))
        if local:
            token, *_ = _gather(_folders.token())  # that of process 0
            stage = epath.Path(_folders.beside(Path(final), token))
        in_step(save)  # closed on all before process 0 removes what a failure leaves
        if local:
            by_first(lambda: _folders.commit(Path(stage), Path(final), "path"))
    except FileExistsError:
        raise
    except Exception as e:
        raise not_written("path", final, one_line(e)) from e
    finally:
        if stage is not final and jax.process_index() == 0:
            # TensorStore ends the writes that had begun, in any process, after Orbax has raised.
            _folders.discard(Path(stage), quiet=0.2)


def _check(final: epath.Path, local: bool) -> None:
    if local:
        _folders.check_vacant(final)
        _folders.remove_leftovers(Path(final))
    elif final.exists() and not (final.is_dir() and not any(final.iterdir())):
        why = "exists and is not empty; nothing is ever overwritten. Give another."
        raise OccupiedError(f"`path`: {final} {why}", path=final)
