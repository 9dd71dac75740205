"""The trees: `LowRank` leaves of an adapter, their `Layout`, and the combined `Params`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.tree_util import GetAttrKey

PyTree = Any
Path = tuple[str, ...]


class Layout(NamedTuple):
    """What the model does with each axis of a weight W.

    Attributes:
        stack: axes over which W is a stack of independent matrices (scanned layers, experts).
        inputs: axes that the model contracts with its activations.
        outputs: axes that the product keeps.
        slots: `(count, chosen, axis)` where only the slots `chosen` of the `count` equal parts of
            W's axis `axis` are adapted, each with its own A and B; else None.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    slots: tuple[int, tuple[int, ...], int] | None = None


class LowRank(NamedTuple):
    r"""One adapted weight: $\Delta W = s \cdot A B$ (Hu et al., arXiv 2106.09685, section 4.1).

    A pytree node with the children `a`, `b` and `key`; the rest is static.

    Attributes:
        a: A, shape (stack…, inputs…, r), or (stack…, slots, inputs…, r) with slots.
        b: B, shape (stack…, r, outputs…), or (stack…, slots, r, outputs…) with slots, where the
            slotted output axis has 1 / count of W's length.
        scale: s, a number without units: alpha / r, or alpha / √r.
        layout: which axes of W are which.
        dropout: probability of dropping an input of A, in [0, 1).
        materialize: whether W + ΔW may be formed where the model leaves no other way.
        key: keys of shape (stack…) while dropout is active, else None. See `jlora.dropout`.
    """

    a: jax.Array
    b: jax.Array
    scale: float
    layout: Layout
    dropout: float = 0.0
    materialize: bool = False
    key: jax.Array | None = None


def _unflatten(static: tuple[Any, ...], children: Any) -> LowRank:
    a, b, key = children
    scale, layout, dropout, materialize = static
    return LowRank(a, b, scale, layout, dropout, materialize, key)


# A NamedTuple, so that `flax.serialization` saves it without an import of Flax here; registered,
# so that JAX sees the static fields as structure and not as leaves.
jax.tree_util.register_pytree_with_keys(
    LowRank,
    lambda x: (
        tuple((GetAttrKey(name), getattr(x, name)) for name in ("a", "b", "key")),
        (x.scale, x.layout, x.dropout, x.materialize),
    ),
    _unflatten,
    lambda x: ((x.a, x.b, x.key), (x.scale, x.layout, x.dropout, x.materialize)),
)


class Adapted(NamedTuple):
    """A leaf of a bound tree: the frozen weight beside its adapter.

    Attributes:
        base: W.
        delta: the `LowRank` node that is added to it.
    """

    base: jax.Array
    delta: LowRank


class Params(NamedTuple):
    """Base and adapter in one tree, for code that holds one, as Flax's `TrainState` does.

    Attributes:
        base: the frozen tree.
        adapter: the trainable tree.
    """

    base: PyTree
    adapter: PyTree


class Transformed(NamedTuple):
    """What `jlora.transform` returns: three pure functions.

    Attributes:
        init: `(key, params, *args, **kwargs) -> (base, adapter)`.
        apply: `(base, adapter, *args, **kwargs) -> outputs of the apply function`.
        sites: `(params, *args, **kwargs) -> Sites`.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., Any]
    sites: Callable[..., Any]
