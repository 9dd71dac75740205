"""Contractions with a weight: `dot_general` and convolutions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._arrays import explicit
from ._axes import RANK, Axis, Factor, ProductAxes, Unfactorable
from ._change import Delta
from ._factored import Term, low_rank
from ._interpret import Equation, primitive
from ._product import Product
from ._weight import Operand, Weight


@dataclasses.dataclass(frozen=True)
class Contraction(Product):
    """A contraction of x with W. Contracted and batched axes of x have the names of W's axes.

    Attributes:
        x: the activation; if it is a weight too, its W.
        at: the index of the operand that is W.
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
        return low_rank([self.term(delta)], delta.drop(x.astype(self.dtype)))[0]

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        return gain.expand_to(self.x_axes if on_x else self.y_axes)

    def term(self, delta: Delta) -> Term:
        """Returns what a delta adds to y."""
        y, precision = self.eqn.outputs[0], self.eqn.params["precision"]
        delta = self.ordered(delta)
        return Term(delta, self.x_axes, self.y_axes, y.dtype, precision, explicit(y))

    @property
    def only_term(self) -> Term:
        """What its only delta adds, with the inputs of its A in the order of x.

        Raises `Unfactorable` unless x·A is small and depends on x and A only.
        """
        deltas = self.w.change.deltas
        gain = self.w.change.gain
        inputs = {*self.roles.inputs}
        if len(deltas) != 1 or self.roles.stack or deltas[0].key is not None:
            raise Unfactorable
        term = self.term(deltas[0])
        a, b = term.delta.a, term.delta.b
        is_plain = {*a.axes} == {*inputs, RANK} and inputs.isdisjoint(b.axes)
        on_x = gain is not None and not inputs.isdisjoint(gain.axes)
        if not is_plain or on_x or explicit(self.x) is not None:
            raise Unfactorable
        a = a.to_front([axis for axis in term.x if axis in inputs])
        term = dataclasses.replace(term, delta=dataclasses.replace(term.delta, a=a))
        if not term.is_kept(self.x):
            raise Unfactorable
        return term


def _contraction(eqn: Equation, at: int) -> Contraction:
    """Makes the contraction whose weight is operand `at`; another weight is formed.

    Example: x (b, t, i) · w (i, o) gives y (b, t, o), with i, o = w.axes.
    """
    w = eqn.operands[at]
    x = eqn.operands[1 - at]
    x = x.form(eqn.where) if isinstance(x, Weight) else x
    assert isinstance(w, Weight)
    contracted, batch = eqn.params["dimension_numbers"]
    meet = zip((*batch[1 - at], *contracted[1 - at]), (*batch[at], *contracted[at]), strict=True)
    shared = {d: w.axes[i] for d, i in meet}
    x_axes = tuple(shared.get(d, Axis(RANK.name - 1 - d)) for d in range(x.ndim))
    stack, inputs = (tuple(w.axes[d] for d in dims[at]) for dims in (batch, contracted))
    roles = ProductAxes(stack, inputs, tuple(a for a in w.axes if a not in stack + inputs))
    both = w.axes + x_axes if at == 0 else x_axes + w.axes
    y_axes = (*stack, *(a for a in both if a not in stack + inputs))
    return Contraction(eqn, w, x, roles, at, x_axes, y_axes)


def _together(eqns: Sequence[Equation]) -> list[jax.Array]:
    """Multiplies an activation with several weights; it computes what the deltas add first."""
    each = [_contraction(eqn, i) for eqn in eqns for i in _weights(eqn)]
    adapted = [c for c in each if c.w.change.deltas]
    if len(each) != len(eqns) or len(adapted) < 2:
        raise Unfactorable
    try:
        terms = iter(_multiply_together(adapted))
        started = [(c.x, [next(terms)]) if c.w.change.deltas else c.start() for c in each]
    except Unfactorable:
        started = [c.start() for c in each]
    return [c.finish(*begun) for c, begun in zip(each, started, strict=True)]


