"""Primitives that move or scale a weight: the factors follow it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _compat
from ._delta import Delta
from ._factor import BROADCAST, Along, Dims, Factor, Unfactorable
from ._interpret import rule
from ._weight import Weight, placed, value_of

# ---------------------------------------------------------------- element for element, as it is


@rule(
    "copy",
    "copy_p",
    "device_put",
    "name",
    "optimization_barrier",
    "sharding_constraint",
)
def _same(eqn: Any, *operands: Any) -> Any:
    outs = _compat.bind(eqn, *(value_of(x) for x in operands))
    outs = [
        x.with_terms(o) if isinstance(x, Weight) else o for x, o in zip(operands, outs, strict=True)
    ]
    return outs if eqn.primitive.multiple_results else outs[0]


@rule("reshard")
def _reshard(eqn: Any, w: Weight) -> Weight:
    # A and B stay where they are, unless W goes to a mesh on which other axes are explicit.
    out = _compat.bind_one(eqn, w.value)
    old, new = jax.typeof(w.value).sharding, eqn.params["dst_sharding"]
    if old.mesh.axis_types == new.mesh.axis_types:
        return w.with_terms(out)
    return w.with_terms(out, lambda t: placed(t, new.mesh, new.spec))


@rule("convert_element_type")
def _convert_element_type(eqn: Any, w: Weight) -> Weight:
    # A and B keep their dtype until the product, which takes that of its operands.
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise Unfactorable(f"it is converted to {eqn.params['new_dtype']}")
    return w.with_terms(_compat.bind_one(eqn, w.value))


@rule("stop_gradient", "pvary", "pcast")
def _map(eqn: Any, w: Weight) -> Weight:
    def bind(x: jax.Array) -> jax.Array:
        return _compat.bind_one(eqn, x)

    return w.with_terms(bind(w.value), lambda t: t.map(bind))


@rule("neg")
def _neg(eqn: Any, w: Weight) -> Weight:
    return w.with_terms(_compat.bind_one(eqn, w.value), lambda t: t.scale_by(jnp.asarray(-1)))


@rule("mul")
def _mul(eqn: Any, x: Any, y: Any) -> Weight:
    w, scalar = (x, _scalar(y)) if isinstance(x, Weight) else (y, _scalar(x))
    out = _compat.bind_one(eqn, value_of(x), value_of(y))
    return w.with_terms(out, lambda t: t.scale_by(scalar))


@rule("div")
def _div(eqn: Any, x: Any, y: Any) -> Weight:
    if not isinstance(x, Weight):
        raise Unfactorable("the weight divides")
    scale = 1 / _scalar(y)
    out = _compat.bind_one(eqn, x.value, y)
    return x.with_terms(out, lambda t: t.scale_by(scale))


def _scalar(x: Any) -> jax.Array:
    if isinstance(x, Weight) or jnp.size(x) != 1:
        raise Unfactorable("it is scaled by more than a scalar")
    return jnp.reshape(x, ())


# --------------------------------------------------------------------------------- axes move


@rule("transpose")
def _transpose(eqn: Any, w: Weight) -> Weight:
    return w.move(_compat.bind_one(eqn, w.value), eqn.params["permutation"])


@rule("squeeze")
def _squeeze(eqn: Any, w: Weight) -> Weight:
    lost = {d % len(w.shape) for d in eqn.params["dimensions"]}
    return w.move(_compat.bind_one(eqn, w.value), [d for d in range(len(w.shape)) if d not in lost])


@rule("broadcast_in_dim")
def _broadcast_in_dim(eqn: Any, w: Weight, *dynamic: Any) -> Weight:
    if dynamic:
        raise Unfactorable("its new shape is dynamic")
    places = {new: old for old, new in enumerate(eqn.params["broadcast_dimensions"])}
    dims: list[int | None] = []
    for new, length in enumerate(eqn.params["shape"]):
        old = places.get(new)
        kept = old is not None and w.shape[old] == length
        dims.append(old if kept else None if length == 1 else BROADCAST)
    return w.move(_compat.bind_one(eqn, w.value), dims)


@rule("reshape")
def _reshape(eqn: Any, w: Weight, *dynamic: Any) -> Weight:
    if dynamic or eqn.params["dimensions"] is not None:
        raise Unfactorable("the reshape is dynamic or permuted")
    new = tuple(eqn.params["new_sizes"])
    return w.with_terms(_compat.bind_one(eqn, w.value), lambda t: t.reshape(w.shape, new))


@rule("rev")
def _rev(eqn: Any, w: Weight) -> Weight:
    flip = {d: lambda x, axis: lax.rev(x, (axis,)) for d in eqn.params["dimensions"]}
    return w.move(_compat.bind_one(eqn, w.value), range(len(w.shape)), flip)


@rule("slice")
def _slice(eqn: Any, w: Weight) -> Weight:
    p = eqn.params
    strides = p["strides"] or (1,) * len(w.shape)
    bounds = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    along = {
        d: functools.partial(_slice_in_dim, bound)
        for d, bound in enumerate(bounds)
        if bound != (0, w.shape[d], 1)
    }
    return w.move(_compat.bind_one(eqn, w.value), range(len(w.shape)), along)


def _slice_in_dim(bound: tuple[int, int, int], x: jax.Array, axis: int) -> jax.Array:
    return lax.slice_in_dim(x, *bound, axis=axis)


@rule("dynamic_slice")
def _dynamic_slice(eqn: Any, w: Weight, *starts: jax.Array) -> Weight:
    def along(start: jax.Array, size: int) -> Callable[[jax.Array, int], jax.Array]:
        return lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)

    sizes = eqn.params["slice_sizes"]
    cut = {
        d: along(start, size)
        for d, (start, size) in enumerate(zip(starts, sizes, strict=True))
        if size != w.shape[d]
    }
    picked = [d for d in cut if sizes[d] == 1]
    w = w.move(_compat.bind_one(eqn, w.value, *starts), range(len(w.shape)), cut)
    return w.with_terms(w.value, lambda t: t.indexed(picked)) if picked else w


@rule("split")
def _split(eqn: Any, w: Weight) -> list[Weight]:
    outs, start, axis = [], 0, eqn.params["axis"]
    values = _compat.bind(eqn, w.value)
    for value, size in zip(values, eqn.params["sizes"], strict=True):
        cut: Along = {axis: functools.partial(_slice_in_dim, (start, start + int(size), 1))}
        outs.append(w.move(value, range(len(w.shape)), cut))
        start += int(size)
    return outs


@rule("unstack")
def _unstack(eqn: Any, w: Weight) -> list[Weight]:
    axis = eqn.params["axis"]
    dims = [d for d in range(len(w.shape)) if d != axis]
    return [
        w.move(value, dims, {axis: functools.partial(_slice_in_dim, (i, i + 1, 1))})
        for i, value in enumerate(_compat.bind(eqn, w.value))
    ]


@rule("pad")
def _pad(eqn: Any, w: Weight, fill: Any) -> Weight:
    if isinstance(fill, Weight):
        raise Unfactorable("the weight is a padding value")
    config = eqn.params["padding_config"]
    return w.with_terms(_compat.bind_one(eqn, w.value, fill), lambda t: t.pad(config, w.shape))


@rule("concatenate")
def _concatenate(eqn: Any, *parts: Any) -> Weight:
    return _join(_compat.bind_one(eqn, *map(value_of, parts)), parts, eqn.params["dimension"])


@rule("stack")
def _stack(eqn: Any, *parts: Any) -> Weight:
    axis, rank = eqn.params["axis"], jnp.ndim(value_of(parts[0]))
    dims: Dims = [*range(axis), None, *range(axis, rank)]

    def expand(x: Any) -> Any:
        value = jnp.expand_dims(value_of(x), axis)
        return x.move(value, dims) if isinstance(x, Weight) else value

    return _join(_compat.bind_one(eqn, *map(value_of, parts)), [expand(x) for x in parts], axis)


def _join(value: Any, parts: Sequence[Any], dim: int) -> Weight:
    weights = [p for p in parts if isinstance(p, Weight)]
    if len(weights) < len(parts) and any(t.whole for w in weights for t in w.terms):
        raise Unfactorable("it is joined with an activation")
    joined = Weight(
        value,
        (),
        " + ".join(dict.fromkeys(w.path for w in weights)),
        all(w.materialize for w in weights),
    )
    together = _join_alike(parts, dim)
    if together is not None:
        return dataclasses.replace(joined, terms=together)
    start, total, terms = 0, value.shape[dim], []
    for part in parts:
        size = value_of(part).shape[dim]
        if isinstance(part, Weight):
            config = [(0, 0, 0)] * value.ndim
            config[dim] = (start, total - start - size, 0)
            terms += [t.pad(config, part.shape) for t in part.terms]
        start += size
    return dataclasses.replace(joined, terms=tuple(terms))


def _join_alike(parts: Sequence[Any], dim: int) -> tuple[Delta, ...] | None:
    """A joined with A and B with B, where `dim` counts independent matrices of one form."""
    if not all(isinstance(p, Weight) and len(p.terms) == 1 for p in parts):
        return None
    terms = [p.terms[0] for p in parts]
    if not all(isinstance(t, Delta) for t in terms):
        return None
    first, *others = terms
    if any(t.form() != first.form() for t in others) or (dim in first.a.dims) != (
        dim in first.b.dims
    ):
        return None
    lengths = [p.shape[dim] for p in parts]
    factors = [
        t.map_factors(lambda f, n=n: f.carry(dim, n)) for t, n in zip(terms, lengths, strict=True)
    ]
    return (jax.tree.map(_concatenate_factors(dim), *factors, is_leaf=_is_factor),)


def _is_factor(x: Any) -> bool:
    return isinstance(x, Factor)


def _concatenate_factors(dim: int) -> Callable[..., Factor]:
    def join(*factors: Factor) -> Factor:
        axis = factors[0].axis(dim)
        return Factor(jnp.concatenate([f.value for f in factors], axis), factors[0].dims)

    return join


@rule("all_gather")
def _all_gather(eqn: Any, w: Weight) -> Weight:
    p = eqn.params
    if not p["tiled"] or p["axis_index_groups"] is not None:
        raise Unfactorable("it is gathered along a new axis or in groups")

    def gather(x: jax.Array, axis: int) -> jax.Array:
        return lax.all_gather(x, p["axis_name"], axis=axis, tiled=True)

    dim = p["all_gather_dimension"]
    return w.move(_compat.bind_one(eqn, w.value), range(len(w.shape)), {dim: gather})
