"""`dot_general` with a weight, alone or together with others of the same activation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import RANK, Axis, Factor, Unfactorable
from ._change import Delta
from ._explicit import explicit
from ._interpret import Equation, rule
from ._linear import OTHER, Roles, ordered, plus_deltas, product
from ._product import Spec, is_kept, letters, lowrank, promote
from ._weight import Weight, value_of


@dataclasses.dataclass(frozen=True)
class _Contraction:
    """A contraction of an activation z with a weight w to y: a letter for each axis.

    Attributes:
        eqn: the equation.
        at: which of its operands w is.
        w: the weight.
        w_axes: the letters of its axes.
        z_axes: those of z, which shares a letter with w where they are contracted or batched.
        y_axes: those of y.
        roles: of the axes of w.
    """

    eqn: Equation
    at: int
    w: Weight
    w_axes: str
    z_axes: str
    y_axes: str
    roles: Roles

    @property
    def z(self) -> jax.Array:
        """The activation; of another weight its W."""
        return value_of(self.eqn.operands[1 - self.at])

    @property
    def dtype(self) -> Any:
        """The dtype in which the factors are multiplied."""
        return promote(self.z.dtype, self.w.dtype)

    @property
    def letters(self) -> dict[Axis, str]:
        """The letter of each axis of w, and of the rank."""
        return dict(zip(self.w.axes, self.w_axes, strict=True)) | {RANK: "Z"}

    @property
    def precision(self) -> Any:
        """As for `jax.lax.dot_general`."""
        return self.eqn.params["precision"]

    def changed(self, added: jax.Array | None = None) -> jax.Array:
        """The product of z with the changed weight; `added` is what ΔW adds if that is known."""

        def base(value: jax.Array, z: jax.Array) -> jax.Array:
            return self.eqn.bind(*((value, z) if self.at == 0 else (z, value)))

        def low_rank(delta: Delta, z: jax.Array) -> jax.Array:
            return self.lowrank(delta, z) if added is None else added

        z = (self.z, value_of(self.eqn.low_rank_operand(1 - self.at)))
        return product(self.w, "dense", self.roles, z, base, low_rank, self.spread)

    def plus_deltas(self, out: jax.Array) -> jax.Array:
        """`out`, the product with W, plus what the deltas add to it."""
        products = (self.lowrank(d, self.z) for d in self.w.change.deltas)
        return plus_deltas(out, self.w, "dense", self.roles, products)

    def lowrank(self, delta: Delta, z: jax.Array) -> jax.Array:
        """The product of `z` with a delta."""
        spec, p, q = self.spec(delta)
        z = delta.drop(z).astype(self.dtype)
        return lowrank((spec,), z, (p,), (q,), (self.gate(delta, spec),))[0]

    def spec(self, delta: Delta) -> tuple[Spec, jax.Array, jax.Array]:
        """The letters of a product, and the two factors in the order in which they are used."""
        p, q = ordered(delta, self.w, self.roles, self.dtype)
        y = self.eqn.outputs[0]
        axes = (self.z_axes, self.w_axes, p.label(self.letters), q.label(self.letters), self.y_axes)
        how = (delta.scale, y.dtype, self.precision, explicit(y), delta.gating)
        return Spec(*axes, *how), p.value, q.value

    def spread(self, gain: Factor, of_inputs: bool) -> jax.Array:
        """The gain along the axes of z or y."""
        return self.arranged(gain, self.z_axes if of_inputs else self.y_axes)

    def gate(self, delta: Delta, spec: Spec) -> jax.Array | None:
        """The gate of a delta along the axes of z·A."""
        return delta.gate and self.arranged(delta.gate, spec.h)

    def arranged(self, f: Factor, along: str) -> jax.Array:
        """`f` with its axes in the order of letters."""
        axis = {letter: axis for axis, letter in self.letters.items()}
        return f.arranged([axis.get(c, OTHER) for c in along])

    def factors(self) -> tuple[Spec, jax.Array, jax.Array]:
        """As `spec`, but the inputs of the first factor in the order in which z has them.

        `Unfactorable` unless z·A is small, and needs nothing but z and A.
        """
        w, inputs = self.w, {*self.roles.inputs}
        if len(w.change.deltas) != 1 or self.roles.stack:
            raise Unfactorable
        [delta], gain = w.change.deltas, w.change.gain
        p, q = delta.by_order(self.roles.inputs)
        is_plain = {*p.axes} == {*inputs, RANK} and inputs.isdisjoint(q.axes)
        if delta.key is not None or not is_plain or (gain and not inputs.isdisjoint(gain.axes)):
            raise Unfactorable
        spec, p, q = self.spec(delta)
        order = "".join(sorted(spec.p, key=f"{self.z_axes}Z".index))
        p = p.transpose([spec.p.index(c) for c in order])
        spec = spec._replace(p=order)
        if not is_kept(spec, self.z, p) or explicit(self.z) is not None:
            raise Unfactorable
        return spec, p, q


def _together(eqns: Sequence[Equation]) -> list[jax.Array]:
    """The products of an activation with several weights, whose A lie side by side."""
    each = [c for eqn in eqns for c in _contractions(eqn)]
    adapted = [c for c in each if c.w.change.deltas]
    if len(each) != len(eqns) or len(adapted) < 2:
        raise Unfactorable
    specs, ps, qs = zip(*(c.factors() for c in adapted), strict=True)
    forms = {
        (tuple(map(spec.x.index, spec.p[:-1])), c.dtype, str(spec.precision), spec.gating)
        for c, spec in zip(adapted, specs, strict=True)
    }
    if len(forms) != 1:
        raise Unfactorable
    first = adapted[0]
    z = first.w.change.deltas[0].drop(first.eqn.low_rank_operand(1 - first.at))
    gates = [c.gate(c.w.change.deltas[0], s) for c, s in zip(adapted, specs, strict=True)]
    added = iter(lowrank(specs, z.astype(first.dtype), ps, qs, gates))
    return [c.changed(next(added)) if c.w.change.deltas else c.changed() for c in each]


@rule("dot_general", multiplies=True, together=_together)
def _dot_general(eqn: Equation, *_: Any) -> jax.Array:
    first, *others = _contractions(eqn)
    changed = [c for c in (first, *others) if c.w.is_changed]
    if not others or len(changed) == 1:  # what else is a weight, is one that has to be unpacked
        return (changed or [first])[0].changed()
    x, y = first.w, others[0].w
    if x.change.gain is not None or y.change.gain is not None:
        raise Unfactorable("two adapted weights are multiplied, one of them with a gain")
    out = first.plus_deltas(eqn.bind(x.array, y.array))
    return _plus_both(others[0].plus_deltas(out), first, others[0])


def _contractions(eqn: Equation) -> list[_Contraction]:
    """One for each operand that is a weight."""
    contracted, batch = eqn.params["dimension_numbers"]
    # One letter an axis; those that meet share it. Example: x (b, t, i) · w (i, o), contracted
    # over i, is x_axes = "abc", w_axes = "ce", y_axes = "abe".
    x_rank, y_rank = (len(z.shape) for z in eqn.operands)
    names = letters(x_rank + y_rank)
    first, second = list(names[:x_rank]), list(names[x_rank:])
    for i, j in zip((*batch[0], *contracted[0]), (*batch[1], *contracted[1]), strict=True):
        second[j] = first[i]
    batched, summed = ([first[i] for i in dims[0]] for dims in (batch, contracted))
    out = [*batched, *(c for c in first + second if c not in batched + summed)]
    axes = ["".join(first), "".join(second)]
    return [
        _Contraction(eqn, i, w, axes[i], axes[1 - i], "".join(out), roles)
        for i, w in enumerate(eqn.operands)
        if isinstance(w, Weight) and (roles := _roles(w, batch[i], contracted[i]))
    ]


def _roles(w: Weight, batch: Sequence[int], contracted: Sequence[int]) -> Roles:
    kept = [d for d in range(len(w.axes)) if d not in batch and d not in contracted]
    return Roles(*(tuple(w.axes[d] for d in dims) for dims in (batch, contracted, kept)))


def _plus_both(out: jax.Array, x: _Contraction, y: _Contraction) -> jax.Array:
    """Adds Δx·Δy where two adapted weights are multiplied with each other."""
    y_letters = y.letters | {RANK: "Y"}
    for s in x.w.change.deltas:
        for t in y.w.change.deltas:
            factors = [(f, x.letters) for f in ordered(s, x.w, x.roles, out.dtype)]
            factors += [(f, y_letters) for f in ordered(t, y.w, y.roles, out.dtype)]
            spec = ",".join(f.label(names) for f, names in factors) + "->" + x.y_axes
            values = [f.value for f, _ in factors]
            values[0], values[2] = (
                d.gated_factor(factors[i][0]).value for d, i in ((s, 0), (t, 2))
            )
            cross = jnp.einsum(spec, *values, optimize="optimal", precision=x.precision)
            out = out + jnp.asarray(s.scale * t.scale, out.dtype) * cross
    return out
