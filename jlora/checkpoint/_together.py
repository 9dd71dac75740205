"""Several processes act as one: if one fails, all raise, and none waits for it."""

import contextlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._untrusted import printable

LENGTH = 1000  # bytes of an error that the other processes get
MISMATCH = "sync_global_devices name mismatch"  # JAX's words

T = TypeVar("T")


def by_all(work: Callable[[], T]) -> T:
    """Does `work` on every process; if it raises on one, all raise before any goes on.

    Raises:
        RuntimeError: on the processes where it did not raise; it says which did, and why.
    """
    result: Any = None
    error = None
    try:
        result = work()
    except Exception as e:
        error = e
    errors = _gather_errors(error)
    if error is not None:
        raise error
    if errors:
        raise RuntimeError("; ".join(errors))
    return result


def by_first(work: Callable[[], None]) -> None:
    """Does `work` on process 0; if it raises there, all raise."""
    by_all(work if jax.process_index() == 0 else lambda: None)


def in_step(work: Callable[[], T]) -> T:
    """Does `work` on every process, as `by_all`, if the processes wait for each other within it.

    Orbax makes them wait for each other between its steps, by name. A process that fails joins the
    others where they wait, under another name, and JAX then raises on all.
    """

    def meet() -> Any:
        try:
            return work()
        except Exception as e:
            if MISMATCH in str(e):
                return None  # another process failed; `by_all` brings its error
            with contextlib.suppress(AssertionError):
                multihost_utils.sync_global_devices("jlora: failed")
            raise

    return by_all(meet)


def from_first(text: str) -> str:
    """Gives every process the text of process 0, at most 100 letters of ASCII."""
    row = np.frombuffer(text.encode().ljust(100), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(row))).decode().rstrip()


def _gather_errors(error: Exception | None) -> list[str]:
    """A line for each process that has an error, the same list on all."""
    text = "" if error is None else f"{type(error).__name__}: {one_line(error)}"
    row = np.frombuffer(text.encode()[:LENGTH].ljust(LENGTH), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, LENGTH)
    texts = [bytes(x).decode(errors="replace").rstrip() for x in rows]
    return [f"process {i}: {text}" for i, text in enumerate(texts) if text]


def one_line(error: Exception) -> str:
    """The message of an error in one line, without what TensorStore adds for its developers."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.split(r" \[(?:tensorstore_spec|source locations)", text)[0].rstrip(".")
    return printable(text)
