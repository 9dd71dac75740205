"""`jlora combine`: several adapters to one, in PEFT's format or Orbax."""

from collections.abc import Callable
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import jlora

from .._adapters import is_node
from .._folders import check_vacant
from .._tree import count
from .._types import PyTree
from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import IGNORE, by_name, format_of_adapter

# The options of each method.
METHODS = {"add": (), "ties": ("density",), "dare": ("density", "seed")}
SHARE = click.FloatRange(0, 1, min_open=True)
Merge = Callable[[list[PyTree]], PyTree]


@click.command(cls=Command)
@click.argument("adapters", type=FOLDER, nargs=-1, required=True)
@click.argument("out", type=FOLDER)
@click.option("--weights", metavar="W,W,…", help="A weight for each adapter; 1 by default.")
@click.option(
    "--method",
    type=click.Choice([*METHODS]),
    default="add",
    show_default=True,
    help="The weighted sum, or a function of jlora.arithmetic.",
)
@click.option(
    "--density",
    type=SHARE,
    help="The share of entries to keep, for ties (0.2 by default) and dare (0.5).",
)
@click.option("--seed", type=click.IntRange(0), help="The seed of dare; 0 by default.")
@click.option("--rank", type=click.IntRange(1), help="Truncate each site to at most this rank.")
@click.option("--energy", type=SHARE, help="Or to the least rank that keeps this share of ‖ΔW‖².")
@IGNORE
def combine(
    adapters: tuple[Arg, ...],
    out: Arg,
    weights: str | None,
    method: str,
    rank: int | None,
    energy: float | None,
    ignore: tuple[str, ...],
    **options: Any,
) -> Answer:
    """Combine several adapters into one.

    Writes the weighted sum of ADAPTERS, or a combination by another method, to OUT, in their
    format, PEFT or Orbax. The model is not needed. The sum is that of the ΔW = s·A·B, not of A and
    B. It is exact, and its rank is the sum of the ranks, unless it is truncated. Values are
    computed and written in float32, or float64 if the adapters are.
    """
    call(check_vacant, out)
    kind = _format(adapters)
    numbers = _numbers(weights, len(adapters))
    options = {name: value for name, value in options.items() if value is not None}
    for name in sorted(options.keys() - METHODS[method]):
        others = " and ".join(other for other, known in METHODS.items() if name in known)
        raise ValueError(f"--{name} is for --method {others}; got --method {method}.")
    if rank is not None and energy is not None:
        raise ValueError("--rank and --energy are alternatives; give one of them.")
    if method == "dare":
        options["key"] = jax.random.key(options.pop("seed", 0))

    def merge(trees: list[PyTree]) -> PyTree:
        found = getattr(jlora.arithmetic, method)(_widen(trees), numbers, **options)
        if rank is None and energy is None:
            return found
        return jlora.arithmetic.truncate(found, rank, energy=energy)

    if kind == "peft":
        each = Arg("ADAPTERS", None, [x.path for x in adapters])
        found = by_name(call(jlora.peft.combine, each, out, merge, ignore=ignore))
    else:
        found = by_name(_combine_orbax(adapters, out, merge))
    ranks = sorted({x.a.shape[-1] for x in found.values()})
    fields = {
        "adapters": [str(x) for x in adapters],
        "out": str(out),
        "format": kind,
        "method": method,
        "weights": numbers,
        "sites": len(found),
        "ranks": ranks,
        "parameters": count(found),
    }
    shown = "–".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
    text = f"{out}: {len(adapters)} adapters by {method}, {len(found)} sites of rank {shown}"
    return Answer(f"{text}, {fields['parameters']:,} parameters, as {kind}", fields)


def _combine_orbax(adapters: tuple[Arg, ...], out: Arg, merge: Merge) -> PyTree:
    """Combines Orbax adapters. All that were saved with a base must have the same base."""
    bases = [call(jlora.checkpoint.read, x).base for x in adapters]
    known = [(x, base) for x, base in zip(adapters, bases, strict=True) if base is not None]
    base = known[0][1] if known else None
    trees = []
    for adapter, own in zip(adapters, bases, strict=True):
        same = own and Arg(f"the base of {known[0][0]}", None, base)
        tree = call(jlora.checkpoint.restore, adapter, base=same)
        if full := [name for name, x in by_name(tree).items() if not is_node(x)]:
            raise ValueError(
                f"ADAPTERS: {adapter} has leaves trained in full, whose change depends on the "
                f"base: {', '.join(full)}. Combine the adapters with jlora.arithmetic, whose "
                "functions accept `base`."
            )
        trees.append(tree)
    found = merge(trees)
    call(jlora.checkpoint.save, out, found, (), base=base)
    return found


def _widen(trees: PyTree) -> PyTree:
    """Converts to float32 at least, so that sums are not rounded to 16 bits."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), trees)


def _format(adapters: tuple[Arg, ...]) -> str:
    formats = {str(x): format_of_adapter(x) for x in adapters}
    kind, *others = set(formats.values())
    if others:
        listed = ", ".join(f"{folder} ({kind})" for folder, kind in formats.items())
        raise ValueError(
            f"ADAPTERS must be adapters in one format; got {listed}. `jlora convert` converts "
            "adapters between PEFT and Orbax."
        )
    return kind


def _numbers(text: str | None, count: int) -> list[float]:
    try:
        found = [1.0] * count if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not np.isfinite(found).all():
        raise ValueError(
            f"--weights: expected a finite number for each of the {count} adapters, such as "
            f"{','.join(['0.5'] * count)}; got {text!r}."
        )
    return found
