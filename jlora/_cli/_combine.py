"""`jlora combine`: several PEFT adapters to one."""

from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import jlora

from .._folders import check_vacant
from .._tree import count
from .._types import PyTree
from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import IGNORE, PREFIX, by_name

SHARE = click.FloatRange(0, 1, min_open=True)


@click.command(cls=Command)
@click.argument("adapters", type=FOLDER, nargs=-1, required=True)
@click.argument("out", type=FOLDER)
@click.option("--weights", metavar="W,W,…", help="A weight for each adapter; 1 by default.")
@click.option(
    "--method",
    type=click.Choice(["add", "ties", "dare"]),
    default="add",
    show_default=True,
    help="The weighted sum, or a function of jlora.arithmetic.",
)
@click.option("--density", type=SHARE, help="The share of entries that ties or dare keeps.")
@click.option("--rank", type=click.IntRange(1), help="Truncate each site to at most this rank.")
@PREFIX
@IGNORE
def combine(
    adapters: tuple[Arg, ...],
    out: Arg,
    weights: str | None,
    method: str,
    density: float | None,
    rank: int | None,
    **reading: Any,
) -> Answer:
    """Combine several PEFT adapters into one.

    Writes the weighted sum of ADAPTERS, or a combination by another method, to OUT. The model is
    not needed. The sum is that of the ΔW = s·A·B, not of A and B. It is exact, and its rank is the
    sum of the ranks, unless it is truncated. Values are computed and written in float32, or float64
    if the adapters are.
    """
    call(check_vacant, out)
    numbers = _numbers(weights, len(adapters))
    if density is not None and method == "add":
        raise ValueError("--density is for --method ties and dare; got --method add.")
    options = {} if density is None else {"density": density}
    options |= {"key": jax.random.key(0)} if method == "dare" else {}

    def merge(trees: list[PyTree]) -> PyTree:
        found = getattr(jlora.arithmetic, method)(_widen(trees), numbers, **options)
        return found if rank is None else jlora.arithmetic.truncate(found, rank)

    each = [x.with_value(call(jlora.peft.read, x, **reading)) for x in adapters]
    made = call(jlora.peft.combine, each, merge)
    call(jlora.peft.write, out, Arg("ADAPTERS", None, made))
    found = by_name(dict(made.leaves))
    ranks = sorted({x.a.shape[-1] for x in found.values()})
    fields = {
        "adapters": [str(x) for x in adapters],
        "out": str(out),
        "method": method,
        "weights": numbers,
        "sites": len(found),
        "ranks": ranks,
        "parameters": count(found),
    }
    shown = "–".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
    text = f"{out}: {len(adapters)} adapters by {method}, {len(found)} sites of rank {shown}"
    return Answer(f"{text}, {fields['parameters']:,} parameters", fields)


def _widen(trees: PyTree) -> PyTree:
    """Converts to float32 at least, so that sums are not rounded to 16 bits."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), trees)


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
