"""All adapters of a table at one site, concatenated, of which each call uses one."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._core import Change, Delta
from .._types import Layout
from ._low_rank import LowRank, without_slots
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
        """What each axis of A, of B, of the gate and of the dropout keys follows."""
        return LowRank.axes(layout) | {"gate": ("rank",)}

    def lower(self, w: Any) -> Change:
        """W + s·A·diag(g)·B."""
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
