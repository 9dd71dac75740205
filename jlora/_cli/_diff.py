"""`jlora diff`: where two adapters differ, and by how much."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .. import analysis
from .._adapters import Decomposed, LowRank, Replaced, is_node, weight_shape
from .._report import aligned
from ._inputs import Opened, open_alike
from ._inspect import finite, wide


class Compared(NamedTuple):
    """One leaf that both have.

    Attributes:
        name: its name.
        equal: whether all bits are equal, those of the numbers beside A and B too.
        relative: ‖ΔW_a - ΔW_b‖ / ‖ΔW_a‖ over all its matrices; None where shapes differ.
        changes: what differs in words.
    """

    name: str
    equal: bool
    relative: float | None
    changes: list[str]


class Difference(NamedTuple):
    """The answer."""

    a: Opened
    b: Opened
    compared: list[Compared]
    only_a: list[str]
    only_b: list[str]
    tolerance: float | None

    @property
    def equal(self) -> bool:
        """Whether they are equal, or within the tolerance where one was given."""
        return not (self.only_a or self.only_b) and all(map(self._accepts, self.compared))

    def _accepts(self, x: Compared) -> bool:
        if x.equal or self.tolerance is None or x.relative is None:
            return x.equal
        return x.relative <= self.tolerance

    @property
    def exit_code(self) -> int:
        """As that of diff(1)."""
        return 0 if self.equal else 1

    def as_json(self) -> dict[str, Any]:
        """All leaves; a relative difference that is not finite is null."""
        sites = [
            x._asdict() | {"relative": None if x.relative is None else finite(x.relative)}
            for x in self.compared
        ]
        return {
            "a": {"path": str(self.a.folder), "format": self.a.format},
            "b": {"path": str(self.b.folder), "format": self.b.format},
            "equal": self.equal,
            "tolerance": self.tolerance,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "sites": sites,
        }

    def __str__(self) -> str:
        rows = [(x.name, _shown(x.relative), "; ".join(x.changes)) for x in self._unequal]
        lines = aligned(("site", "relative", "differs"), rows, {"relative"}) if rows else []
        lines += [f"only in {self.a.folder}: {name}" for name in self.only_a]
        lines += [f"only in {self.b.folder}: {name}" for name in self.only_b]
        n = len(self.compared)
        return "\n".join([*lines, f"{n - len(self._unequal)} of {n} common sites are equal"])

    @property
    def _unequal(self) -> list[Compared]:
        return [x for x in self.compared if not x.equal]


def diff(
    a: Path, b: Path, *, names: str | None = None, tolerance: float | None = None
) -> Difference:
    """Compares the adapters in `a` and `b`; `names` is the table for one of PEFT and one not."""
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"--tolerance must be a number of at least 0; got {tolerance}.")
    ours, theirs = open_alike(a, b, names)
    common = [name for name in ours.leaves if name in theirs.leaves]
    bar = tqdm(common, "sites", disable=None, leave=False, file=sys.stderr)
    compared = [_compare(name, ours.leaves[name], theirs.leaves[name]) for name in bar]
    only = _only(ours.leaves, theirs.leaves), _only(theirs.leaves, ours.leaves)
    return Difference(ours, theirs, compared, *only, tolerance)


def _only(leaves: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    return [name for name in leaves if name not in others]


def _compare(name: str, x: Any, y: Any) -> Compared:
    if is_node(x) != is_node(y) or (is_node(x) and type(x) is not type(y)):
        return Compared(name, False, None, [" → ".join(map(_form, (x, y)))])
    compare = _compare_full if not is_node(x) else _COMPARE.get(type(x), _compare_low)
    relative, changes = compare(x, y)
    return Compared(name, not changes, relative, changes)


def _form(x: Any) -> str:
    named = {LowRank: "low rank", Decomposed: "DoRA", Replaced: "rows"}
    return named.get(type(x), type(x).__name__) if is_node(x) else "in full"


def _compare_rows(x: Replaced, y: Replaced) -> tuple[float | None, list[str]]:
    if x.rows != y.rows or x.layout != y.layout:
        return None, ["rows"]
    return _compare_full(x.v, y.v)


def _compare_decomposed(x: Decomposed, y: Decomposed) -> tuple[float | None, list[str]]:
    """What W' is depends on W: only whether it is the same is known."""
    low = (LowRank(z.a, z.b, z.scale, z.layout, residual=z.residual) for z in (x, y))
    changes = _compare_low(*low)[1] + ["m"] * (not _same(x.m, y.m))
    return None if changes else 0.0, changes


def _compare_low(x: Any, y: Any) -> tuple[float | None, list[str]]:
    pairs = {
        "weight": (weight_shape(x), weight_shape(y)),
        "axes": (x.layout, y.layout),
        "rank": (x.a.shape[-1], y.a.shape[-1]),
        "scale": (x.scale, y.scale),
        "dropout": (x.dropout, y.dropout),
        "dtype": (str(x.a.dtype), str(y.a.dtype)),
        "frozen": (x.frozen, y.frozen),
        "residual": (x.residual, y.residual),
    }
    changes = [f"{what} {p} → {q}" for what, (p, q) in pairs.items() if p != q]
    changes += [name for name in "AB" if not _same(*(getattr(z, name.lower()) for z in (x, y)))]
    if weight_shape(x) != weight_shape(y) or x.layout[:3] != y.layout[:3]:
        return None, changes
    if x.residual != y.residual:  # of two bases
        return None, changes
    if all(change.startswith(("dropout ", "frozen ")) for change in changes):
        return 0.0, changes
    x, y = wide(x), wide(y)
    return _relative(analysis.distance(x, y), analysis.norm(x)), changes


_COMPARE = {Decomposed: _compare_decomposed, Replaced: _compare_rows}


def _compare_full(x: Any, y: Any) -> tuple[float | None, list[str]]:
    pairs = {"shape": (x.shape, y.shape), "dtype": (str(x.dtype), str(y.dtype))}
    changes = [f"{what} {p} → {q}" for what, (p, q) in pairs.items() if p != q]
    if x.shape != y.shape:
        return None, changes
    if not _same(x, y):
        changes.append("values")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return _relative(x - y, x), changes


def _same(x: Any, y: Any) -> bool:
    x, y = np.asarray(x), np.asarray(y)
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes()


def _relative(change: Any, size: Any) -> float:
    """Of the norms of two arrays, of norms or of entries."""
    change, size = (float(np.linalg.norm(np.ravel(z))) for z in (change, size))
    if size == 0:
        return 0.0 if change == 0 else math.inf
    return change / size


def _shown(relative: float | None) -> str:
    return "-" if relative is None else f"{relative:.3g}"
