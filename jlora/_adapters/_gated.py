r"""Nodes whose low-rank path has a gate: `Routed` for tables, and `Probe` for sketches.

The gate of `Probe` adds 0 to the product, and its backward pass returns h itself as the cotangent
of $h = x A$. So the gradient of A is

$$\bar A = x^T (x A),$$

and automatic differentiation sums it over all inputs that the model multiplies with W, also through
loops, rematerialized layers and meshes.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from .. import _compat
from .._arrays import promote
from .._core import Change, Delta, Factor
from .._node import Axes, Node
from .._quantized import Quantized
from .._types import Layout
from ._low_rank import LowRank, stack_and_slots, without_slots
from ._register import register


@register
class Routed(Node):
    r"""Several adapters as one: $\Delta W = s \, A \, \mathrm{diag}(g) \, B$.

    g is 1 for the columns of the adapter that a call uses, else 0. `jlora.many.route` gives this
    node to the apply function. It is neither trained nor saved.

    Attributes:
        a: the A of all slots of a table, concatenated along the rank: a `LowRank`'s A of rank
            slots·r.
        b: the B of all slots, concatenated likewise.
        gate: g, shape (slots·r,). Where it is 0, x·A counts as 0, even if it is not finite; so does
            x·Bᵀ in a tied head. Or the index of a slot, whose A and B are taken out of `a` and `b`
            where they are used; -1 is none. None until a call chooses.
        slots: how many adapters there are.
        scale: as in `LowRank`.
        layout: which axes of W are which.
        dropout: probability of dropping an input of A.
        materialize: whether jlora may form W + ΔW.
        key: keys while dropout is active, else None: those of each slot until a call chooses.
    """

    a: jax.Array
    b: jax.Array
    gate: jax.Array | None
    slots: int
    scale: float
    layout: Layout
    dropout: float = 0.0
    materialize: bool = False
    key: jax.Array | None = None

    labels: ClassVar = {"a": "base", "b": "base", "gate": None, "key": None}

    @staticmethod
    def axes(layout: Layout) -> Axes:
        """Returns what each axis of A, B, the gate and the keys follows."""
        return LowRank.axes(layout) | {"gate": ("rank",)}

    @property
    def key_shape(self) -> tuple[int, ...]:
        """The shape of dropout keys: each slot has its own."""
        return (self.slots, *super().key_shape)

    def lower(self, w: jax.Array | Quantized) -> Change:
        """Returns the change W + s·A·diag(g)·B."""
        if self.gate is None:
            raise TypeError(
                "`adapter` is a table of several adapters from jlora.many.prepare. Choose one for "
                "each row: call jlora.many.route(lora.apply)(base, table, ids, ...)."
            )
        node = without_slots(self, w.shape)
        key = None if node.key is None else node.factor("key")
        delta = Delta(node.factor("a"), node.factor("b"), node.scale, key, node.dropout)
        repeats = node.a.shape[-1] // self.a.shape[-1]  # above 1 for slots of a fused weight
        if self.gate.ndim == 0:
            how = {"slot": Factor(self.gate, ()), "parts": (repeats, self.slots)}
            return Change((dataclasses.replace(delta, **how),))
        gate = node._replace(gate=jnp.tile(self.gate, repeats)).factor("gate")
        return Change((dataclasses.replace(delta, gate=gate),))


@register
class Probe(Node):
    r"""Observes the inputs x of a weight.

    The gradients of A and of the gate are statistics of the inputs: $x^T(x A)$, the sum of x, and
    how many there were.

    An input counts only if its output has a gradient, so padding does not count.

    Attributes:
        a: A, as in `LowRank`. The gradient of its last column is the sum of the inputs, as h counts
            as 1 there.
        b: B, as in `LowRank`, random, so that no gradient is orthogonal to it.
        gate: 0, but 1 in the last column; shape (stack…, r), or (stack…, slots, r). Its gradient is
            the sum of h, which is the number of inputs in the last column.
        layout: as in `LowRank`.
    """

    a: jax.Array
    b: jax.Array
    gate: jax.Array
    layout: Layout

    labels: ClassVar = {"a": "base", "b": "base", "gate": "base"}

    @staticmethod
    def axes(layout: Layout) -> Axes:
        """Returns what each axis of A, B and the gate follows."""
        axes = LowRank.axes(layout)
        return {"a": axes["a"], "b": axes["b"], "gate": (*stack_and_slots(layout), "rank")}

    def lower(self, w: jax.Array | Quantized) -> Change:
        """Returns a change of 0, whose gradient is a statistic."""
        stack = self.gate.shape[: len(self.layout.stack)]
        node = self._replace(gate=self.gate.reshape(*stack, -1))  # with slots the rank is slots·r
        node = without_slots(node, w.shape)
        a, b, gate = (node.factor(name) for name in ("a", "b", "gate"))
        return Change((Delta(a, b, 1.0, gate=gate, gating=_observe),))


def _observe(h: jax.Array, gate: jax.Array) -> jax.Array:
    """Returns 0; the cotangents of `h` and `gate` are the statistics."""
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
