"""The node of LoRA, A and B of one weight, and its matrices."""

import math
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays import promote
from .._core import Change, Delta
from .._node import SLOTS, Axes, Node
from .._quantized import Quantized
from .._types import Layout
from ._register import register

N = TypeVar("N", bound=Any)


def stack_and_slots(layout: Layout) -> tuple[int | str, ...]:
    """Returns the first axes of A and B, which have a matrix for each stack entry and each slot."""
    return (*layout.stack, *((SLOTS,) if layout.slots is not None else ()))


@register
class LowRank(Node):
    r"""One adapted weight: $\Delta W = s \cdot A B$ (Hu et al., arXiv 2106.09685, section 4.1).

    A pytree node with the children `a`, `b` and `key`; the rest is static.

    Attributes:
        a: A, shape (stack…, inputs…, r), or (stack…, slots, inputs…, r) with slots.
        b: B, shape (stack…, r, outputs…), or (stack…, slots, r, outputs…) with slots, where the
            slotted output axis has 1 / count of W's length.
        scale: s: alpha / r, or alpha / √r.
        layout: which axes of W are which.
        dropout: probability of dropping an input of A, in [0, 1).
        materialize: whether jlora may form W + ΔW where it has no factored form.
        key: keys of shape (stack…) while dropout is active, else None. See `jlora.dropout`.
        frozen: `("a",)` or `("b",)` if that factor is not trained.
        residual: whether the node belongs to a base that its initializer changed, such as
            W - s·A·B, rather than to the original parameters.

    To scale ΔW, scale B alone: ΔW is a product, so doubling both A and B gives four times ΔW.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> _, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> print(adapter)
        {'w': LowRank(a=float32[4,2], b=float32[2,3], scale=16.0)}
        >>> halve = lambda x, label: x / 2 if label == "b" else x
        >>> half = jax.tree.map(halve, adapter, jlora.labels(adapter))
    """

    a: jax.Array
    b: jax.Array
    scale: float
    layout: Layout
    dropout: float = 0.0
    materialize: bool = False
    key: jax.Array | None = None
    frozen: tuple[str, ...] = ()
    residual: bool = False

    labels: ClassVar = {"a": "a", "b": "b", "key": None}

    @staticmethod
    def axes(layout: Layout) -> Axes:
        """Returns what each axis of A, B and the dropout keys follows."""
        stack = stack_and_slots(layout)
        return {
            "a": (*stack, *layout.inputs, "rank"),
            "b": (*stack, "rank", *layout.outputs),
            "key": layout.stack,
        }

    def lower(self, w: jax.Array | Quantized) -> Change:
        """Returns the change W + s·A·B."""
        node = without_slots(stop_gradients(self), w.shape)
        key = None if node.key is None else node.factor("key")
        return Change((Delta(node.factor("a"), node.factor("b"), node.scale, key, node.dropout),))


def factor_shapes(
    layout: Layout, shape: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of A and B for a weight of `shape`."""
    found = LowRank.shapes(layout, shape, {"rank": rank})
    return found["a"], found["b"]


def without_slots(node: N, shape: tuple[int, ...]) -> N:
    """Replaces the A and B of all slots by one A and one B with the same ΔW.

    Their rank is slots·r, and each row of B is 0 outside of its slot of the outputs.
    """
    if node.layout.slots is None:
        return node
    count, chosen, axis = node.layout.slots
    n = len(node.layout.stack)
    out = node.layout.outputs.index(axis)
    r = node.a.shape[-1]
    length = shape[axis] // count

    def place(i: int, slot: int) -> jax.Array:
        b = jnp.take(node.b, i, axis=n)  # (stack…, r, outputs…)
        pads = [(0, 0)] * b.ndim
        pads[n + 1 + out] = (slot * length, (count - 1 - slot) * length)
        return jnp.pad(b, pads)

    b = jnp.concatenate([place(i, slot) for i, slot in enumerate(chosen)], axis=n)
    a = jnp.moveaxis(node.a, n, -2)  # (stack…, inputs…, slots, r)
    a = a.reshape(*a.shape[:-2], len(chosen) * r)
    return node._replace(a=a, b=b, layout=node.layout._replace(slots=None))


def stop_gradients(node: LowRank) -> LowRank:
    """Stops the gradients of frozen factors, whatever the optimizer does."""
    return node._replace(**{name: lax.stop_gradient(getattr(node, name)) for name in node.frozen})


def leading_axes(node: LowRank) -> int:
    """Counts the axes of A and B before those of a matrix: the stack, and one for slots."""
    return len(stack_and_slots(node.layout))


def matrices(node: LowRank) -> tuple[jax.Array, jax.Array]:
    """Returns s·A as (stack and slots…, inputs, r) and B as (stack and slots…, r, outputs).

    Both are in float32 or better.
    """
    wide = promote(node.a.dtype, node.b.dtype, jnp.float32)
    a, b = (jnp.asarray(x, wide) for x in (node.a, node.b))
    n = leading_axes(node)
    rank = a.shape[-1]
    a = a.reshape(*a.shape[:n], math.prod(a.shape[n:-1]), rank)
    return node.scale * a, b.reshape(*b.shape[:n], rank, math.prod(b.shape[n + 1 :]))


def from_matrices(a: jax.Array, b: jax.Array, layout: Layout, shape: tuple[int, ...]) -> LowRank:
    """Makes the node of scale 1 whose `matrices` are A and B, for a weight of `shape`."""
    of_a, of_b = factor_shapes(layout, shape, a.shape[-1])
    return LowRank(a.reshape(of_a), b.reshape(of_b), 1.0, layout)


def matrix_lengths(layout: Layout, shape: tuple[int, ...]) -> tuple[int, int]:
    """Counts the inputs and outputs of each matrix of a weight, or of each slot if it has slots."""
    inputs, outputs = (math.prod(shape[d] for d in axes) for axes in layout[1:3])
    return inputs, outputs // (layout.slots[0] if layout.slots else 1)
