"""`jlora combine`: adapters of PEFT or of Orbax to one of the same."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import arithmetic, checkpoint, peft
from .._adapters import is_node
from .._folders import check_vacant
from .._tree import adapter_leaves, count, name_of
from .._types import PyTree
from ._command import Answer
from ._inputs import format_of
from ._words import called


def _dare(adapters: list[PyTree], weights: list[float], *, seed: int = 0, **options: Any) -> PyTree:
    return arithmetic.dare(adapters, weights, key=jax.random.key(seed), **options)


# What each method is, and which options it has.
METHODS: dict[str, tuple[Callable[..., PyTree], set[str]]] = {
    "add": (arithmetic.add, set()),
    "ties": (arithmetic.ties, {"density"}),
    "dare": (_dare, {"density", "seed"}),
}


def combine(
    adapters: Sequence[Path],
    out: Path,
    *,
    weights: str | None = None,
    method: str = "add",
    rank: int | None = None,
    energy: float | None = None,
    **options: Any,
) -> Answer:
    """Writes what `method` makes of `adapters` to `out`.

    Args:
        adapters: folders of PEFT, or of Orbax.
        out: a folder that is not there yet, or an empty one.
        weights: numbers, as the user types them.
        method: one of `METHODS`.
        rank: the rank to cut to.
        energy: instead, the share of the sum of squares to keep.
        options: those of the methods; None where the user gave none.
    """
    check_vacant(out, "OUT")
    kind = _format(adapters)
    w = _numbers(weights, len(adapters))
    function, cut = _method(method, options), _cut(rank, energy)
    write = _combine_peft if kind == "peft" else _combine_orbax
    found = write(adapters, out, lambda trees: cut(function(_wide(trees), w)))
    ranks = sorted({x.a.shape[-1] for x in adapter_leaves(found).values()})
    fields = {
        "adapters": [str(folder) for folder in adapters],
        "out": str(out),
        "format": kind,
        "method": method,
        "weights": w,
        "sites": len(adapter_leaves(found)),
        "ranks": ranks,
        "parameters": count(found),
    }
    shown = "–".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1])))
    text = f"{out}: {len(adapters)} adapters by {method}, {fields['sites']} sites of rank {shown}"
    return Answer(f"{text}, {fields['parameters']:,} parameters, as {kind}", fields)


def _combine_peft(
    adapters: Sequence[Path], out: Path, made: Callable[[list[PyTree]], PyTree]
) -> PyTree:
    each: Any = {f"paths[{i}]": ("ADAPTERS", folder) for i, folder in enumerate(adapters)}
    with called(paths=("ADAPTERS", None), out=("OUT", out), **each):
        return peft.combine(adapters, out, made)


def _combine_orbax(
    adapters: Sequence[Path], out: Path, made: Callable[[list[PyTree]], PyTree]
) -> PyTree:
    """Of one base, as far as they know theirs."""
    bases = [(folder, _read(folder).base) for folder in adapters]
    first, base = next((pair for pair in bases if pair[1] is not None), (None, None))
    trees = []
    for folder, own in bases:
        with called(base=(f"the base of {first}", None), path=("ADAPTERS", folder)):
            trees.append(checkpoint.restore(folder, base=own and base))
    for folder, tree in zip(adapters, trees, strict=True):
        if full := [name_of(p) for p, x in adapter_leaves(tree).items() if not is_node(x)]:
            raise ValueError(
                f"ADAPTERS: {folder} has leaves that are trained in full, whose change is known "
                f"from the base alone: {', '.join(full)}. Combine them by jlora.arithmetic, whose "
                "functions take `base`."
            )
    found = made(trees)
    with called(path=("OUT", out)):
        checkpoint.save(out, found, (), base=base)
    return found


def _read(folder: Path) -> Any:
    with called(path=("ADAPTERS", folder)):
        return checkpoint.read(folder)


def _wide(trees: PyTree) -> PyTree:
    """In float32 at least, so that sums are not rounded to 16 bits."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32)), trees)


# ---------------------------------------------------------------------------------- what is asked


def _format(adapters: Sequence[Path]) -> str:
    formats = {folder: format_of(folder, "ADAPTERS") for folder in adapters}
    if "huggingface" in formats.values() or len(set(formats.values())) > 1:
        listed = ", ".join(f"{folder} ({kind})" for folder, kind in formats.items())
        raise ValueError(
            f"ADAPTERS must be adapters of one format; got {listed}. `jlora convert` writes an "
            "adapter of PEFT as one of Orbax, and back."
        )
    return formats[adapters[0]]


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


def _method(name: str, options: dict[str, Any]) -> Callable[..., PyTree]:
    function, known = METHODS[name]
    given = {key: value for key, value in options.items() if value is not None}
    if wrong := sorted(given.keys() - known):
        others = " and ".join(n for n, (_, own) in METHODS.items() if wrong[0] in own)
        raise ValueError(f"--{wrong[0]} is for --method {others}; got --method {name}.")
    return functools.partial(function, **given)


def _cut(rank: int | None, energy: float | None) -> Callable[[PyTree], PyTree]:
    if rank is not None and energy is not None:
        raise ValueError("--rank and --energy both say where to cut; give one of them.")
    if rank is None and energy is None:
        return lambda adapter: adapter
    return functools.partial(arithmetic.truncate, rank=rank, energy=energy)