def _multiply_together(products: Sequence[Contraction]) -> list[jax.Array]:
    """Computes what the only delta of each contraction adds, and reads the activation once."""
    first = products[0]
    terms = [c.only_term for c in products]
    forms = {
        (tuple(map(t.x.index, t.delta.a.axes[:-1])), c.dtype, str(t.precision), t.delta.gating)
        for c, t in zip(products, terms, strict=True)
    }
    if len(forms) != 1:
        raise Unfactorable
    return low_rank(terms, first.w.change.deltas[0].drop(first.x.astype(first.dtype)))


@primitive("dot_general", is_move=False, together=_together)
def _dot_general(eqn: Equation, *_: Operand) -> jax.Array:
    weights = _weights(eqn)
    changed = [i for i, w in weights.items() if w.is_changed] or [*weights][:1]
    # Of two adapted weights, the other one is formed: a product of their deltas would need both.
    results = [_contraction(eqn, i).result() for i in changed]
    return results[0]


def _weights(eqn: Equation) -> dict[int, Weight]:
    """Returns the operands that are weights by their index."""
    return {i: x for i, x in enumerate(eqn.operands) if isinstance(x, Weight)}


@primitive("conv_general_dilated", is_move=False)
def _conv_general_dilated(eqn: Equation, x: Operand, w: Operand) -> jax.Array:
    if not isinstance(w, Weight) or isinstance(x, Weight):
        raise Unfactorable("the weight is not the kernel")
    outer, inner, *spatial = eqn.params["dimension_numbers"].rhs_spec
    inputs = tuple(w.axes[d] for d in (*sorted(spatial), inner))
    return _Convolution(eqn, w, x, ProductAxes((), inputs, (w.axes[outer],))).result()


@dataclasses.dataclass(frozen=True)
class _Convolution(Product):
    """A convolution of x with the kernel W."""

    kind = "conv"

    def base(self, x: jax.Array) -> jax.Array:
        return self.w.w.multiply(lambda w, x: self.eqn.bind(x, w), x)

    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        p, numbers, (axes, [outer]) = self.eqn.params, self._numbers, self.roles[1:]
        groups, batches = p["feature_group_count"], p["batch_group_count"]
        x = delta.drop(x.astype(self.dtype))
        delta = self.ordered(delta)
        a, b = delta.a, delta.b
        if outer in a.axes or set(axes) & set(b.axes):
            raise Unfactorable("its inputs and outputs are mixed")
        # A is a kernel with r outputs, the same for every group; B contracts them. For example, x
        # has 4 channels in 2 groups, W is (6, 2, window) and r = 3: A is (3, 2, window), given
        # twice, h has 2 groups of 3, and B of shape (3, 6) gives each group its own 3 outputs.
        kernel = a.expand_to([RANK if axis == outer else axis for axis in self.w.axes])
        kernel = jnp.concatenate([kernel] * groups, numbers.rhs_spec[0])
        window = (p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])
        how = {"precision": p["precision"]}
        h = lax.conv_general_dilated(x, kernel, *window, numbers, groups, **how)
        order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        h = h.transpose(order)  # (batch, *spatial, groups * r)
        h = h.reshape(*h.shape[:-1], groups, a.length(RANK))
        h = delta.scale * delta.apply_gate(h, [*[None] * (h.ndim - 1), RANK])
        b = b.expand_to((RANK, outer))
        rank, outputs = b.shape
        b = b.reshape(rank, batches, groups, outputs // (groups * batches))
        h = h.reshape(batches, h.shape[0] // batches, *h.shape[1:])
        y = jnp.einsum("bn...gr,rbgo->n...bgo", h, b, **how)
        return y.reshape(*y.shape[:-3], outputs).transpose(np.argsort(order))

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        spec = self._numbers.lhs_spec if on_x else self._numbers.out_spec
        axis = self.w.axes[self._numbers.rhs_spec[int(on_x)]]
        if set(gain.axes) != {axis} or (on_x and self.eqn.params["feature_group_count"] > 1):
            raise Unfactorable("its gain differs within the window or between groups")
        return gain.expand_to([axis if d == spec[1] else None for d in range(self.x.ndim)])

    @property
    def _numbers(self) -> Any:
        return self.eqn.params["dimension_numbers"]
