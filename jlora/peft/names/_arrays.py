"""Arrays of a leaf to those of PyTorch's modules and back, by the row that names it.

Axes are permuted and flattened. Values of A and B never change, nor do those of magnitudes and of
weights unless their row says so.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._adapters import SLOTS, Decomposed, LowRank, Replaced, without_slots
from ..._types import Layout
from ._names import RANK, Groups, Leaf, lengths

Pair = tuple[np.ndarray, np.ndarray]


def adapted(leaf: Leaf, delta: LowRank | Decomposed) -> Leaf:
    """That of the modules of `leaf` which `delta` adapts."""
    slots = _slots_by_module(leaf, delta)
    return leaf if slots is None else leaf.only(slots)


def _slots_by_module(leaf: Leaf, delta: LowRank | Decomposed) -> tuple[int, ...] | None:
    """The slots of `delta` if each is a module of `leaf`."""
    ours, theirs = delta.layout.slots, leaf.layout.slots
    return ours[1] if ours and theirs and ours[::2] == theirs[::2] else None


def factors(leaf: Leaf, delta: LowRank) -> list[Pair]:
    """PEFT's A and B for each module of `leaf`, which are those that `delta` adapts.

    Slots of what is one module there have no equivalent: they become one A of rank slots·r and one
    B with zeros outside of each slot's own outputs, which is the same ΔW exactly.
    """
    if _slots_by_module(leaf, delta) is None:
        delta = without_slots(delta, leaf.shape)
    a, b = ((_squeezed(getattr(delta, n), delta.layout, n), _axes(delta.layout)[n]) for n in "ab")
    a, b = (b, a) if leaf.name.swapped else (a, b)
    packed = _pack(*a, leaf.name.a_groups, leaf), _pack(*b, leaf.name.b_groups, leaf)
    return list(zip(*packed, strict=True))


def low_rank(leaf: Leaf, pairs: Sequence[Pair], rank: int, **static: Any) -> LowRank:
    """The node of `leaf` from PEFT's A and B of each of its modules: the inverse of `factors`."""
    name, axes = leaf.name, _axes(leaf.layout)
    of_a, of_b = "ba" if name.swapped else "ab"
    a = _unpack([a for a, _ in pairs], axes[of_a], name.a_groups, leaf, rank)
    b = _unpack([b for _, b in pairs], axes[of_b], name.b_groups, leaf, rank)
    a, b = (b, a) if name.swapped else (a, b)
    b = _expanded(b, leaf.layout, "b")
    return LowRank(jnp.asarray(a), jnp.asarray(b), layout=leaf.layout, **static)


def magnitudes(leaf: Leaf, delta: Decomposed) -> list[np.ndarray]:
    """PEFT's magnitudes for each module of `leaf`, which are those that `delta` adapts.

    Slots of what is one module there are all of them.
    """
    m, layout = np.asarray(delta.m), delta.layout
    if layout.slots is not None and _slots_by_module(leaf, delta) is None:
        count, chosen, axis = layout.slots
        at = len(layout.stack)
        parts = [m.take(chosen.index(i), at) for i in range(count)]
        m = np.concatenate(parts, at + layout.outputs.index(axis))
        layout = layout._replace(slots=None)
    m = _rounded(lambda m: m / abs(leaf.factor), leaf, _squeezed(m, layout, "m"))
    return _pack(m, _axes(layout)["m"], leaf.name.m_groups, leaf)


def decomposed(leaf: Leaf, delta: LowRank, ms: Sequence[np.ndarray]) -> Decomposed:
    """The node of `leaf` from PEFT's magnitudes of each of its modules, and its A and B."""
    if leaf.name.part is not None:
        j, n = leaf.name.part
        ms = [np.split(m, n)[j] for m in ms]
    m = _unpack(ms, _axes(leaf.layout)["m"], leaf.name.m_groups, leaf, 0)
    m = _rounded(lambda m: m * abs(leaf.factor), leaf, _expanded(m, leaf.layout, "m"))
    return Decomposed(delta.a, delta.b, jnp.asarray(m), delta.scale, delta.layout)


