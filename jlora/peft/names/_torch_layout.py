"""Converts the arrays of a leaf to those of PyTorch's modules, and back, by its row.

Axes are permuted and flattened. The values of A and B never change. Those of weights and magnitudes
change only if the row has a factor.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from ..._adapters import SLOTS, Decomposed, LowRank, Replaced, join_slots, without_slots
from ..._arrays import put
from ..._types import Layout
from ._leaves import NamedLeaf
from ._names import RANK, AxisGroup, Groups, Name, multiply_lengths

ModuleFactors = tuple[
    np.ndarray, ...
]  # PEFT's A and B of a module, and its magnitudes if it has any


# --------------------------------------------------------------------------------------- weights


def split_weight(leaf: NamedLeaf, value: ArrayLike) -> dict[str, np.ndarray]:
    """Splits a leaf into PyTorch's parameters by their names."""
    parts = _pack(value, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf)
    return dict(zip(leaf.parameters, parts, strict=True))


def join_weight(leaf: NamedLeaf, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Inverts `split_weight`, up to rounding if values change."""
    return _unpack(parts, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf)


def take_part(x: np.ndarray, name: Name, axis: int | None = None) -> np.ndarray:
    """Takes the part of a parameter that a row names, along the axis of outputs."""
    if name.part is None:
        return x
    axis = name.weight_groups.index(name.where("o")) if axis is None else axis
    return np.moveaxis(split_outputs(np.moveaxis(x, axis, 0), name)[name.part[0]], 0, axis)


def join_parts(parts: Sequence[np.ndarray], name: Name) -> np.ndarray:
    """Joins the parts of a parameter in their order."""
    axis = name.weight_groups.index(name.where("o"))
    whole = join_outputs(np.stack([np.moveaxis(x, axis, 0) for x in parts]), name)
    return np.ascontiguousarray(np.moveaxis(whole, 0, axis))


def split_outputs(x: np.ndarray, name: Name) -> np.ndarray:
    """Splits the first axis of an array into parts, (n, outputs of each, …)."""
    _, n = name.part or (0, 1)
    if name.alternating:
        return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(n, -1, *x.shape[1:])


def join_outputs(x: np.ndarray, name: Name) -> np.ndarray:
    """Inverts `split_outputs`."""
    x = x.swapaxes(0, 1) if name.alternating else x
    return x.reshape(-1, *x.shape[2:])


def split_rows(leaf: NamedLeaf, node: Replaced) -> np.ndarray:
    """Returns the rows of `node` in PyTorch's layout, (k, dim)."""
    axes = leaf.name.where("v") + leaf.name.where("o")
    [found] = _pack(node.v, axes, leaf.name.weight_groups, leaf)
    return found


def join_rows(leaf: NamedLeaf, rows: tuple[int, ...], v: np.ndarray) -> Replaced:
    """Makes the node of `leaf` from PyTorch's rows; inverts `split_rows`."""
    [axis] = leaf.name.where("v")
    axes = (axis, *leaf.name.where("o"))
    v = _unpack([v], axes, leaf.name.weight_groups, leaf, {axis: len(rows)})
    return Replaced(put(v), rows, leaf.layout)


# --------------------------------------------------------------------------------------- A and B


def keep_adapted(leaf: NamedLeaf, layout: Layout) -> NamedLeaf:
    """Drops the modules of a leaf that a node with `layout` does not adapt."""
    slots = layout.slots
    return leaf.with_slots(slots[1]) if slots and _slots_are_modules(leaf, layout) else leaf


def _slots_are_modules(leaf: NamedLeaf, layout: Layout) -> bool:
    ours, theirs = layout.slots, leaf.layout.slots
    return bool(ours and theirs and ours[::2] == theirs[::2])


def split_factors(leaf: NamedLeaf, node: LowRank | Decomposed) -> list[ModuleFactors]:
    """Splits `node` into PEFT's A, B and magnitudes for each module of `leaf`; not yet swapped.

    PEFT has no slots within a module. They become one A of rank slots·r, and one B with zeros
    outside the outputs of each slot: ΔW is exactly the same.
    """
    low = LowRank(node.a, node.b, node.scale, node.layout)
    m = node.m if isinstance(node, Decomposed) else None
    if low.layout.slots is not None and not _slots_are_modules(leaf, node.layout):
        m = None if m is None else join_slots(m, low.layout)
        low = without_slots(low, leaf.shape)
    packed = [
        _pack(np.squeeze(x, _ones(low.layout, name)), _axes(low.layout, name), groups, leaf)
        for name, groups in leaf.name.factor_groups.items()
        if (x := {"a": low.a, "b": low.b, "m": m}[name]) is not None
    ]
    return list(zip(*packed, strict=True))


def join_factors(
    leaf: NamedLeaf, modules: Sequence[ModuleFactors], **static: Any
) -> LowRank | Decomposed:
    """Makes the node of `leaf` from the arrays of its modules; inverts `split_factors`."""
    if leaf.name.is_swapped:
        modules = [swap(a, b, leaf.experts) for a, b in modules]
    modules = _take_part(leaf, modules)
    found = dict[str, Any]()
    rank = len(modules[0][0]) // leaf.experts
    each = zip(leaf.name.factor_groups.items(), zip(*modules, strict=True), strict=False)
    for (name, groups), parts in each:
        x = _unpack(parts, _axes(leaf.layout, name), groups, leaf, {RANK: rank})
        found[name] = put(np.expand_dims(x, _ones(leaf.layout, name)))
    if "m" in found:
        return Decomposed(**found, scale=static["scale"], layout=leaf.layout)
    return LowRank(**found, **static, layout=leaf.layout)


def swap(a: np.ndarray, b: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Converts A and B of experts to those of the transposed weights; its own inverse."""
    new_a = b.reshape(len(b), -1, experts).transpose(2, 1, 0).reshape(-1, len(b))
    new_b = a.reshape(experts, -1, a.shape[1]).transpose(2, 1, 0).reshape(a.shape[1], -1)
    return new_a, new_b


def _take_part(leaf: NamedLeaf, modules: Sequence[ModuleFactors]) -> Sequence[ModuleFactors]:
    """Takes A and B of the part that `leaf` is, if it is one of several of a parameter.

    For gate or up of `gate_up_proj` it cuts B to the outputs of the part. If the zeros in B show
    that each part has its own ranks, as `save` writes them, it cuts A and B to those too.
    """
    if leaf.name.part is None:
        return modules
    # Two parts of rank 2 in an A of rank 4, and B = [[B_gate, 0], [0, B_up]]: up has the rows 2 and
    # 3 of A, and B_up.
    (j, n), experts = leaf.name.part, leaf.experts
    a = np.stack([a.reshape(experts, -1, a.shape[1]) for a, *_ in modules])
    b = np.stack([split_outputs(b, leaf.name) for _, b, *_ in modules])
    b = b.reshape(*b.shape[:3], -1, experts)
    rank = b.shape[3] // n
    if rank * n == b.shape[3]:
        blocks = b.reshape(*b.shape[:3], n, rank, experts)
        if np.array_equal(blocks.any(axis=(0, 2, 4, 5)), np.eye(n)):
            a, b = a[:, :, j * rank : (j + 1) * rank], blocks[:, :, :, j]
    each = zip(a, b[:, j], modules, strict=True)
    return [
        (
            x.reshape(-1, x.shape[-1]),
            y.reshape(len(y), -1),
            *(split_outputs(m, leaf.name)[j] for m in own[2:]),
        )
        for x, y, own in each
    ]


def _axes(layout: Layout, name: str) -> AxisGroup:
    """Returns the axes of A, B or m. If slots are modules, their axis is that of the weight."""
    found = Decomposed.axes(layout)[name]
    if layout.slots is None:
        return found
    axis = layout.slots[2]
    return tuple(axis if d == SLOTS else d for d in found if d != axis)


def _ones(layout: Layout, name: str) -> tuple[int, ...]:
    """Returns the axis of B and m for the outputs of one slot, which has length 1, if any."""
    found = Decomposed.axes(layout)[name]
    return () if layout.slots is None or name == "a" else (found.index(layout.slots[2]),)


# ------------------------------------------------------------------------------- axes and values


def _pack(x: ArrayLike, axes: AxisGroup, groups: Groups, leaf: NamedLeaf) -> list[np.ndarray]:
    """Splits an array of the leaf into its modules, and flattens each group of axes."""
    x = _rescale(np.asarray(x), axes, leaf, np.divide)
    stacked = leaf.name.where("ls")
    order = [*stacked, *itertools.chain(*groups)]
    # Modules or experts that share a factor get a copy each.
    shared = [d for d in order if isinstance(d, int) and d not in axes]
    axes = (*shared, *axes)
    x = np.broadcast_to(x, (*(leaf.shape[d] for d in shared), *x.shape))
    sizes = dict(zip(axes, x.shape, strict=True))
    x = _reorder(x, axes, leaf, lambda pairs: pairs.T)
    x = np.transpose(x, [axes.index(d) for d in order])
    x = x.reshape(multiply_lengths([stacked, *groups], sizes))
    # Contiguous, as the safetensors library writes memory in its order.
    return [np.asarray(part, order="C") for part in x]


def _unpack(
    parts: Sequence[np.ndarray],
    axes: AxisGroup,
    groups: Groups,
    leaf: NamedLeaf,
    sizes: Mapping[int | str, int] = {},
) -> np.ndarray:
    """Inverts `_pack`; `sizes` are the lengths of axes that differ from the leaf's."""
    sizes = {**dict(enumerate(leaf.shape)), **sizes}
    order = [*leaf.name.where("ls"), *itertools.chain(*groups)]
    x = np.stack(parts).reshape([sizes[d] for d in order])
    x = np.transpose(x, [order.index(d) for d in axes])
    x = _reorder(x, axes, leaf, lambda pairs: pairs.reshape(2, -1).T)
    return _rescale(x, axes, leaf, np.multiply)


def _rescale(
    x: np.ndarray, axes: AxisGroup, leaf: NamedLeaf, operation: Callable[..., np.ndarray]
) -> np.ndarray:
    """Multiplies or divides an array by the factor of a row, rounded once; A and B stay."""
    return x if leaf.name.times is None or RANK in axes else rescale(x, leaf.factor, operation)


def rescale(
    x: np.ndarray, factor: float, operation: Callable[..., np.ndarray] = np.multiply
) -> np.ndarray:
    """Multiplies an array by a number, or divides it, rounded once."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    return operation(wide, factor).astype(x.dtype)


def _reorder(
    x: np.ndarray, axes: AxisGroup, leaf: NamedLeaf, order: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Reorders the entries of an interleaved axis; `order` is a function of their pairs."""
    last = leaf.name.where("o")[-1:]
    if not leaf.name.interleaved or not set(last) <= set(axes):
        return x
    [last] = last
    pairs = np.arange(leaf.shape[last]).reshape(-1, 2)
    return np.take(x, order(pairs).ravel(), axes.index(last))
