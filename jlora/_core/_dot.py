"""`dot_general` with a weight, alone or together with others of the same activation."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._arrays import explicit, spell
from ._axes import RANK, Axis, Factor, Unfactorable
from ._change import Delta
from ._interpret import Equation, rule
from ._low_rank import Term, low_rank
from ._product import Product, Roles
from ._shared import multiply_together
from ._weight import Weight, value_of


@dataclasses.dataclass(frozen=True)
class Contraction(Product):
    """A contraction of x with W. Axes that are contracted or batched have the names of W's.

    Attributes:
        x: the activation; W where that is a weight too.
        at: the number of the operand that is W.
        x_axes: the axes of x.
        y_axes: the axes of y.
    """

    at: int
    x_axes: tuple[Axis, ...]
    y_axes: tuple[Axis, ...]

    def base(self, x: jax.Array) -> jax.Array:
        def dot(w: jax.Array, x: jax.Array) -> jax.Array:
            return self.eqn.bind(*((w, x) if self.at == 0 else (x, w)))

        return self.w.w.multiply(dot, x)

    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        return low_rank([self.term(delta)], delta.drop(x).astype(self.dtype))[0]

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        return gain.expand_to(self.x_axes if on_x else self.y_axes)

    def term(self, delta: Delta) -> Term:
        """Says what a delta adds to y."""
        y, precision = self.eqn.outputs[0], self.eqn.params["precision"]
        what = (*self.factors(delta), delta.gate, self.x_axes, self.y_axes)
        return Term(*what, delta.scale, y.dtype, precision, explicit(y), delta.gating)


def _contraction(eqn: Equation, at: int) -> Contraction:
    """Makes the contraction whose weight is operand `at`.

    Example: x (b, t, i) · w (i, o) gives y (b, t, o), with i, o = w.axes.
    """
    w, x = eqn.operands[at], value_of(eqn.operands[1 - at])
    contracted, batch = eqn.params["dimension_numbers"]
    meet = zip((*batch[1 - at], *contracted[1 - at]), (*batch[at], *contracted[at]), strict=True)
    shared = {d: w.axes[i] for d, i in meet}
    x_axes = tuple(shared.get(d, Axis(RANK.name - 1 - d)) for d in range(x.ndim))
    stack, inputs = (tuple(w.axes[d] for d in dims[at]) for dims in (batch, contracted))
    roles = Roles(stack, inputs, tuple(a for a in w.axes if a not in stack + inputs))
    both = w.axes + x_axes if at == 0 else x_axes + w.axes
    y_axes = (*stack, *(a for a in both if a not in stack + inputs))
    return Contraction(eqn, w, x, roles, at, x_axes, y_axes)


def _together(eqns: Sequence[Equation]) -> list[jax.Array]:
    """Multiplies an activation with several weights; what the deltas add is computed first."""
    each = [_contraction(eqn, i) for eqn in eqns for i in _weights(eqn)]
    adapted = [c for c in each if c.w.change.deltas]
    if len(each) != len(eqns) or len(adapted) < 2:
        raise Unfactorable
    try:
        terms = iter(multiply_together(adapted))
        started = [(c.x, [next(terms)]) if c.w.change.deltas else c.start() for c in each]
    except Unfactorable:
        started = [c.start() for c in each]
    return [c.finish(*begun) for c, begun in zip(each, started, strict=True)]


@rule("dot_general", is_move=False, together=_together)
def _dot_general(eqn: Equation, *_: Any) -> jax.Array:
    both = [_contraction(eqn, i) for i in _weights(eqn)]
    changed = [c for c in both if c.w.is_changed] or both[:1]
    if len(changed) == 1:  # the other weight, if any, has only to be unpacked
        return changed[0].result()
    first, second = both
    if first.w.change.gain is not None or second.w.change.gain is not None:
        raise Unfactorable("two adapted weights are multiplied, one of them with a gain")
    terms = first.terms(first.x) + second.terms(second.x)
    y = functools.reduce(first.add, terms, eqn.bind(first.w.array, second.w.array))
    return _plus_both(y, first, second)


def _weights(eqn: Equation) -> list[int]:
    """Lists the numbers of the operands that are weights."""
    return [i for i, x in enumerate(eqn.operands) if isinstance(x, Weight)]


def _plus_both(y: jax.Array, first: Contraction, second: Contraction) -> jax.Array:
    """Adds the product of the deltas of two adapted weights that are multiplied."""
    of_second = dict(zip(second.w.axes, first.x_axes, strict=True))
    of_second[RANK] = Axis(RANK.name - 1 - len(first.x_axes))
    for s in first.w.change.deltas:
        for t in second.w.change.deltas:
            (a, b), (c, d) = first.factors(s, y.dtype), second.factors(t, y.dtype)
            c, d = (f.rename(of_second) for f in (t.factor_with_gate(c), d))
            factors = (s.factor_with_gate(a), b, c, d)
            *names, out = spell(*(f.axes for f in factors), first.y_axes)
            how = {"precision": first.eqn.params["precision"], "optimize": "optimal"}
            cross = jnp.einsum(f"{','.join(names)}->{out}", *(f.value for f in factors), **how)
            y = y + jnp.asarray(s.scale * t.scale, y.dtype) * cross
    return y
