"""Primitives that move, scale or reshard a weight; its factors follow."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import _compat
from .._arrays import promote
from ._axes import REPEATED, Axis, Factor, Unfactorable, map_factors
from ._change import Change, Delta
from ._interpret import Equation, primitive
from ._packed import Packed
from ._shards import constrain, move, pieces, place
from ._weight import Operand, Weight

# --------------------------------------------------------------------------- element for element


@primitive("convert_element_type")
def _convert_element_type(eqn: Equation, w: Weight) -> Weight:
    # A and B keep their dtype until the product, which casts them.
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise Unfactorable(f"it is converted to {eqn.params['new_dtype']}")
    return w.each(eqn.bind)


@primitive("neg", "mul", "div")
def _scale(eqn: Equation, x: Operand, y: Operand | int = -1) -> Weight:
    w, other = (x, y) if isinstance(x, Weight) else (y, x)
    assert isinstance(w, Weight)
    if eqn.name == "div" and w is y:
        raise Unfactorable("the weight divides")
    if isinstance(other, Weight) or jnp.size(other) != 1:
        raise Unfactorable("it is scaled by more than a scalar")
    scalar = jnp.reshape(other, ())
    # In float32 at least: float16 may not hold the reciprocal, nor the dtype of B the scalar.
    scalar = scalar.astype(promote(scalar.dtype, jnp.float32))
    scalar = 1 / scalar if eqn.name == "div" else scalar
    unchecked = frozenset[Any]()
    if not _compat.is_concrete(other):
        # It may need a derivative, and a product with a packed weight has none for it.
        unchecked = w.origin.unchecked
        w = w.replace(Factor(w.array, w.axes))

    def delta(d: Delta) -> Delta:
        dtype = promote(d.b.dtype, scalar.dtype)
        b = d.b.each(lambda b: b.astype(dtype) * scalar.astype(dtype))
        return dataclasses.replace(d, b=b.may_vary(unchecked))

    def scale(value: jax.Array) -> jax.Array:
        return eqn.bind(*(value if isinstance(v, Weight) else v for v in eqn.operands))

    change = dataclasses.replace(w.change, deltas=tuple(map(delta, w.change.deltas)))
    return w.replace(w.w.each(scale), change)


@primitive("add", "add_any", "sub")
def _add(eqn: Equation, x: Operand, y: Operand) -> Weight:
    raise Unfactorable(added=True)


# --------------------------------------------------------------------------------- axes move


@primitive("transpose")
def _transpose(eqn: Equation, w: Weight) -> Weight:
    return w.transpose([w.axes[i] for i in eqn.params["permutation"]])


@primitive("squeeze")
def _squeeze(eqn: Equation, w: Weight) -> Weight:
    lost = {d % len(w.shape) for d in eqn.params["dimensions"]}
    return w.transpose([a for d, a in enumerate(w.axes) if d not in lost])


@primitive("broadcast_in_dim")
def _broadcast_in_dim(eqn: Equation, w: Weight) -> Weight:
    p = eqn.params
    old_axis = dict(zip(p["broadcast_dimensions"], range(len(w.shape)), strict=True))
    names = w.new_names()
    axes = []
    for new, length in enumerate(p["shape"]):
        old = old_axis.get(new)
        if old is not None and w.shape[old] == length:
            axes.append(w.axes[old])
        else:
            axes.append(Axis(next(names), frozenset({REPEATED} if length > 1 else ())))
    return w.transpose(axes, p["shape"], p["sharding"])


@primitive("tile")
def _tile(eqn: Equation, w: Weight) -> Weight:
    names = w.new_names()
    axes, shape = [], []
    for axis, length, repeats in zip(w.axes, w.shape, eqn.params["reps"], strict=True):
        if repeats != 1:
            axes.append(Axis(next(names), frozenset({REPEATED})))
            shape.append(repeats)
        axes.append(axis)
        shape.append(length)
    return w.transpose(axes, shape).reshape(eqn.outputs[0].shape)


@primitive("reshape")
def _reshape(eqn: Equation, w: Weight) -> Weight:
    p = eqn.params
    if p["dimensions"] is not None:
        raise Unfactorable("the reshape is permuted")
    return w.reshape(p["new_sizes"], p["sharding"])


@primitive("rev")
def _rev(eqn: Equation, w: Weight) -> Weight:
    return w.along({w.axes[d]: lambda x, i: lax.rev(x, (i,)) for d in eqn.params["dimensions"]})


@primitive("slice")
def _slice(eqn: Equation, w: Weight) -> Weight:
    p = eqn.params
    strides = p["strides"] or (1,) * len(w.shape)
    cuts = zip(w.axes, w.shape, p["start_indices"], p["limit_indices"], strides, strict=True)
    return w.along({a: _cut(*cut) for a, n, *cut in cuts if tuple(cut) != (0, n, 1)})


def _cut(start: int, stop: int, stride: int = 1) -> Callable[[jax.Array, int], jax.Array]:
    return lambda x, i: lax.slice_in_dim(x, start, stop, stride, i)


@primitive("dynamic_slice")
def _dynamic_slice(eqn: Equation, w: Weight, *starts: jax.Array) -> Weight:
    def along(start: jax.Array, size: int) -> Callable[[jax.Array, int], jax.Array]:
        # The primitive has no negative indices: JAX has converted them before.
        return lambda x, i: lax.dynamic_slice_in_dim(
            x, start, size, i, allow_negative_indices=False
        )

    sizes = zip(w.axes, starts, eqn.params["slice_sizes"], w.shape, strict=True)
    cut = {axis: (start, size) for axis, start, size, length in sizes if size != length}
    functions = {a: along(*c) for a, c in cut.items()}
    # Moves with traced starts cannot be remembered until W is unpacked.
    w = w.replace(w.w.with_pieces({a: w.lengths[a] for a in cut}))
    sliced = map_factors(lambda f: f.along(functions), w)
    sliced = sliced.replace(sliced.w.with_axes(w.axes, eqn.outputs[0].shape))
    if not all(_compat.is_concrete(start) for start, _ in cut.values()):
        sliced = sliced.mark_varying()
    return sliced.mark_picked([a for a, (_, size) in cut.items() if size == 1])


@primitive("split")
def _split(eqn: Equation, w: Weight) -> list[Weight]:
    axis = w.axes[eqn.params["axis"]]
    sizes = list(map(int, eqn.params["sizes"]))
    ends = itertools.accumulate(sizes)
    return [w.along({axis: _cut(end - n, end)}) for n, end in zip(sizes, ends, strict=True)]


@primitive("unstack")
def _unstack(eqn: Equation, w: Weight) -> list[Weight]:
    axis = w.axes[eqn.params["axis"]]
    rest = [a for a in w.axes if a != axis]
    return [w.along({axis: _cut(i, i + 1)}).transpose(rest) for i in range(w.lengths[axis])]


# ---------------------------------------------------------------------- how it is sharded


@primitive("copy", "name")
def _same(eqn: Equation, w: Weight) -> Weight:
    return w if isinstance(w.w, Packed) else w.each(eqn.bind)


@primitive("device_put")
def _device_put(eqn: Equation, *operands: Operand) -> list[Operand]:
    return list(map(move, operands, eqn.params["devices"]))


@primitive("optimization_barrier")
def _optimization_barrier(eqn: Equation, *operands: Operand) -> list[Operand]:
    return list(lax.optimization_barrier(operands))


@primitive("stop_gradient", "pvary")
def _stop_gradient(eqn: Equation, w: Weight) -> Weight:
    # Not the dropout key: because it does not vary, each shard derives its own mask from it.
    return map_factors(lambda f: f if f.is_key else f.each(eqn.bind), w)


@primitive("sharding_constraint")
def _sharding_constraint(eqn: Equation, w: Weight) -> Operand:
    return constrain(w, eqn.params["sharding"]) if isinstance(w.w, Packed) else w.each(eqn.bind)


@primitive("reshard")
def _reshard(eqn: Equation, w: Weight) -> Weight:
    old, new = w.type.sharding, eqn.params["dst_sharding"]
    # A and B keep their shardings, unless other axes are explicit on the new mesh.
    stays = old is not None and old.mesh.axis_types == new.mesh.axis_types
    base = w.w.with_pieces(pieces(w, new.spec, new.mesh))
    placed = place(w.replace(base, Change() if stays else None), new.mesh, new.spec)
    return w.replace(placed.w, w.change if stays else placed.change)


@primitive("all_gather", "all_gather_invariant")
def _all_gather(eqn: Equation, w: Weight) -> Weight:
    p = eqn.params
    if not p["tiled"] or p.get("axis_index_groups") is not None:
        raise Unfactorable("it is gathered along a new axis or in groups of devices")
    gathered = w.axes[p["all_gather_dimension"]]
    to = "varying" if eqn.name == "all_gather" else "invarying"
    over = {p["axis_name"]} if isinstance(p["axis_name"], str) else set(p["axis_name"])

    def gather(f: Factor) -> Factor:
        if gathered in f.axes:
            return f.along({gathered: gather_along})
        if over & (f.varying | _compat.varying(f.value)):
            raise Unfactorable(
                "A or B lacks the gathered axis but may vary over the mesh axis of the gather; "
                "shard_map(check_vma=True) would tell whether it varies"
            )
        return f

    def gather_along(x: jax.Array, i: int) -> jax.Array:
        return lax.all_gather(x, p["axis_name"], axis=i, tiled=True, to=to)

    out = map_factors(gather, w.replace(w.w.with_pieces({gathered: 1})))
    return out.replace(out.w.with_axes(w.axes, eqn.outputs[0].shape))
