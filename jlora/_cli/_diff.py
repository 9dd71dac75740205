"""`jlora diff`: where two adapters differ, and by how much."""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .. import analysis
from .._adapters import Decomposed, LowRank, Replaced, is_node, weight_shape
from .._report import aligned
from ._command import Answer
from ._inputs import open_alike
from ._inspect import wide


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


def diff(a: Path, b: Path, *, names: str | None, tolerance: float | None) -> Answer:
    """Compares the adapters in `a` and `b`; `names` is the table for one of PEFT and one not.

    The exit code is that of diff(1). With a tolerance, other bits are equal within it.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"--tolerance must be a number of at least 0; got {tolerance}.")
    ours, theirs = open_alike(a, b, names)
    common = [name for name in ours.leaves if name in theirs.leaves]
    bar = tqdm(common, "sites", disable=None, leave=False, file=sys.stderr)
    compared = [_compare(name, ours.leaves[name], theirs.leaves[name]) for name in bar]
    only_a = [name for name in ours.leaves if name not in theirs.leaves]
    only_b = [name for name in theirs.leaves if name not in ours.leaves]
    unequal = [x for x in compared if not x.equal]
    within = tolerance is not None and all(
        x.relative is not None and x.relative <= tolerance for x in unequal
    )
    equal = not (only_a or only_b) and (within or not unequal)
    rows = [(x.name, _relative_text(x.relative), "; ".join(x.changes)) for x in unequal]
    lines = aligned(("site", "relative", "differs"), rows, {"relative"}) if rows else []
    lines += [f"only in {a}: {name}" for name in only_a]
    lines += [f"only in {b}: {name}" for name in only_b]
    n = len(compared)
    lines.append(f"{n - len(unequal)} of {n} common sites are equal")
    fields = {
        "a": {"path": str(a), "format": ours.format},
        "b": {"path": str(b), "format": theirs.format},
        "equal": equal,
        "tolerance": tolerance,
        "only_a": only_a,
        "only_b": only_b,
        "sites": [x._asdict() for x in compared],
    }
    return Answer("\n".join(lines), fields, int(not equal))


def _relative_text(relative: float | None) -> str:
    return "-" if relative is None else f"{relative:.3g}"


# --------------------------------------------------------------------------------------- two leaves


def _compare(name: str, x: Any, y: Any) -> Compared:
    if type(x) is not type(y) and (is_node(x) or is_node(y)):
        return Compared(name, False, None, [f"{_kind(x)} → {_kind(y)}"])
    compare = _compare_full if not is_node(x) else _COMPARE.get(type(x), _compare_low_rank)
    relative, changes = compare(x, y)
    return Compared(name, not changes, relative, changes)


def _kind(x: Any) -> str:
    names = {LowRank: "low rank", Decomposed: "DoRA", Replaced: "rows"}
    return names.get(type(x), type(x).__name__) if is_node(x) else "in full"


def _compare_rows(x: Replaced, y: Replaced) -> tuple[float | None, list[str]]:
    if x.rows != y.rows or x.layout != y.layout:
        return None, ["rows"]
    return _compare_full(x.v, y.v)


def _compare_decomposed(x: Decomposed, y: Decomposed) -> tuple[float | None, list[str]]:
    """Only whether W' is the same is known: what it is depends on W."""
    low = (LowRank(z.a, z.b, z.scale, z.layout, residual=z.residual) for z in (x, y))
    changes = _compare_low_rank(*low)[1] + ["m"] * (not _has_same_bits(x.m, y.m))
    return None if changes else 0.0, changes


def _compare_low_rank(x: Any, y: Any) -> tuple[float | None, list[str]]:
    changes = _changes(
        {
            "weight": (weight_shape(x), weight_shape(y)),
            "axes": (x.layout, y.layout),
            "rank": (x.a.shape[-1], y.a.shape[-1]),
            "scale": (x.scale, y.scale),
            "dropout": (x.dropout, y.dropout),
            "dtype": (str(x.a.dtype), str(y.a.dtype)),
            "frozen": (x.frozen, y.frozen),
            "residual": (x.residual, y.residual),
        }
    )
    changes += [n for n in "AB" if not _has_same_bits(*(getattr(z, n.lower()) for z in (x, y)))]
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
    changes = _changes({"shape": (x.shape, y.shape), "dtype": (str(x.dtype), str(y.dtype))})
    if x.shape != y.shape:
        return None, changes
    if not _has_same_bits(x, y):
        changes.append("values")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return _relative(x - y, x), changes


def _changes(pairs: dict[str, tuple[Any, Any]]) -> list[str]:
    return [f"{what} {p} → {q}" for what, (p, q) in pairs.items() if p != q]


def _has_same_bits(x: Any, y: Any) -> bool:
    x, y = np.asarray(x), np.asarray(y)
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes()


def _relative(change: Any, size: Any) -> float:
    """‖change‖ / ‖size‖, where the arrays hold entries or norms."""
    change, size = (float(np.linalg.norm(np.ravel(z))) for z in (change, size))
    if size == 0:
        return 0.0 if change == 0 else math.inf
    return change / size
