"""Primitives that pad, concatenate or stack weights."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays import promote
from ._axes import Axis, Factor, Unfactorable, map_factors
from ._change import Change, Delta
from ._interpret import Equation, primitive
from ._packed import Packed
from ._weight import Operand, Weight

Padding = tuple[int, int, int]  # as in `lax.pad`


@primitive("pad")
def _pad(eqn: Equation, w: Weight, fill: Operand) -> Weight:
    if isinstance(fill, Weight):
        raise Unfactorable("the weight is a padding value")
    config = eqn.params["padding_config"]
    padded = Factor(eqn.bind(w.array, fill), w.axes)
    return w.replace(padded, _padded(w, dict(zip(w.axes, config, strict=True))))


def _padded(w: Weight, config: dict[Axis, Padding]) -> Change:
    """Pads the change of a weight: ΔW with 0, the gain with 1."""
    pads = {a: c for a, c in config.items() if tuple(c) != (0, 0, 0)}

    def pad(f: Factor, fill: int) -> Factor:
        by_axis = [pads.get(a, (0, 0, 0)) for a in f.axes]
        return f.each(lambda x: lax.pad(x, jnp.asarray(fill, x.dtype), by_axis))

    def delta(d: Delta) -> Delta:
        if d.key is not None and set(d.key.axes) & set(pads):
            raise Unfactorable("a stack with dropout keys is padded")
        return dataclasses.replace(d, a=pad(d.a, 0), b=pad(d.b, 0), gate=d.gate and pad(d.gate, 0))

    change = w.change.repeat({axis: w.lengths[axis] for axis in pads})
    gain = change.gain and pad(change.gain, 1)
    return dataclasses.replace(change, deltas=tuple(map(delta, change.deltas)), gain=gain)


@primitive("concatenate")
def _concatenate(eqn: Equation, *parts: Operand) -> Weight:
    return _join(eqn, parts, eqn.params["dimension"])


@primitive("stack")
def _stack(eqn: Equation, *parts: Operand) -> Weight:
    axis = eqn.params["axis"]

    def expand(x: Operand) -> Operand:
        if not isinstance(x, Weight):
            return jnp.expand_dims(x, axis)
        axes = x.axes
        new = Axis(next(x.new_names()))
        shape = (*x.shape[:axis], 1, *x.shape[axis:])
        return x.transpose((*axes[:axis], new, *axes[axis:]), shape)

    return _join(eqn, [expand(x) for x in parts], axis)


def _join(eqn: Equation, parts: Sequence[Operand], dim: int) -> Weight:
    """Joins `parts`, the operands of `eqn`, along their axis `dim`."""
    weights = [p for p in parts if isinstance(p, Weight)]
    origin, [out] = weights[0].origin, eqn.outputs
    if len(weights) < len(parts) and origin.uses is not None:
        # Beside an activation it acts as one. In `apply` the other may be a leaf without a rule.
        raise Unfactorable("it is concatenated with an activation", added=True)
    axes = tuple(
        Axis(i, frozenset().union(*(w.axes[i].leaf for w in weights))) for i in range(out.ndim)
    )
    # An array may need a derivative, and a product with a packed weight has none for it.
    if all(isinstance(p, Weight) and isinstance(p.w, Packed) for p in parts):
        w = _packed_join(eqn, axes)
    else:
        values = (x.array if isinstance(x, Weight) else x for x in eqn.operands)
        w = Factor(eqn.bind(*values), axes)
    parts = [_rename(p, axes) if isinstance(p, Weight) else p for p in parts]
    change = _one_change(parts, axes[dim]) or _side_by_side(out.shape, parts, dim)
    origin = dataclasses.replace(
        origin,
        paths=tuple(dict.fromkeys(path for w in weights for path in w.origin.paths)),
        materialize=all(w.origin.materialize for w in weights),
    )
    picked = frozenset().union(*(w.picked for w in weights))
    return Weight(w, change, origin, picked)


def _packed_join(eqn: Equation, axes: tuple[Axis, ...]) -> Packed:
    """Joins operands that are all packed; they are joined when they are unpacked."""

    def unpack(parts: Sequence[Packed]) -> Factor:
        return Factor(eqn.bind(*(x.array for x in parts)), axes)

    [out] = eqn.outputs
    return Packed(
        [x.w for x in eqn.operands if isinstance(x, Weight)], unpack, axes, out.shape, out.dtype
    )


def _rename(w: Weight, axes: tuple[Axis, ...]) -> Weight:
    """Renames the axes of a weight to `axes`; the parts of a packed weight keep their names."""
    names = dict(zip(w.axes, axes, strict=True))
    deltas = tuple(d.of_slot() for d in w.change.deltas)  # slots of parts could differ
    change = map_factors(lambda f: f.rename(names), dataclasses.replace(w.change, deltas=deltas))
    return w.replace(w.w.with_axes(axes, w.shape), change)


def _side_by_side(shape: tuple[int, ...], parts: Sequence[Operand], dim: int) -> Change:
    """Pads all deltas with 0 and all gains with 1, so that they act only on their own part."""

    def multiply(x: Factor, y: Factor) -> Factor:
        both = [*dict.fromkeys(x.axes + y.axes)]
        return x.replace(x.expand_to(both) * y.expand_to(both), both)

    ends = itertools.accumulate(part.shape[dim] for part in parts)
    changes = [
        _padded(part, {part.axes[dim]: (end - part.shape[dim], shape[dim] - end, 0)})
        for part, end in zip(parts, ends, strict=True)
        if isinstance(part, Weight)
    ]
    gains = [change.gain for change in changes if change.gain is not None]
    divides = all(change.divides for change in changes if change.gain is not None)
    deltas = tuple(delta for change in changes for delta in change.deltas)
    return Change(deltas, functools.reduce(multiply, gains) if gains else None, divides)


def _one_change(parts: Sequence[Operand], axis: Axis) -> Change | None:
    """Joins A with A and B with B if `axis` is a stack of matrices of one form, else returns None.

    Gains are not joined: they may lack the axis while the gains of the parts differ.
    """
    weights = [p for p in parts if isinstance(p, Weight)]
    if len(weights) < len(parts):
        return None
    first, *others = (w.change for w in weights)
    forms = [(jax.tree.structure(c), jax.tree.map(jnp.shape, c)) for c in (first, *others)]
    if any(form != forms[0] for form in forms) or first.gain is not None:
        return None
    if any((axis in d.a.axes) != (axis in d.b.axes) for d in first.deltas):
        return None

    def join(*factors: Factor) -> Factor:
        each = [f.repeat({axis: w.lengths[axis]}) for f, w in zip(factors, weights, strict=True)]
        values = [f.value for f in each]
        if len({v.dtype for v in values}) > 1:  # dropout keys have one
            dtype = promote(*(v.dtype for v in values))
            values = [v.astype(dtype) for v in values]
        return each[0].replace(jnp.concatenate(values, each[0].axis(axis)))

    return map_factors(join, first, *others)
