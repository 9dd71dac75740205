"""Primitives that multiply with a weight: the product with W, plus that with the factors of ΔW."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._axes import RANK, Axis, Factor, Unfactorable, new_names
from ._cpu import plan, rounds
from ._explicit import explicit
from ._interpret import Equation, rule
from ._product import Spec, letters, lowrank, promote
from ._summed import summed
from ._weight import Change, Delta, Weight, value_of

_OTHER = Axis(-2)  # of an activation, not of the weight


class Roles(NamedTuple):
    """The axes of W that a product batches, contracts and keeps."""

    stack: tuple[Axis, ...]
    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]


def _product(
    w: Weight,
    kind: str,
    roles: Roles,
    activations: tuple[jax.Array, jax.Array],
    base: Callable[[jax.Array], jax.Array],
    lowrank: Callable[[Delta, jax.Array], jax.Array],
    spread: Callable[[Factor, bool], jax.Array],
) -> jax.Array:
    """The product of an activation with the changed weight.

    Args:
        w: the weight.
        kind: as in `Product`.
        roles: of its axes.
        activations: the activation, and what the low-rank path sees of it.
        base: the product of the first with W.
        lowrank: the product of the second with a delta.
        spread: the gain along the axes of the activation, if it is said that it has those of the
            inputs, or else along the axes of the result.
    """
    gain, (x, aside) = w.change.gain, activations
    of_inputs = gain is not None and bool(set(gain.axes) & set(roles.inputs))
    if gain is not None and of_inputs:
        if set(gain.axes) & set(roles.outputs):
            raise Unfactorable("its gain has axes of the inputs and of the outputs")
        x, aside = (_times(z, spread(gain, True)) for z in (x, aside))
    out = _plus_deltas(base(x), w, kind, roles, (lowrank(d, aside) for d in w.change.deltas))
    return out if gain is None or of_inputs else _times(out, spread(gain, False))


def _plus_deltas(
    out: jax.Array, w: Weight, kind: str, roles: Roles, products: Iterable[jax.Array]
) -> jax.Array:
    """`out`, the product with W, plus those with its deltas."""
    if w.source.uses is not None:
        w.source.uses.product(w, kind, roles)
    for product in products:
        out = out + product.astype(out.dtype)
    return out


def _times(x: jax.Array, gain: jax.Array) -> jax.Array:
    wide = promote(x.dtype, gain.dtype)
    return (x.astype(wide) * gain.astype(wide)).astype(x.dtype)


def _ordered(delta: Delta, w: Weight, roles: Roles) -> tuple[Factor, Factor]:
    """The factors in the order of a product, also along axes of W that neither follows."""
    p, q = delta.by_order(roles.inputs)
    for axis, length in zip(w.axes, w.shape, strict=True):
        if axis not in (*p.axes, *q.axes):
            p, q = (
                (p, q.repeated(axis, length))
                if axis in roles.outputs
                else (p.repeated(axis, length), q)
            )
    return p, q


@rule("dot_general", multiplies=True)
def _dot_general(eqn: Equation, x: Any, y: Any) -> jax.Array:
    (x_contracted, y_contracted), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    # One letter an axis; those that meet share it. Example: x (b, t, i) · w (i, o), contracted
    # over i, is x_axes = "abc", y_axes = "ce", out_axes = "abe".
    x_rank, y_rank = (jnp.ndim(value_of(z)) for z in (x, y))
    names = letters(x_rank + y_rank)
    x_axes, y_list = names[:x_rank], list(names[x_rank:])
    for i, j in zip((*x_batch, *x_contracted), (*y_batch, *y_contracted), strict=True):
        y_list[j] = x_axes[i]
    y_axes = "".join(y_list)
    batch = [x_axes[i] for i in x_batch]
    summed = [x_axes[i] for i in x_contracted]
    out_axes = "".join([*batch, *(c for c in x_axes + y_axes if c not in batch + summed)])
    if not isinstance(x, Weight):
        product = _Contraction(eqn, y, y_axes, x_axes, out_axes, _roles(y, y_batch, y_contracted))
        return product.changed(eqn.bind, x, eqn.aside(0))
    product = _Contraction(eqn, x, x_axes, y_axes, out_axes, _roles(x, x_batch, x_contracted))
    if not isinstance(y, Weight):
        return product.changed(lambda y, x: eqn.bind(x, y), y, eqn.aside(1))
    if x.change.gain is not None or y.change.gain is not None:
        raise Unfactorable("two adapted weights are multiplied, one of them with a gain")
    other = _Contraction(eqn, y, y_axes, x_axes, out_axes, _roles(y, y_batch, y_contracted))
    out = product.plus_deltas(eqn.bind(x.value, y.value), y.value)
    return _plus_both(other.plus_deltas(out, x.value), product, other)


def _roles(w: Weight, batch: Sequence[int], contracted: Sequence[int]) -> Roles:
    kept = [d for d in range(len(w.axes)) if d not in batch and d not in contracted]
    return Roles(*(tuple(w.axes[d] for d in dims) for dims in (batch, contracted, kept)))


@dataclasses.dataclass(frozen=True)
class _Contraction:
    """A contraction of an activation z with the weight w to y: a letter for each axis."""

    eqn: Equation
    w: Weight
    w_axes: str
    z_axes: str
    y_axes: str
    roles: Roles  # of the axes of w

    @property
    def letters(self) -> dict[Axis, str]:
        """The letter of each axis of w, and of the rank."""
        return dict(zip(self.w.axes, self.w_axes, strict=True)) | {RANK: "Z"}

    @property
    def precision(self) -> Any:
        """As for `jax.lax.dot_general`."""
        return self.eqn.params["precision"]

    def changed(self, dot: Callable[..., Any], z: jax.Array, aside: jax.Array) -> jax.Array:
        """The product of `z`, and of it `aside`, with the changed weight."""
        w, dtype = self.w, promote(z.dtype, self.w.value.dtype)

        def base(z: jax.Array) -> jax.Array:
            return dot(z, self.w.value)

        if self.is_summed(z):
            together = self.spec(*w.change.deltas, dtype)
            w = w.replace(w.value, Change((), w.change.gain))

            def base(z: jax.Array) -> jax.Array:
                spec, p, q = together
                return summed(spec, z, w.value, p, q)

        return _product(w, "dense", self.roles, (z, aside), base, self.lowrank, self.spread)

    def plus_deltas(self, out: jax.Array, z: jax.Array) -> jax.Array:
        """`out`, the product with W, plus what the deltas add to it."""
        products = (self.lowrank(d, z) for d in self.w.change.deltas)
        return _plus_deltas(out, self.w, "dense", self.roles, products)

    def lowrank(self, delta: Delta, z: jax.Array) -> jax.Array:
        """The product of `z` with a delta."""
        dtype = promote(z.dtype, self.w.value.dtype)
        spec, p, q = self.spec(delta, dtype)
        return lowrank(spec, delta.drop(z).astype(dtype), p, q)

    def is_summed(self, z: jax.Array) -> bool:
        """Whether W + ΔW may be formed for a CPU: there is one ΔW, and nothing rounds the sum."""
        same = z.dtype == self.w.value.dtype == self.eqn.outputs[0].dtype
        if len(self.w.change.deltas) != 1 or not same or rounds(self.precision):
            return False
        [delta], roles = self.w.change.deltas, self.roles
        p, q = _ordered(delta, self.w, roles)
        if delta.key is not None or {*q.axes} & {*roles.inputs} or {*p.axes} & {*roles.outputs}:
            return False
        length = dict(zip(self.w.axes, self.w.shape, strict=True))
        stack, inputs, outputs = (math.prod(length[a] for a in axes) for axes in roles)
        tokens = z.size // max(1, stack * inputs)
        return plan(tokens, inputs, outputs, p.length(RANK), z.dtype) == "summed"

    def spec(self, delta: Delta, dtype: Any) -> tuple[Spec, jax.Array, jax.Array]:
        """The letters of a product, and the two factors in the order in which they are used."""
        p, q = _ordered(delta, self.w, self.roles)
        y = self.eqn.outputs[0]
        how = (delta.scale, y.dtype, self.precision, explicit(y))
        factors = (p.label(self.letters), q.label(self.letters))
        axes = (self.z_axes, self.w_axes, *factors, self.y_axes)
        return Spec(*axes, *how), p.value.astype(dtype), q.value.astype(dtype)

    def spread(self, gain: Factor, of_inputs: bool) -> jax.Array:
        """The gain along the axes of z or y."""
        axis = {letter: axis for axis, letter in self.letters.items()}
        letters = self.z_axes if of_inputs else self.y_axes
        return gain.arranged([axis.get(c, _OTHER) for c in letters])


def _plus_both(out: jax.Array, x: _Contraction, y: _Contraction) -> jax.Array:
    """Adds Δx·Δy where two adapted weights are multiplied with each other."""
    y_letters = y.letters | {RANK: "Y"}
    for s in x.w.change.deltas:
        for t in y.w.change.deltas:
            factors = [(f, x.letters) for f in _ordered(s, x.w, x.roles)]
            factors += [(f, y_letters) for f in _ordered(t, y.w, y.roles)]
            spec = ",".join(f.label(names) for f, names in factors) + "->" + x.y_axes
            values = [f.value.astype(out.dtype) for f, _ in factors]
            cross = jnp.einsum(spec, *values, optimize="optimal", precision=x.precision)
            out = out + jnp.asarray(s.scale * t.scale, out.dtype) * cross
    return out


@rule("ragged_dot_general", multiplies=True)
def _ragged_dot_general(eqn: Equation, x: Any, w: Any, group_sizes: jax.Array) -> jax.Array:
    p = eqn.params
    numbers = p["ragged_dot_dimension_numbers"]
    (x_contracted, contracted), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    if isinstance(x, Weight) or len(w.shape) != 3 or (rows, tuple(x_contracted)) != ((0,), (1,)):
        raise Unfactorable("the groups are not rows of a matrix")
    if len(groups) != 1 or len(contracted) != 1 or tuple(batch) != ((), ()):
        raise Unfactorable("the weight is not one matrix a group")
    [outer] = {0, 1, 2} - {groups[0], contracted[0]}
    group, inner, outer = (w.axes[d] for d in (groups[0], contracted[0], outer))
    roles = Roles((group,), (inner,), (outer,))
    dtype = promote(x.dtype, w.value.dtype)

    def ragged(z: jax.Array, f: Factor, *axes: Axis) -> jax.Array:
        value = f.arranged((group, *axes))
        value = jnp.broadcast_to(value, (len(group_sizes), *value.shape[1:]))
        how = {"precision": p["precision"], "group_offset": p["group_offset"]}
        return lax.ragged_dot(z, value.astype(dtype), group_sizes, **how)

    def lowrank(delta: Delta, z: jax.Array) -> jax.Array:
        first, second = _ordered(delta, w, roles)
        if inner in second.axes or outer in first.axes:
            raise Unfactorable("its inputs and outputs are mixed")
        h = ragged(delta.drop(z.astype(dtype)), first, inner, RANK)
        return ragged(delta.scale * h, second, RANK, outer)

    def spread(gain: Factor, of_inputs: bool) -> jax.Array:
        rest = inner if of_inputs else outer
        if group not in gain.axes:
            return gain.arranged((_OTHER, rest))
        return jnp.repeat(gain.arranged((group, rest)), group_sizes, 0, total_repeat_length=len(x))

    def base(z: jax.Array) -> jax.Array:
        return eqn.bind(z, w.value, group_sizes)

    return _product(w, "dense", roles, (x, eqn.aside(0)), base, lowrank, spread)


@rule("conv_general_dilated", multiplies=True)
def _conv_general_dilated(eqn: Equation, x: Any, w: Any) -> jax.Array:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    if not isinstance(w, Weight) or isinstance(x, Weight):
        raise Unfactorable("the weight is not the kernel")
    out_dim, in_dim, *spatial = numbers.rhs_spec
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    out_axis, inputs = w.axes[out_dim], tuple(w.axes[d] for d in (*sorted(spatial), in_dim))
    roles = Roles((), inputs, (out_axis,))
    dtype, how = promote(x.dtype, w.value.dtype), {"precision": p["precision"]}
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])

    def lowrank(delta: Delta, z: jax.Array) -> jax.Array:
        a, b = _ordered(delta, w, roles)
        if out_axis in a.axes or set(inputs) & set(b.axes):
            raise Unfactorable("its inputs and outputs are mixed")
        # A is a kernel with r outputs, the same for every group; B is a product over them.
        kernel = a.arranged([RANK if axis == out_axis else axis for axis in w.axes])
        kernel = jnp.concatenate([kernel.astype(dtype)] * groups, out_dim)
        window = (p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])
        z = delta.drop(z.astype(dtype))
        h = lax.conv_general_dilated(z, kernel, *window, numbers, groups, **how)
        h = delta.scale * h.transpose(order)  # (batch, *spatial, groups * r)
        b = b.arranged((RANK, out_axis)).astype(dtype)
        rank, outputs = b.shape
        b = b.reshape(rank, batches, groups, outputs // (groups * batches))
        h = h.reshape(batches, h.shape[0] // batches, *h.shape[1:-1], groups, rank)
        y = jnp.einsum("bn...gr,rbgo->n...bgo", h, b, **how)
        return y.reshape(*y.shape[:-3], outputs).transpose(np.argsort(order))

    def spread(gain: Factor, of_inputs: bool) -> jax.Array:
        if of_inputs:
            axis, at = w.axes[in_dim], numbers.lhs_spec[1]
        else:
            axis, at = out_axis, numbers.out_spec[1]
        if set(gain.axes) != {axis} or (of_inputs and groups > 1):
            raise Unfactorable("its gain differs within the window or between groups")
        return gain.arranged([axis if d == at else _OTHER for d in range(x.ndim)])

    def base(z: jax.Array) -> jax.Array:
        return eqn.bind(z, w.value)

    return _product(w, "conv", roles, (x, eqn.aside(0)), base, lowrank, spread)


@rule("gather", multiplies=True)
def _gather(eqn: Equation, w: Any, indices: jax.Array) -> Any:
    found = _Lookup(eqn, w, indices)
    out = eqn.bind(w.value, indices)
    rows = found.filled(w).map(found.rows)
    moved = w.replace(out, rows, axes=found.axes).with_picked(found.picked)
    if found.is_weight(w):
        return moved.unsteady()

    def product(delta: Delta, rows: Delta) -> jax.Array:
        if any(axis in delta.a.axes and axis in delta.b.axes for axis in found.picked):
            raise Unfactorable("rows and stacked matrices are looked up at once")
        value = dataclasses.replace(rows, key=None).formed(found.axes, out.dtype)
        if delta.key is None:
            return value
        # A row that is looked up is an input of A that is 1: dropout keeps it or not.
        lengths = [n for axis, n in zip(found.axes, out.shape, strict=True) if axis in found.batch]
        keep = Factor(delta.drop(jnp.ones(lengths, value.dtype)), found.batch)
        return value * keep.arranged(found.axes)

    products = map(product, w.change.deltas, moved.change.deltas)
    out = _plus_deltas(out, w, "embed", found.roles, products)
    gain = moved.change.gain
    return out if gain is None else _times(out, gain.arranged(found.axes))


class _Lookup:
    """Rows of a weight, looked up by an array of indices.

    Attributes:
        picked: the axes of the weight along which one place is looked up.
        roles: those, and the axes that are taken whole.
        axes: the axes of the result.
        batch: those of them that are axes of the indices.
    """

    def __init__(self, eqn: Equation, w: Any, indices: Any):
        """`Unfactorable` if it is not whole rows of a weight."""
        self.params, self.indices = eqn.params, indices
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if not isinstance(w, Weight) or numbers.operand_batching_dims:
            raise Unfactorable("an index is a weight, or rows of several arrays are looked up")
        self.index_of = {w.axes[d]: i for i, d in enumerate(numbers.start_index_map)}
        by_axis = dict(zip(w.axes, sizes, strict=True))
        lengths = dict(zip(w.axes, w.shape, strict=True))
        collapsed = {w.axes[d] for d in numbers.collapsed_slice_dims}
        whole = tuple(
            a
            for a in w.axes
            if by_axis[a] == lengths[a] and a not in collapsed and not self.fills(a)
        )
        self.picked = tuple(a for a in w.axes if a not in whole)
        if any(by_axis[a] != 1 or a not in self.index_of for a in self.picked):
            raise Unfactorable("more than whole rows of the weight are looked up")
        self.roles = Roles((), self.picked, whole)
        names = new_names(w.axes)
        kept = iter(a for a in w.axes if a not in collapsed)
        leaf = frozenset().union(*(a.leaf for a in self.picked))
        axes, batch = [], []
        for i in range(len(w.axes) - len(collapsed) + indices.ndim - 1):
            if i not in numbers.offset_dims:  # an axis of the indices
                axes.append(Axis(next(names), leaf))
                batch.append(axes[-1])
            elif (axis := next(kept)) in whole:
                axes.append(axis)
            else:  # of length 1
                axes.append(Axis(next(names)))
        self.axes, self.batch = tuple(axes), tuple(batch)

    def fills(self, axis: Axis) -> bool:
        """Whether an index along `axis` may be out of bounds, so that the row is filled."""
        mode = self.params["mode"]
        return axis in self.index_of and mode == lax.GatherScatterMode.FILL_OR_DROP

    def is_weight(self, w: Weight) -> bool:
        """Whether the result is a weight again: a row of a stack is a matrix, of a matrix none."""
        if not w.change.deltas:  # a gain is applied to the rows at once
            return w.source.uses is not None and len(self.roles.outputs) >= 2
        lengths = dict(zip(w.axes, w.shape, strict=True))
        stack = {axis for axis in self.picked if lengths[axis] > 1}
        kept = set(self.roles.outputs)
        each = [(set(d.a.axes), set(d.b.axes)) for d in w.change.deltas]
        return all(stack <= a & b and kept & a and kept & b for a, b in each)

    def filled(self, w: Weight) -> Change:
        """The change with a gain along all axes in which rows may be filled: it is 1 on those."""
        axes = {a: n for a, n in zip(w.axes, w.shape, strict=True) if self.fills(a)}
        if any(a not in d.a.axes + d.b.axes for d in w.change.deltas for a in axes):
            raise Unfactorable("rows may be filled along an axis that neither A nor B has")
        gain = w.change.gain
        if gain is not None:
            for axis, length in axes.items():
                gain = gain.repeated(axis, length)
        return Change(w.change.deltas, gain)

    def rows(self, f: Factor) -> Factor:
        """The rows of a factor: 0 where those of W are filled, 1 for a gain."""
        mine = [a for a in self.picked if a in f.axes]
        if not mine:
            return f
        f = f.to_front(mine)
        value = f.value.at[tuple(self.indices[..., self.index_of[a]] for a in mine)].get(
            mode=self.params["mode"],
            fill_value=0 if RANK in f.axes else 1,
            wrap_negative_indices=False,
        )
        return f.replace(value, (*self.batch, *f.axes[len(mine) :]))
