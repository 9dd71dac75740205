"""`jlora diff`: where two adapters differ, and by how much."""

import math
from collections.abc import Mapping
from typing import Any

import click
import jax
import numpy as np
from jax.typing import ArrayLike

import jlora

from .._adapters import AdapterLeaf, Decomposed, LowRank, Replaced, is_node, state, weight_shape
from .._node import static
from .._progress import progress
from .._text import align_columns
from ..analysis._measure import relative, relative_distance
from ..peft._recognized import find_image
from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import IGNORE, NAMES, PREFIX, OpenAdapter, by_name, format_of, open_adapter, table


@click.command(cls=Command)
@click.argument("a", type=FOLDER)
@click.argument("b", type=FOLDER)
@click.option("--names", metavar="TABLE", help=NAMES + " Needed if A and B differ in format.")
@click.option(
    "--tolerance",
    type=float,
    help="Treat sites as equal if ‖ΔW_A - ΔW_B‖ / ‖ΔW_A‖ is at most this, even if their ranks "
    "differ.",
)
@PREFIX
@IGNORE
def diff(a: Arg, b: Arg, names: str | None, tolerance: float | None, **options: Any) -> Answer:
    """Compare two adapters, A and B.

    Shows ‖ΔW_A - ΔW_B‖ / ‖ΔW_A‖ for each site that differs, and what differs. The exit code is 0 if
    they are bit for bit equal, or equal within --tolerance, and otherwise 1.
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"--tolerance must be a number of at least 0; got {tolerance}.")
    ours, theirs = _open_alike(a, b, names, **options)
    common = [name for name in ours.leaves if name in theirs.leaves]
    bar = progress(common, "sites", leave=False)
    compared: list[dict[str, Any]] = [
        {"name": x} | _compare(ours.leaves[x], theirs.leaves[x]) for x in bar
    ]
    only_a = [name for name in ours.leaves if name not in theirs.leaves]
    only_b = [name for name in theirs.leaves if name not in ours.leaves]
    unequal = [x for x in compared if not x["equal"]]
    relative = [math.nan if x["relative"] is None else x["relative"] for x in unequal]
    within = tolerance is not None and all(x <= tolerance for x in relative)
    equal = not (only_a or only_b) and (within or not unequal)
    rows = [
        (x["name"], "-" if x["relative"] is None else f"{r:.3g}", "; ".join(x["changes"]))
        for x, r in zip(unequal, relative, strict=True)
    ]
    lines = align_columns(("site", "relative", "differs"), rows, {"relative"}) if rows else []
    lines += [f"only in {a}: {name}" for name in only_a]
    lines += [f"only in {b}: {name}" for name in only_b]
    lines.append(f"{len(common) - len(unequal)} of {len(common)} common sites are equal")
    fields = {
        "a": {"path": str(a), "format": ours.format},
        "b": {"path": str(b), "format": theirs.format},
        "equal": equal,
        "tolerance": tolerance,
        "only_a": only_a,
        "only_b": only_b,
        "sites": compared,
    }
    return Answer("\n".join(lines), fields, int(not equal))


def _open_alike(
    a: Arg, b: Arg, names: str | None, ignore: tuple[str, ...], prefix: str | None
) -> list[OpenAdapter]:
    """Opens two adapters with the same names. A PEFT adapter gets those of the Orbax adapter."""
    formats = {format_of(x): x for x in (a, b)}
    if formats.keys() != {"peft", "orbax"}:
        images = [x for x in (a, b) if find_image(x.value)] or [a, b]
        return [open_adapter(x, ignore, prefix if x in images else None) for x in (a, b)]
    orbax = formats["orbax"]
    shapes = call(jlora.checkpoint.base_shapes, orbax)
    base = Arg(f"the base of {orbax.what}", orbax.path, shapes)
    options = {"ignore": ignore, "prefix": prefix}
    tree = call(jlora.peft.load, formats["peft"], base, table(names), **options)
    ours = open_adapter(orbax, ignore)
    theirs = OpenAdapter("peft", by_name(tree), {})
    return [ours if x is orbax else theirs for x in (a, b)]


# --------------------------------------------------------------------------------------- two leaves


def _compare(x: Any, y: Any) -> dict[str, Any]:
    """Compares two leaves: whether all bits are equal, how much ΔW differs, and what differs."""
    if type(x) is not type(y) and (is_node(x) or is_node(y)):
        return {"equal": False, "relative": None, "changes": [f"{_kind(x)} → {_kind(y)}"]}
    if isinstance(x, Replaced):
        if (x.rows, x.layout) != (y.rows, y.layout):
            return {"equal": False, "relative": None, "changes": ["rows"]}
        x, y = x.v, y.v
    facts, theirs = _facts(x), _facts(y)
    changes = {what: f"{what} {p} → {theirs[what]}" for what, p in facts.items()}
    changes = {what: text for what, text in changes.items() if facts[what] != theirs[what]}
    values = zip(_arrays(x).items(), _arrays(y).values(), strict=True)
    changes |= {what: what for (what, p), q in values if not _has_same_bits(p, q)}
    relative = _relative(x, y, changes)
    return {"equal": not changes, "relative": relative, "changes": [*changes.values()]}


def _kind(x: AdapterLeaf) -> str:
    names = {LowRank: "low rank", Decomposed: "DoRA", Replaced: "rows"}
    return names.get(type(x), type(x).__name__) if is_node(x) else "in full"


def _facts(x: LowRank | Decomposed | jax.Array) -> dict[str, Any]:
    """Returns the properties that are compared besides the values."""
    if not isinstance(x, LowRank | Decomposed):
        return {"shape": x.shape, "dtype": str(x.dtype)}
    others = {n: value for n, value in static(x).items() if n not in ("layout", "materialize")}
    own = {"weight": weight_shape(x), "axes": x.layout, "rank": x.a.shape[-1]}
    return own | others | {"dtype": str(x.a.dtype)}


def _arrays(x: AdapterLeaf) -> dict[str, Any]:
    if not is_node(x):
        return {"values": x}
    return {{"a": "A", "b": "B"}.get(name, name): value for name, value in state(x).items()}


def _has_same_bits(x: ArrayLike, y: ArrayLike) -> bool:
    x, y = np.asarray(x), np.asarray(y)
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.tobytes() == y.tobytes()


def _relative(x: Any, y: Any, changes: Mapping[str, str]) -> float | None:
    """Computes ‖ΔW_x - ΔW_y‖ / ‖ΔW_x‖ over all matrices; None if it is not known.

    For DoRA it is known only if nothing differs, because W' depends on W.
    """
    if isinstance(x, Decomposed):
        return None if changes else 0.0
    if isinstance(x, LowRank):
        if {"weight", "residual"} & changes.keys() or x.layout[:3] != y.layout[:3]:
            return None  # for two weights or two bases
        return 0.0 if changes.keys() <= {"dropout", "frozen"} else relative_distance(x, y)
    if "shape" in changes:
        return None
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return relative(float(np.linalg.norm(x - y)), float(np.linalg.norm(x)))
