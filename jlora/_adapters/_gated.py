r"""Nodes whose low-rank path has a gate: `Routed` of tables, and `Probe` of sketches.

The product adds 0, and its backward pass gives h itself as the cotangent of $h = x A$. The gradient
of A is then

$$\bar A = x^T (x A),$$

summed over all inputs that the model multiplies with W, as gradients come out of loops,
rematerialized layers and meshes by themselves.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .. import _compat
from .._core import Change, Delta, promote
from .._types import Layout
from ._low_rank import LowRank, stack_and_slots, without_slots
from ._node import Axes, Node, register


@register
class Routed(Node):
    r"""$\Delta W = s \, A \, \mathrm{diag}(g) \, B$, with g = 1 for the columns that a call uses.

    `jlora.many.route` gives it to the apply function. It is neither trained nor saved.

    Attributes:
        a: the A of all slots of a table, concatenated to that of a `LowRank` of rank slots·r.
        b: their B, likewise.
        gate: g, shape (slots·r,). Where it is 0, x·A is taken for 0, whatever it is, as is x·Bᵀ in
            a tied head. None until a call chooses its columns.
        slots: how many adapters there are.
        scale: as in `LowRank`.
        layout: which axes of W are which.
        dropout: probability of dropping an input of A.
        materialize: whether W + ΔW may be formed.
        key: keys while dropout is active, else None.
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
        """Says what each axis of A, of B, of the gate and of the keys follows."""
        return LowRank.axes(layout) | {"gate": ("rank",)}

    def lower(self, w: Any) -> Change:
        """Returns the change W + s·A·diag(g)·B."""
        if self.gate is None:
            raise TypeError(
                "`adapter` is a table from jlora.many.prepare, of which a call uses one slot a "
                "row: call jlora.many.route(lora.apply)(base, table, ids, ...)."
            )
        node = without_slots(self, w.shape)
        if self.layout.slots is not None:  # the rank is slots·r then
            node = node._replace(gate=jnp.tile(self.gate, node.a.shape[-1] // self.a.shape[-1]))
        key = None if node.key is None else node.factor("key")
        a, b, gate = (node.factor(name) for name in ("a", "b", "gate"))
        return Change((Delta(a, b, node.scale, key, node.dropout, gate),))


@register
class Probe(Node):
    r"""Observes the inputs x of a weight: its gradient has $x^T(x A)$, their sum and their number.

    An input counts only if its output has a gradient, so that padding does not.

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

    labels: ClassVar = {"a": "base", "b": "base", "gate": "base"}

    @staticmethod
    def axes(layout: Layout) -> Axes:
        """Says what each axis of A, of B and of the gate follows."""
        axes = LowRank.axes(layout)
        return {"a": axes["a"], "b": axes["b"], "gate": (*stack_and_slots(layout), "rank")}

    def lower(self, w: Any) -> Change:
        """Returns a change of 0, whose gradient is a statistic."""
        stack = self.gate.shape[: len(self.layout.stack)]
        node = self._replace(gate=self.gate.reshape(*stack, -1))  # with slots the rank is slots·r
        node = without_slots(node, w.shape)
        a, b, gate = (node.factor(name) for name in ("a", "b", "gate"))
        return Change((Delta(a, b, 1.0, gate=gate, gating=_observe),))


def _observe(h: jax.Array, gate: jax.Array) -> jax.Array:
    """Gives 0, with the statistics as the cotangents of `h` and `gate`."""
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
