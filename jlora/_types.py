"""The trees: the `Layout` of a weight, bound leaves, and the combined `Params`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

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


class Adapted(NamedTuple):
    """A leaf of a bound tree: the frozen weight beside its adapter.

    Attributes:
        base: W.
        delta: the node of its adapter, such as a `LowRank`.
    """

    base: jax.Array
    delta: Any


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
