"""The adapters of a whole table at a site, side by side, of which a call uses one."""

from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from .._core import Change, Delta
from .._types import Layout, short
from ._low_rank import LowRank, low_rank_axes, without_slots
from ._method import AxisOrName, Method, factor, register


class Routed(NamedTuple):
    r"""$\Delta W = s \, A \, \mathrm{diag}(g) \, B$, with g 1 for the columns that a call uses.

    What `jlora.many.route` gives the apply function: no state, and nothing that is saved.

    Attributes:
        a: the A of all slots of a table side by side, as in `LowRank` of rank slots·r.
        b: their B.
        gate: g, shape (slots·r,). Where it is 0, x·A is taken for 0, whatever it is, as is x·Bᵀ in
            a tied head. None until a call says which columns it uses.
        slots: how many adapters there are.
        scale: as in `LowRank`, and so are the others.
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

    def __repr__(self) -> str:
        return f"Routed(a={short(self.a)}, b={short(self.b)}, slots={self.slots})"


_CHILDREN = ("a", "b", "gate", "key")


def _children(x: Routed) -> tuple[Any, ...]:
    return tuple(getattr(x, name) for name in _CHILDREN)


def _static(x: Routed) -> tuple[Any, ...]:
    return x.slots, x.scale, x.layout, x.dropout, x.materialize


def _unflatten(static: tuple[Any, ...], children: Any) -> Routed:
    a, b, gate, key = children
    slots, scale, layout, dropout, materialize = static
    return Routed(a, b, gate, slots, scale, layout, dropout, materialize, key)


jax.tree_util.register_pytree_with_keys(
    Routed,
    lambda x: (tuple(zip(map(GetAttrKey, _CHILDREN), _children(x), strict=True)), _static(x)),
    _unflatten,
    lambda x: (_children(x), _static(x)),
)


def _axes(layout: Layout) -> dict[str, tuple[AxisOrName, ...]]:
    return low_rank_axes(layout) | {"gate": ("rank",)}


def _no_rule(*_: Any) -> NoReturn:
    raise NotImplementedError("no rule makes a Routed")


def _lower(node: Routed, w: Any) -> Change:
    if node.gate is None:
        raise TypeError(
            "`adapter` is a table from jlora.many.prepare, of which a call uses one slot a row: "
            "call jlora.many.route(lora.apply)(base, table, ids, ...)."
        )
    whole = without_slots(LowRank(node.a, node.b, node.scale, node.layout), w.shape)
    if node.layout.slots is not None:  # the rank is slots·r then
        count = whole.a.shape[-1] // node.a.shape[-1]
        node = node._replace(gate=jnp.tile(node.gate, count))
    node = node._replace(a=whole.a, b=whole.b, layout=whole.layout)
    key = None if node.key is None else factor(node, "key")
    a, b, gate = (factor(node, name) for name in ("a", "b", "gate"))
    return Change((Delta(a, b, node.scale, key, node.dropout, gate),))


register(
    Method(
        rule=None,
        node=Routed,
        labels={"a": "base", "b": "base", "gate": None, "key": None},
        axes=_axes,
        sizes=_no_rule,
        fit=_no_rule,
        start=_no_rule,
        lower=_lower,
    )
)
