"""Several processes act as one: if one fails, all raise, and none is waited for."""

import contextlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._untrusted import printable

LENGTH = 1000  # bytes of a text that the other processes get
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
    texts = _gather("" if error is None else f"{type(error).__name__}: {one_line(error)}")
    if error is not None:
        raise error
    if any(texts):
        failed = [f"process {i}: {text}" for i, text in enumerate(texts) if text]
        raise RuntimeError("; ".join(failed))
    return result


def by_first(work: Callable[[], None]) -> None:
    """Does `work` on process 0; if it raises there, all raise."""
    by_all(work if jax.process_index() == 0 else lambda: None)


def in_step(work: Callable[[], T]) -> T:
    """Does `work` on every process, as `by_all`, where the processes wait for each other within it.

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
    """Returns the text of process 0 on every process."""
    return _gather(text)[0]


def _gather(text: str) -> list[str]:
    """Returns the texts of all processes, the same list on each, without what exceeds `LENGTH`."""
    row = np.frombuffer(text.encode()[:LENGTH].ljust(LENGTH), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, LENGTH)
    return [bytes(x).decode(errors="replace").rstrip() for x in rows]


def one_line(error: Exception) -> str:
    """Returns the message of an error in one line, without what TensorStore adds for developers."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.split(r" \[(?:tensorstore_spec|source locations)", text)[0].rstrip(".")
    return printable(text)
