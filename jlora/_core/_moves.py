"""Primitives that move or scale a weight: the factors follow it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import _compat
from ._axes import REPEATED, Axis, Factor, Unfactorable
from ._change import Change, is_factor
from ._interpret import Equation, rule
from ._packed import Packed, mesh_axes
from ._product import promote
from ._weight import Weight, value_of

# ---------------------------------------------------------------- element for element, as it is


@rule("copy", "device_put", "name")
def _same(eqn: Equation, w: Weight) -> Weight:
    return w if isinstance(w.value, Packed) else w.replace(eqn.bind(w.value))


@rule("optimization_barrier")
def _optimization_barrier(eqn: Equation, *operands: Any) -> list[Any]:
    values = [x.value if isinstance(x, Weight) else x for x in operands]
    outs = lax.optimization_barrier(values)
    return [
        x.replace(out) if isinstance(x, Weight) else out
        for x, out in zip(operands, outs, strict=True)
    ]


@rule("sharding_constraint")
def _sharding_constraint(eqn: Equation, w: Weight) -> Weight:
    packed = isinstance(w.value, Packed)
    return w.constrained(eqn.params["sharding"]) if packed else w.replace(eqn.bind(w.value))


@rule("reshard")
def _reshard(eqn: Equation, w: Weight) -> Weight:
    # A and B stay where they are, unless W goes to a mesh on which other axes are explicit.
    old, new = w.type.sharding, eqn.params["dst_sharding"]
    same_axes = old is not None and old.mesh.axis_types == new.mesh.axis_types
    if not isinstance(w.value, Packed):
        w = w if same_axes else w.placed(new.mesh, new.spec)
        return w.replace(eqn.bind(w.value))
    pieces = {
        a: math.prod(new.mesh.shape[n] for n in mesh_axes(e))
        for a, e in zip(w.axes, new.spec, strict=True)
    }
    w = w.sliceable({a: n for a, n in pieces.items() if n > 1})
    if not isinstance(w.value, Packed):
        return _reshard(eqn, w)
    placed = w.placed(new.mesh, new.spec)
    return w.replace(placed.value, w.change if same_axes else placed.change)


@rule("convert_element_type")
def _convert_element_type(eqn: Equation, w: Weight) -> Weight:
    # A and B keep their dtype until the product, which takes that of its operands.
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.inexact):
        raise Unfactorable(f"it is converted to {eqn.params['new_dtype']}")
    dtype = eqn.params["new_dtype"]
    return w.each(eqn.moved(w), lambda x: x.astype(dtype))


@rule("stop_gradient", "pvary")
def _each(eqn: Equation, w: Weight) -> Weight:
    def each(f: Factor) -> Factor:
        # A dropout key stays: where it does not vary, each shard draws a mask of its own.
        return f if f.is_key else f.replace(eqn.bind(f.value))

    packed = isinstance(w.value, Packed)
    value = w.value.map(each) if packed else eqn.bind(w.value)
    return w.replace(value, w.change.map(each))


@rule("neg")
def _neg(eqn: Equation, w: Weight) -> Weight:
    return w.scaled(eqn.moved(w), jnp.asarray(-1), eqn.bind)


@rule("mul")
def _mul(eqn: Equation, x: Any, y: Any) -> Weight:
    w, other = (x, y) if isinstance(x, Weight) else (y, x)
    w, scalar = _scalable(w, other), _scalar(other)
    return w.scaled(eqn.moved(w, other), scalar, lambda x: eqn.bind(x, other))


@rule("div")
def _div(eqn: Equation, x: Any, y: Any) -> Weight:
    if not isinstance(x, Weight):
        raise Unfactorable("the weight divides")
    w, scalar = _scalable(x, y), _scalar(y)
    return w.scaled(eqn.moved(w, y), 1 / scalar, lambda x: eqn.bind(x, y))


def _scalable(w: Weight, scalar: Any) -> Weight:
    """The weight, unpacked where a traced scalar may have a derivative."""
    return w if _compat.is_concrete(scalar) else w.unpacked()


def _scalar(x: Any) -> jax.Array:
    if isinstance(x, Weight) or jnp.size(x) != 1:
        raise Unfactorable("it is scaled by more than a scalar")
    return jnp.reshape(x, ())


@rule("add", "add_any", "sub")
def _add(eqn: Equation, x: Any, y: Any) -> Weight:
    raise Unfactorable(added=True)


# --------------------------------------------------------------------------------- axes move


@rule("transpose")
def _transpose(eqn: Equation, w: Weight) -> Weight:
    return w.moved(eqn.moved(w), [w.axes[i] for i in eqn.params["permutation"]])


@rule("squeeze")
def _squeeze(eqn: Equation, w: Weight) -> Weight:
    lost = {d % len(w.shape) for d in eqn.params["dimensions"]}
    return w.moved(eqn.moved(w), [a for d, a in enumerate(w.axes) if d not in lost])


@rule("broadcast_in_dim")
def _broadcast_in_dim(eqn: Equation, w: Weight, *dynamic: Any) -> Weight:
    if dynamic:
        raise Unfactorable("its new shape is dynamic")
    old_axis = dict(zip(eqn.params["broadcast_dimensions"], range(len(w.shape)), strict=True))
    names, axes = w.new_names(), []
    for new, length in enumerate(eqn.params["shape"]):
        old = old_axis.get(new)
        if old is not None and w.shape[old] == length:
            axes.append(w.axes[old])
        else:
            axes.append(Axis(next(names), frozenset({REPEATED} if length > 1 else ())))
    return w.moved(eqn.moved(w), axes)


@rule("reshape")
def _reshape(eqn: Equation, w: Weight, *dynamic: Any) -> Weight:
    if dynamic or eqn.params["dimensions"] is not None:
        raise Unfactorable("the reshape is dynamic or permuted")
    return w.reshaped(eqn.moved(w))


@rule("rev")
def _rev(eqn: Equation, w: Weight) -> Weight:
    flip = {w.axes[d]: lambda x, i: lax.rev(x, (i,)) for d in eqn.params["dimensions"]}
    return w.along(eqn.moved(w), flip)


@rule("slice")
def _slice(eqn: Equation, w: Weight) -> Weight:
    p = eqn.params
    strides = p["strides"] or (1,) * len(w.shape)
    bounds = zip(w.axes, p["start_indices"], p["limit_indices"], strides, strict=True)
    cut = {axis: tuple(b) for axis, *b in bounds}
    whole = {a: (0, n, 1) for a, n in zip(w.axes, w.shape, strict=True)}
    return w.along(eqn.moved(w), {a: _cut(*bound) for a, bound in cut.items() if bound != whole[a]})


def _cut(start: int, stop: int, stride: int = 1) -> Callable[[jax.Array, int], jax.Array]:
    return lambda x, i: lax.slice_in_dim(x, start, stop, stride, i)


@rule("dynamic_slice")
def _dynamic_slice(eqn: Equation, w: Weight, *starts: jax.Array) -> Weight:
    def along(start: jax.Array, size: int) -> Callable[[jax.Array, int], jax.Array]:
        # The primitive clamps: what the user counts from the end is counted already.
        return lambda x, i: lax.dynamic_slice_in_dim(
            x, start, size, i, allow_negative_indices=False
        )

    sizes = zip(w.axes, starts, eqn.params["slice_sizes"], w.shape, strict=True)
    cut = {axis: (start, size) for axis, start, size, length in sizes if size != length}
    if isinstance(w.value, Packed) and not w.value.free.issuperset(cut):
        w = w.unpacked()
    moved = w.along(eqn.moved(w, *starts), {a: along(*c) for a, c in cut.items()})
    if not all(_compat.is_concrete(start) for start, _ in cut.values()):
        moved = moved.unsteady()
    return moved.with_picked([a for a, (_, size) in cut.items() if size == 1])


@rule("split")
def _split(eqn: Equation, w: Weight) -> list[Weight]:
    outs, start, axis = [], 0, w.axes[eqn.params["axis"]]
    for value, size in zip(eqn.moved(w), map(int, eqn.params["sizes"]), strict=True):
        outs.append(w.along(value, {axis: _cut(start, start + size)}))
        start += size
    return outs


@rule("unstack")
def _unstack(eqn: Equation, w: Weight) -> list[Weight]:
    axis = w.axes[eqn.params["axis"]]
    rest = [a for a in w.axes if a != axis]
    return [
        w.along(value, {axis: _cut(i, i + 1)}).moved(value, rest)
        for i, value in enumerate(eqn.moved(w))
    ]


@rule("pad")
def _pad(eqn: Equation, w: Weight, fill: Any) -> Weight:
    if isinstance(fill, Weight):
        raise Unfactorable("the weight is a padding value")
    return w.padded(eqn.bind(w.array, fill), eqn.params["padding_config"])


@rule("all_gather")
def _all_gather(eqn: Equation, w: Weight) -> Weight:
    p = eqn.params
    if not p["tiled"] or p["axis_index_groups"] is not None:
        raise Unfactorable("it is gathered along a new axis or in groups")
    gathered = w.axes[p["all_gather_dimension"]]
    over = {p["axis_name"]} if isinstance(p["axis_name"], str) else set(p["axis_name"])

    def gather(f: Factor) -> Factor:
        if gathered in f.axes:
            return f.along({gathered: gather_along})
        if over & (f.varying | _compat.varying(f.value)):
            raise Unfactorable(
                "A or B may vary over the mesh axis of the gather, but has not the axis that is "
                "gathered; with shard_map(check_vma=True) it is known whether it does"
            )
        return f

    def gather_along(x: jax.Array, i: int) -> jax.Array:
        return lax.all_gather(x, p["axis_name"], axis=i, tiled=True)

    packed = w.value.cut({gathered: 1}) if isinstance(w.value, Packed) else None
    if packed is None:
        return w.replace(eqn.bind(w.array), w.change.map(gather))
    return w.replace(packed.map(gather).like(eqn.outputs[0]), w.change.map(gather))


# ------------------------------------------------------------------------------ weights are joined


@rule("concatenate")
def _concatenate(eqn: Equation, *parts: Any) -> Weight:
    return _join(eqn, parts, eqn.params["dimension"])


@rule("stack")
def _stack(eqn: Equation, *parts: Any) -> Weight:
    axis = eqn.params["axis"]

    def expand(x: Any) -> Any:
        if not isinstance(x, Weight):
            return jnp.expand_dims(x, axis)
        added = Axis(next(x.new_names()))
        shape = (*x.shape[:axis], 1, *x.shape[axis:])
        packed = isinstance(x.value, Packed)
        value = jax.ShapeDtypeStruct(shape, x.dtype) if packed else x.value.reshape(shape)
        return x.moved(value, [*x.axes[:axis], added, *x.axes[axis:]])

    return _join(eqn, [expand(x) for x in parts], axis)


def _join(eqn: Equation, parts: Sequence[Any], dim: int) -> Weight:
    weights = [p for p in parts if isinstance(p, Weight)]
    source, [out] = weights[0].source, eqn.outputs
    if len(weights) < len(parts) and source.uses is not None:
        # With an activation it is one itself; in `apply` the other may be a leaf without a rule.
        raise Unfactorable("it is joined with an activation", added=True)
    axes = tuple(
        Axis(i, frozenset().union(*(w.axes[i].leaf for w in weights))) for i in range(out.ndim)
    )
    # What is not packed may have a derivative, which a product with a packed weight has not.
    if all(isinstance(p, Weight) and isinstance(p.value, Packed) for p in eqn.operands):
        value = _packed_join(eqn, axes)
    else:
        value = eqn.bind(*map(value_of, eqn.operands))
    parts = [_renamed(p, axes) if isinstance(p, Weight) else p for p in parts]
    change = _alike(parts, axes[dim]) or _side_by_side(out.shape, parts, dim)
    source = source._replace(
        paths=tuple(dict.fromkeys(path for w in weights for path in w.source.paths)),
        materialize=all(w.source.materialize for w in weights),
    )
    picked = frozenset().union(*(w.picked for w in weights))
    return Weight(value, change, axes, source, picked)


def _packed_join(eqn: Equation, axes: tuple[Axis, ...]) -> Packed:
    """The operands, all of them packed, which are joined when they are unpacked."""
    old, parts = [w.axes for w in eqn.operands], [w.value for w in eqn.operands]

    def unpack(parts: Sequence[Packed]) -> Factor:
        return Factor(eqn.bind(*(x.array(a) for x, a in zip(parts, old, strict=True))), axes)

    return Packed(parts, unpack, eqn.outputs[0].shape, eqn.outputs[0].dtype).named(axes)


def _renamed(w: Weight, axes: tuple[Axis, ...]) -> Weight:
    names = dict(zip(w.axes, axes, strict=True))
    return w.replace(w.value, w.change.map(lambda f: f.renamed(names)), axes=axes)


def _side_by_side(shape: tuple[int, ...], parts: Sequence[Any], dim: int) -> Change:
    """The deltas of each part, 0 on the others; gains joined, 1 on parts that have none."""
    start, total, deltas, gain = 0, shape[dim], [], None
    for part in parts:
        size = part.shape[dim]
        if isinstance(part, Weight):
            config = [(0, 0, 0)] * len(shape)
            config[dim] = (start, total - start - size, 0)
            change = part.padded(part.value, config).change
            deltas += change.deltas
            gain = _product_of_gains(gain, change.gain, part.axes)
        start += size
    return Change(tuple(deltas), gain)


def _product_of_gains(x: Factor | None, y: Factor | None, axes: Sequence[Axis]) -> Factor | None:
    if x is None or y is None:
        return x if y is None else y
    both = [a for a in axes if a in x.axes or a in y.axes]
    return x.replace(x.arranged(both) * y.arranged(both), both)


def _alike(parts: Sequence[Any], axis: Axis) -> Change | None:
    """A joined with A and B with B, where `axis` counts independent matrices of one form.

    A gain need not have that axis, and the gains of the parts differ.
    """
    if not all(isinstance(p, Weight) for p in parts):
        return None
    first, *others = (p.change for p in parts)
    forms = [(jax.tree.structure(c), jax.tree.map(jnp.shape, c)) for c in (first, *others)]
    if any(form != forms[0] for form in forms) or first.gain is not None:
        return None
    if any((axis in d.a.axes) != (axis in d.b.axes) for d in first.deltas):
        return None
    lengths = [p.shape[p.axes.index(axis)] for p in parts]

    def join(*factors: Factor) -> Factor:
        each = [f.repeated(axis, n) for f, n in zip(factors, lengths, strict=True)]
        values = [f.value for f in each]
        if len({v.dtype for v in values}) > 1:  # dropout keys have one
            dtype = promote(*(v.dtype for v in values))
            values = [v.astype(dtype) for v in values]
        return each[0].replace(jnp.concatenate(values, each[0].axis(axis)))

    return jax.tree.map(join, *(p.change for p in parts), is_leaf=is_factor)
