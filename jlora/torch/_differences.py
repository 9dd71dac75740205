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
        bound: how large rounding may be. PyTorch itself tells: it computes in float64 too. Of
            gradients, by its largest error.
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
    kinds = (x for x in CAUSES if x in theirs)
    each = (_compare(x, ours[x], theirs[x], lambda x=x: wide().get(x, {}), unknown) for x in kinds)
    return next(filter(None, each), [])


def _compare(
    what: str, ours: ByPath, theirs: ByPath, widen: Callable[[], ByPath], unknown: float
) -> list[Difference]:
    """Compares results of one kind."""
    least = LEAST * max(map(_measure, theirs.values()), default=0.0)

    @functools.cache
    def rounding() -> dict[str, float]:
        return {k: _find_error(theirs[k], z, least) for k, z in widen().items()}

    def compare(key: str) -> Difference:
        x, y = ours.get(key), theirs.get(key)
        if x is None or y is None:
            return Difference(what, key, math.inf, 0.0)
        error = _find_error(x, y, least)
        if y.dtype.kind in "biu" or not CLOSE < error < math.inf:
            return Difference(what, key, error, 0.0 if y.dtype.kind in "biu" else CLOSE)
        if key not in rounding():
            return Difference(what, key, error, unknown)
        # At a kink, what PyTorch rounds changes one gradient, and what JAX rounds another.
        own = [rounding()[k] for k in (rounding() if what == GRADIENT else (key,))]
        bound = max(CLOSE, TIMES * max(filter(math.isfinite, own), default=math.inf))
        return Difference(what, key, _find_error(x, widen()[key], least), bound)

    return [x for x in map(compare, {**theirs, **ours}) if x.error > x.bound]


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
