"""`jlora combine`: several PEFT adapters to one."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import jlora

from .._adapters import LowRank, is_node
from .._errors import shorten, show
from .._folders import check_vacant
from .._tree import count
from ..peft import Contents
from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import IGNORE, PREFIX

BASES = ("base_model_name_or_path", "revision")
KEPT = ("auto_mapping", "fan_in_fan_out", "lora_dropout", "task_type")  # if all have the same
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
    try:
        numbers = [float(x) for x in weights.split(",")] if weights else [1.0] * len(adapters)
    except ValueError:
        raise ValueError(f"--weights must be numbers such as 0.5,0.5; got {weights!r}.") from None
    if density is not None and method == "add":
        raise ValueError("--density is for --method ties and dare; got --method add.")
    options = {} if density is None else {"density": density}
    options |= {"key": jax.random.key(0)} if method == "dare" else {}

    each = [call(jlora.peft.read, x, **reading) for x in adapters]
    if wrong := dict.fromkeys(_find_contradictions(each)):
        raise ValueError(
            f"ADAPTERS cannot be combined without their model: {'; '.join(wrong)}. Load them "
            "onto it with jlora.peft.load, and give it to jlora.arithmetic too, as `base`."
        )
    trees = Arg("ADAPTERS", None, [_widen(own.leaves) for own in each])
    found = call(getattr(jlora.arithmetic, method), trees, numbers, **options)
    found = found if rank is None else jlora.arithmetic.truncate(found, rank)
    tied = {key: head for x in each for key, head in x.tied.items()}
    frozen = {name: x for own in each for name, x in own.frozen.items()}
    made = Contents(found, _describe([x.config for x in each]), tied, frozen)
    call(jlora.peft.write, out, Arg("ADAPTERS", None, made))
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


def _find_contradictions(each: Sequence[Contents]) -> Iterator[str]:
    """Yields what the sum would depend on: other models, weights, ties or parameters."""
    known: dict[str, Any] = {}
    for own in each:
        for name, x in _facts(own).items():
            if not np.array_equal(x, known.setdefault(name, x)):
                yield f"{show(name)} is not the same in all{_show_both(known[name], x)}"
        if others := [name for name, x in own.leaves.items() if type(x) is not LowRank]:
            yield f"the change of {show(others[0])} is not s·A·B alone"
        stacked = (name for name, x in own.leaves.items() if is_node(x) and x.layout.stack)
        found = collections.Counter(name.rpartition(".")[0] for name in stacked)
        if several := [module for module, count in found.items() if count > 1]:
            yield f"the files do not distinguish the parameters of experts in {show(several[0])}"


def _show_both(one: object, other: object) -> str:
    """Shows two values of configurations; nothing of arrays."""
    return "" if isinstance(one, np.ndarray) else f": {shorten(one)} and {shorten(other)}"


def _facts(own: Contents) -> dict[str, Any]:
    """Returns by name what must be equal in all adapters that have it."""
    named = {key: own.config[key] for key in BASES if own.config.get(key) is not None}
    ties = {name: own.tied.get(name) for name in own.leaves}
    ties |= {head: name for name, head in own.tied.items()}
    return named | dict(own.frozen) | {f"what {name} is tied to": x for name, x in ties.items()}


def _describe(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what all configurations say; `write` lists the modules."""
    first = each[0]
    fields = {k: first[k] for k in KEPT if all(x.get(k, KEPT) == first.get(k) for x in each)}
    return fields | {key: x[key] for x in reversed(each) for key in BASES if x.get(key)}


def _widen(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Converts to float32 at least, so that sums are not rounded to 16 bits."""
    wide = lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    return jax.tree.map(wide, dict(leaves))
