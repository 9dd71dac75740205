r"""The change that an adapter makes to a weight.

$$W' = g \odot \Big(W + \sum_i s_i A_i B_i\Big)$$

where each $A_i B_i$ is summed over the rank, and the gain g is constant along some axes of W. The
interpreter knows nothing else of a method.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from .. import _compat
from .._arrays import automatically, einsum, explicit, lie_along, promote
from ._axes import RANK, Axis, Factor, Unfactorable

ArrayPair = tuple[jax.Array, jax.Array]

FUSED = 16  # the largest rank at which a sum of outer products is faster than a matrix product


def multiply_gate(h: jax.Array, gate: jax.Array) -> jax.Array:
    """Multiplies `h` by a gate with as many axes; where the gate is 0, it returns 0 for any `h`."""
    return jnp.where(gate == 0, jnp.zeros((), h.dtype), h * gate.astype(h.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
    """ΔW = scale · A·diag(gate)·B, or an operation on activations of the same form.

    Attributes:
        a: A.
        b: B.
        scale: a number.
        key: keys for dropout of the inputs of A, or None.
        dropout: the probability of dropping an input.
        gate: a factor along the rank, or None. Where it is 0, x·A may have any value.
        gating: a function of x·A and the gate, whose result replaces x·A. If it is not
            `multiply_gate`, there is no ΔW, and the delta only acts on activations.
        slot: the index of the adapter whose columns count, if A and B have those of several; -1
            is none of them, None all.
        parts: the lengths of the first two axes of (repeats, slots, r), to which the rank splits.
    """

    a: Factor
    b: Factor
    scale: float = dataclasses.field(metadata={"static": True})
    key: Factor | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    gate: Factor | None = None
    gating: Callable[[jax.Array, jax.Array], jax.Array] = dataclasses.field(
        default=multiply_gate, metadata={"static": True}
    )
    slot: Factor | None = None
    parts: tuple[int, int] = dataclasses.field(default=(1, 1), metadata={"static": True})

    def of_slot(self) -> "Delta":
        """Takes the columns of A and the rows of B of its slot."""
        if self.slot is None:
            return self
        slot = self.slot.value

        def take(f: Factor) -> Factor:
            pick = functools.partial(_rows_of_slot, f.axis(RANK), self.parts)
            return f.replace(automatically(pick, explicit(f.value))(f.value, slot))

        return dataclasses.replace(self, a=take(self.a), b=take(self.b), slot=None)

    def form(self, axes: Sequence[Axis], dtype: DTypeLike) -> jax.Array:
        """Forms ΔW; it has length 1 along axes of W that neither A nor B has."""
        own = self.of_slot()
        wide = promote(dtype, self.a.value.dtype, self.b.value.dtype, jnp.float32)
        a, b = (f.replace(f.value.astype(wide)) for f in (own.a, own.b))
        a = a.replace(self.scale * self.drop(jnp.ones((), wide)) * a.value)
        return _sum_over_rank(tuple(axes), self.factor_with_gate(a), b)

    def apply_gate(self, h: jax.Array, axes: Sequence[Any]) -> jax.Array:
        """Applies the gate to the activation `h` with the axes `axes`."""
        return h if self.gate is None else self.gating(h, self.gate.expand_to(axes))

    def factor_with_gate(self, f: Factor) -> Factor:
        """Multiplies A or B by diag(gate); raises `Unfactorable` if there is no ΔW."""
        if not self.is_matrix:
            raise Unfactorable("it would be multiplied with something other than an activation")
        return f.replace(self.apply_gate(f.value, f.axes))

    def drop(self, x: jax.Array) -> jax.Array:
        """Drops entries of the input `x` of A with probability `dropout`, and rescales the others.

        If there is no ΔW, no gradient passes to `x`.
        """
        if not self.is_matrix:
            return lax.stop_gradient(x)
        if self.key is None:
            return x
        key = self.key.value.ravel()[0]
        # In a shard_map of the model, the shards of x are different inputs.
        for axis in sorted(_compat.varying(x) - _compat.varying(key), key=str):
            key = jax.random.fold_in(key, lax.axis_index(axis))
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        # In bfloat16 both 1 - p and its reciprocal round to another number.
        kept = x.astype(promote(x.dtype, jnp.float32)) / (1 - self.dropout)
        return jnp.where(keep, kept.astype(x.dtype), jnp.zeros((), x.dtype))

    @property
    def is_matrix(self) -> bool:
        """Whether there is a ΔW, rather than only an operation on activations."""
        return self.gating is multiply_gate

    @property
    def is_row(self) -> bool:
        """Whether ΔW costs no more than an activation: A or B is a vector along the rank."""
        return self.is_matrix and (self.a.is_row or self.b.is_row)


def _rows_of_slot(d: int, parts: tuple[int, int], x: jax.Array, slot: jax.Array) -> jax.Array:
    """Takes the part of a slot along the rank, the axis `d`."""
    before, after = x.shape[:d], x.shape[d + 1 :]
    found = x.reshape(*before, *parts, -1, *after)
    found = lax.dynamic_index_in_dim(found, slot, d + 1, keepdims=False)
    found = jnp.where(slot < 0, jnp.zeros((), x.dtype), found)
    return found.reshape(*before, x.shape[d] // parts[1], *after)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Change:
    """The change that an adapter makes to W: gain · (W + the sum of the deltas).

    Attributes:
        deltas: the ΔW.
        gain: the gain, or None.
        divides: whether products may be divided by the gain. They then need less memory: see
            `times`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora.extend import RANK, Axis, Change, Delta, Factor
        >>> a = Factor(jnp.ones((4, 2)), (Axis(0), RANK))
        >>> b = Factor(jnp.ones((2, 3)), (RANK, Axis(1)))
        >>> change = Change((Delta(a, b, scale=0.5),))
        >>> change.of(jnp.zeros((4, 3)), [Axis(0), Axis(1)])[0].tolist()
        [1.0, 1.0, 1.0]
    """

    deltas: tuple[Delta, ...] = ()
    gain: Factor | None = None
    divides: bool = dataclasses.field(default=False, metadata={"static": True})

    def repeat(self, lengths: Mapping[Axis, int]) -> "Change":
        """Repeats the gain, and A where B lacks the axis too, along the axes of `lengths`."""

        def delta(d: Delta) -> Delta:
            lacking = {axis: n for axis, n in lengths.items() if axis not in d.b.axes}
            return dataclasses.replace(d, a=d.a.repeat(lacking))

        gain = self.gain and self.gain.repeat(lengths)
        return dataclasses.replace(self, deltas=tuple(map(delta, self.deltas)), gain=gain)

    def of(self, w: jax.Array, axes: Sequence[Axis], sign: int = 1) -> jax.Array:
        """Changes `w`, in float32 or better, and rounds once to its dtype.

        With `sign` -1 it undoes the change: `w` is the changed weight.
        """
        wide = promote(w.dtype, jnp.float32)
        zero = jnp.zeros((), wide)
        deltas = (lie_along(d.form(axes, w.dtype), w) for d in self.deltas)
        delta = sign * sum(deltas, start=zero)
        if self.gain is None:
            return plus(w, delta) if self.deltas else w
        gain = lie_along(self.gain.expand_to(axes).astype(wide), w)
        x = w.astype(wide) if sign > 0 else w.astype(wide) / gain
        x = plus(x, delta) if self.deltas else x
        return (x * gain if sign > 0 else x).astype(w.dtype)


@jax.custom_jvp
def plus(w: jax.Array, change: jax.Array) -> jax.Array:
    """Adds ΔW to W in float32 or better, and rounds once."""
    # A change of zero keeps every bit, also of -0.0 and of subnormals.
    wide = promote(w.dtype, jnp.float32)
    old = w.astype(wide)
    new = old + change.astype(wide)
    return jnp.where(new == old, old, new).astype(w.dtype)


@plus.defjvp
def _plus_jvp(primals: ArrayPair, tangents: ArrayPair) -> ArrayPair:
    # Added here, as under explicit sharding the two may lie differently.
    wide = promote(primals[0].dtype, jnp.float32)
    tangent = tangents[0].astype(wide) + tangents[1].astype(wide)
    return plus(*primals), tangent.astype(primals[0].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _sum_over_rank(axes: tuple[Axis, ...], a: Factor, b: Factor) -> jax.Array:
    """Computes A·B with the axes `axes`, of length 1 where neither factor has the axis.

    At low rank it is a sum of outer products, which XLA fuses with the addition to W, so that it
    writes no array of W's size for A·B. Its derivative is computed by matrix products.
    """
    rank = a.length(RANK)
    form = _outer_products if 0 < rank <= FUSED else _matrix_product
    return form(axes, a, b)


@_sum_over_rank.defjvp
def _sum_over_rank_jvp(
    axes: tuple[Axis, ...], primals: tuple[Factor, Factor], tangents: tuple[Factor, Factor]
) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    return _sum_over_rank(axes, a, b), _matrix_product(axes, da, b) + _matrix_product(axes, a, db)


def _outer_products(axes: Sequence[Axis], a: Factor, b: Factor) -> jax.Array:
    def column(f: Factor, r: int) -> jax.Array:
        value = lax.index_in_dim(f.value, r, f.axis(RANK), keepdims=False)
        return f.replace(value, [x for x in f.axes if x != RANK]).expand_to(axes)

    return functools.reduce(jnp.add, [column(a, r) * column(b, r) for r in range(a.length(RANK))])


def _matrix_product(axes: Sequence[Axis], a: Factor, b: Factor) -> jax.Array:
    known = [axis for axis in axes if axis in a.axes or axis in b.axes]
    delta = einsum(a.axes, b.axes, known, a.value, b.value, precision="highest")
    return a.replace(delta, known).expand_to(axes)
