"""Orbax's files, read and written by all processes together."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from .._errors import (
    InputError,
    MissingError,
    OccupiedError,
    not_written,
    printable,
    show,
)
from .._folders import Where, check_vacant, to_path

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
    """Returns the message of an error in one line, without details and options of Orbax."""
    text = " ".join(str(error).split()) or type(error).__name__
    theirs = r" \[(?:tensorstore_spec|source locations)| If this mismatch is intentional"
    text = re.split(theirs, text)[0].rstrip(".")
    return printable(text)


# ------------------------------------------------------------------------------------ Orbax's files

SAVE_AGAIN = "Take another checkpoint, or save this one again."


def place(path: Where) -> epath.Path:
    """Returns `path` in Orbax's form: absolute, or a URL such as `gs://…`."""
    to_path(path)  # raises if it is none
    name = os.fspath(path)
    return epath.Path(name if "://" in name else os.path.abspath(name))


def find(path: Where) -> epath.Path:
    """Returns the place of a checkpoint; raises `FileNotFoundError` if nothing is there."""
    folder = place(path)
    if not folder.exists():
        raise MissingError("path", f"there is no checkpoint at {folder}.", path=folder)
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
        why = f"{what} ({type(e).__name__}: {reason}). {remedy}"
        raise InputError("path", why, path=folder) from e


def check_files(folder: Where) -> None:
    """Raises `ValueError` for a pipe or a device in a local folder, which Orbax would read."""
    if "://" in os.fspath(folder):
        return
    found = (path for path in Path(folder).rglob("*") if path.exists())
    if odd := next((path for path in found if not (path.is_file() or path.is_dir())), None):
        why = f"{show(str(odd))} is not a regular file. Take another checkpoint."
        raise InputError("path", why, path=odd)


def write(out: Where, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs) -> None:
    """Writes a checkpoint to `out`, with all processes together.

    Orbax writes it beside `out`, and renames it when it is complete.
    """
    final = place(out)

    def save() -> None:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(final, args=args)

    try:
        by_all(lambda: _make_room(final) if jax.process_index() == 0 else None)
        in_step(save)
    except FileExistsError:
        raise
    except Exception as e:
        raise not_written("out", final, one_line(e)) from e


def _make_room(final: epath.Path) -> None:
    """Raises unless a folder can appear at `final`, and removes one that is empty."""
    if "://" not in os.fspath(final):
        check_vacant(final)
        if final.exists():
            final.rmdir()
    elif final.exists():
        why = "exists; nothing is ever overwritten. Give another."
        raise OccupiedError("out", f"{final} {why}", path=final)
