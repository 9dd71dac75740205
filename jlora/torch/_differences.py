"""What differs from PyTorch, as data, and by how much."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

CLOSE, TIMES = 1e-4, 8.0  # of the largest entry; of PyTorch's own error, one draw of rounding
LEAST = 1e-3  # of the largest entry of all arrays: errors of smaller ones are relative to it
UNKNOWN = 1e-3  # where PyTorch computes nothing in float64
MOST = 10  # differences that a text lists
OUTPUT, AGAIN, GRADIENT, ADAPTED = "output", "output of call 2", "gradient", "adapted output"

ByPath = Mapping[str, Any]  # arrays or tensors
Results = Mapping[str, ByPath]  # by what they are


class Difference(NamedTuple):
    """A result of `apply` that is not PyTorch's.

    Attributes:
        what: `"output"`; `"output of call 2"`, if that of PyTorch is another one than of its first
            call; `"gradient"`; `"adapted output"`, for one with the adapter.
        where: the path of the output, or of the leaf whose gradient it is.
        error: the largest difference, relative to the largest entry; infinite if the shapes differ,
            or what is not finite.
        bound: how large rounding may be. PyTorch itself tells: it computes in float64 too.
    """

    what: str
    where: str
    error: float
    bound: float

    def __str__(self) -> str:
        name = f"{self.what} {self.where}".strip()
        if math.isinf(self.error):
            return f"{name} has another shape, or is not finite elsewhere"
        return f"{name} is off by {self.error:.1e} of its largest entry; rounding: {self.bound:.1e}"


CAUSES = {  # in the order of the comparison
    AGAIN: "the model keeps a state from call to call, or draws random numbers.",
    OUTPUT: "an operator that differs, or a branch that asks PyTorch for what JAX has not.",
    GRADIENT: "a hook on gradients, or an operator that has another gradient in PyTorch.",
    ADAPTED: "the model calls a module that PEFT does not reach, as of a plain list.",
}


@dataclasses.dataclass(frozen=True)
class Differences:
    """What `jlora.torch.compare` found; false if `apply` computes what PyTorch does.

    Attributes:
        found: the results that differ.
        module: the first module, in the order of calls, whose output differs; empty if none does.
    """

    found: tuple[Difference, ...] = ()
    module: str = ""

    def __bool__(self) -> bool:
        return bool(self.found)

    @property
    def cause(self) -> str:
        """What it likely is."""
        return CAUSES[self.found[0].what] if self.found else ""

    def __str__(self) -> str:
        if not self.found:
            return "`apply` computes what PyTorch does."
        lines = ["`apply` does not compute what PyTorch does:", *map(str, self.found[:MOST])]
        lines += [f"and {len(self.found) - MOST} more"] if len(self.found) > MOST else []
        lines += [f"The first module that differs is {self.module}"] if self.module else []
        return "\n  ".join([*lines, f"Likely cause: {self.cause}"])


def judge(
    ours: Results, theirs: Results, widen: Callable[[], Results], unknown: float = UNKNOWN
) -> list[Difference]:
    """Compares results with PyTorch's; where these differ, both with those of float64.

    Returns:
        What differs, of the first kind that does.
    """
    wide = functools.cache(lambda: _try(widen))
    found = list[Difference]()
    for what in (x for x in CAUSES if x in theirs and not found):
        own, other = ours[what], theirs[what]
        least = LEAST * max(map(_measure, other.values()), default=0.0)
        for key in {**other, **own}:
            z = functools.partial(lambda what, key: wide().get(what, {}).get(key), what, key)
            error, bound = _compare(own.get(key), other.get(key), z, least, unknown)
            found += [Difference(what, key, error, bound)] * (error > bound)
    return found


def _compare(
    x: Any, y: Any, widen: Callable[[], Any], least: float, unknown: float
) -> tuple[float, float]:
    """Returns the error of an array, and its bound."""
    if x is None or y is None:
        return math.inf, 0.0
    error = _find_error(x, y, least)
    if y.dtype.kind in "biu":
        return error, 0.0
    if not CLOSE < error < math.inf:
        return error, CLOSE
    if (z := widen()) is None:
        return error, unknown
    return _find_error(x, z, least), max(CLOSE, TIMES * _find_error(y, z, least))


def _try(run: Callable[[], Results]) -> Results:
    """Runs PyTorch in float64; nothing if some operator takes no such floats."""
    try:
        return run()
    except RuntimeError:
        return {}


def _measure(x: Any) -> float:
    """Returns the size of the largest finite entry."""
    return float(np.abs(x[np.isfinite(x)].astype(complex)).max(initial=0))


def _find_error(x: Any, y: Any, least: float) -> float:
    """Returns the largest difference, relative to the largest entry of `y`, or to `least`."""
    x, y = (np.asarray(x).astype(complex) for x in (x, y))
    is_finite = np.isfinite(y)
    if x.shape != y.shape or not np.array_equal(x[~is_finite], y[~is_finite], equal_nan=True):
        return math.inf
    error = np.abs(x[is_finite] - y[is_finite]).max(initial=0)
    return math.inf if np.isnan(error) else float(error / max(_measure(y), least, 1e-30))