def of_part(leaf: Leaf, pairs: Sequence[Pair]) -> Sequence[Pair]:
    """What of PEFT's A and B of each parameter belongs to `leaf`, where that is a part of them.

    Of B the rows of its outputs. Of A and B its own ranks alone where those of all parts lie beside
    one another, with zeros around each in B, as `save` writes parts of which each has its own A.
    """
    if leaf.name.part is None:
        return pairs
    (j, n), experts = leaf.name.part, leaf.experts
    a = np.stack([a.reshape(experts, -1, a.shape[1]) for a, _ in pairs])
    b = np.stack([b.reshape(n, len(b) // n, -1, experts) for _, b in pairs])
    rank = b.shape[3] // n
    if rank * n == b.shape[3]:
        blocks = b.reshape(*b.shape[:3], n, rank, experts)
        if np.array_equal(blocks.any(axis=(0, 2, 4, 5)), np.eye(n)):
            a, b = a[:, :, j * rank : (j + 1) * rank], blocks[:, :, :, j]
    each = zip(a, b[:, j], strict=True)
    return [(x.reshape(-1, x.shape[-1]), y.reshape(len(y), -1)) for x, y in each]


def rows_of(leaf: Leaf, node: Replaced) -> np.ndarray:
    """PyTorch's rows in the place of those that `node` replaces, (k, dim)."""
    v = _rounded(lambda v: v / leaf.factor, leaf, node.v)
    axes = (*leaf.name.where("v"), *leaf.name.where("o"))
    [found] = _pack(v, axes, leaf.name.weight_groups, leaf)
    return found


def replaced(leaf: Leaf, rows: tuple[int, ...], v: np.ndarray) -> Replaced:
    """The node of `leaf` from PyTorch's rows: the inverse of `rows_of`."""
    [axis], outputs = leaf.name.where("v"), leaf.name.where("o")
    few = leaf._replace(shape=(*leaf.shape[:axis], len(rows), *leaf.shape[axis + 1 :]))
    v = _unpack([v], (axis, *outputs), leaf.name.weight_groups, few, 0)
    v = _rounded(lambda v: v * leaf.factor, leaf, v)
    return Replaced(jnp.asarray(v), rows, leaf.layout)


def _axes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """The axes of A, B and m: the rank beside those of the weight, slots first of all outputs."""
    slots = layout.slots
    outputs = tuple(d for d in layout.outputs if slots is None or d != slots[2])

    def axis(of: int | str) -> int:
        if of == SLOTS and slots is not None:
            return slots[2]
        return of if isinstance(of, int) else RANK

    found = Decomposed.axes(layout._replace(outputs=outputs))
    return {name: tuple(map(axis, axes)) for name, axes in found.items()}


def _lone_axes(layout: Layout, name: str) -> tuple[int, ...]:
    """The axis of B or m that has the length 1, as there is an axis of slots beside it."""
    if layout.slots is None or name == "a":
        return ()
    return (Decomposed.axes(layout)[name].index(layout.slots[2]),)


def _squeezed(x: Any, layout: Layout, name: str) -> Any:
    lone = _lone_axes(layout, name)
    return np.squeeze(x, lone) if lone else x


def _expanded(x: np.ndarray, layout: Layout, name: str) -> np.ndarray:
    lone = _lone_axes(layout, name)
    return np.expand_dims(x, lone) if lone else x


def weights(leaf: Leaf, value: Any) -> list[np.ndarray]:
    """PyTorch's parameter for each module of `leaf`."""
    own = _rounded(lambda x: x / leaf.factor, leaf, value)
    return _pack(own, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf)


def weight(leaf: Leaf, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `weights`, but for rounding where values change."""
    x = _unpack(parts, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf, 0)
    return _rounded(lambda x: x * leaf.factor, leaf, x)


def _rounded(change: Callable[[np.ndarray], np.ndarray], leaf: Leaf, x: Any) -> np.ndarray:
    """`change` of the values of a leaf that is a multiple, in at least float32, rounded once."""
    x = np.asarray(x)
    if leaf.name.times is None:
        return x
    return change(x.astype(np.promote_types(x.dtype, np.float32))).astype(x.dtype)


def _pack(x: Any, axes: tuple[int, ...], groups: Groups, leaf: Leaf) -> list[np.ndarray]:
    x = np.asarray(x)
    stacked = leaf.name.where("ls")
    order = [*stacked, *itertools.chain(*groups)]
    # Modules or experts that share a factor here get a copy each.
    shared = tuple(d for d in order if d not in axes)
    axes = (*shared, *axes)
    x = np.broadcast_to(x, (*(leaf.shape[d] for d in shared), *x.shape))
    sizes = dict(zip(axes, x.shape, strict=True))
    x = _reordered(x, axes, leaf, lambda pairs: pairs.T)
    x = np.transpose(x, [axes.index(d) for d in order])
    x = x.reshape(lengths([stacked, *groups], sizes))
    # Contiguous: the writer of safetensors takes the memory as it lies.
    return [np.ascontiguousarray(part) for part in x]


def _unpack(
    parts: Sequence[np.ndarray], axes: tuple[int, ...], groups: Groups, leaf: Leaf, rank: int
) -> np.ndarray:
    sizes = {**dict(enumerate(leaf.shape)), RANK: rank}
    order = [*leaf.name.where("ls"), *itertools.chain(*groups)]
    x = np.stack(parts).reshape([sizes[d] for d in order])
    x = np.transpose(x, [order.index(d) for d in axes])
    return _reordered(x, axes, leaf, lambda pairs: pairs.reshape(2, -1).T)


def _reordered(
    x: np.ndarray, axes: tuple[int, ...], leaf: Leaf, order: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """`x` with the entries of an interleaved axis in `order`, which is given them in pairs."""
    last = leaf.name.where("o")[-1]
    if not leaf.name.interleaved or last not in axes:
        return x
    pairs = np.arange(leaf.shape[last]).reshape(-1, 2)
    return np.take(x, order(pairs).ravel(), axes.index(last))
