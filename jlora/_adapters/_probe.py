r"""What sketches of inputs are made with: it changes nothing, and its gradient is a statistic.

The product adds 0. In place of the cotangent of $h = x A$ it gives h itself, so that A gets

$$\bar A = x^T (x A),$$

summed over all that the model multiplies with W, wherever it does: gradients come out of loops,
rematerialized layers and meshes by themselves.
"""

from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from .. import _compat
from .._core import Change, Delta, promote
from .._types import Layout, short
from ._low_rank import LowRank, low_rank_axes, without_slots
from ._method import SLOTS, AxisOrName, Method, factor, register


class Probe(NamedTuple):
    r"""Observes the inputs x of a weight: its gradient has $x^T(x A)$, sums and counts.

    An input counts where what the weight makes of it has a gradient, so that padding does not.

    Attributes:
        a: A, as in `LowRank`. Its last column stands for an h of ones: its gradient is the sum of
            the inputs.
        b: B, as in `LowRank`, of numbers that no gradient is orthogonal to.
        gate: 0, but 1 in the last column, of shape (stack…, r), or (stack…, slots, r). Its
            gradient is the sum of h: in the last column the number of inputs.
        layout: as in `LowRank`.
    """

    a: jax.Array
    b: jax.Array
    gate: jax.Array
    layout: Layout

    def __repr__(self) -> str:
        return f"Probe(a={short(self.a)}, b={short(self.b)}, gate={short(self.gate)})"


_CHILDREN = ("a", "b", "gate")

jax.tree_util.register_pytree_with_keys(
    Probe,
    lambda x: (tuple((GetAttrKey(n), getattr(x, n)) for n in _CHILDREN), (x.layout,)),
    lambda static, children: Probe(*children, layout=static[0]),
    lambda x: ((x.a, x.b, x.gate), (x.layout,)),
)


def _axes(layout: Layout) -> dict[str, tuple[AxisOrName, ...]]:
    beside = (*layout.stack, *((SLOTS,) if layout.slots is not None else ()))
    found = low_rank_axes(layout)
    return {"a": found["a"], "b": found["b"], "gate": (*beside, "rank")}


def _observed(h: jax.Array, gate: jax.Array) -> jax.Array:
    """0; the cotangents of `h` and `gate` are what is to be summed."""
    return _zero(h, _compat.vary_with(gate, [h]))


@jax.custom_vjp
def _zero(h: jax.Array, gate: jax.Array) -> jax.Array:
    del gate
    return jnp.zeros_like(h)


def _forward(h: jax.Array, gate: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.zeros_like(h), (h, gate)


def _backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, gate = kept
    seen = jnp.where(gate == 1, jnp.ones((), h.dtype), h)
    seen = jnp.where(g != 0, seen, jnp.zeros((), h.dtype))
    constant = [i for i, n in enumerate(gate.shape) if n == 1]
    sums = seen.astype(promote(h.dtype, gate.dtype)).sum(constant, keepdims=True)
    return seen, sums.astype(gate.dtype)


_zero.defvjp(_forward, _backward)


def _no_rule(*_: Any) -> NoReturn:
    raise NotImplementedError("no rule makes a Probe")


def _lower(node: Probe, w: Any) -> Change:
    whole = without_slots(LowRank(node.a, node.b, 1.0, node.layout), w.shape)
    stack = node.gate.shape[: len(node.layout.stack)]
    # With slots the rank is slots·r.
    node = Probe(whole.a, whole.b, node.gate.reshape(*stack, -1), whole.layout)
    a, b, gate = (factor(node, name) for name in _CHILDREN)
    return Change((Delta(a, b, 1.0, gate=gate, gating=_observed),))


register(
    Method(
        rule=None,
        node=Probe,
        labels={"a": "base", "b": "base", "gate": "base"},
        axes=_axes,
        sizes=_no_rule,
        fit=_no_rule,
        start=_no_rule,
        lower=_lower,
    )
)
