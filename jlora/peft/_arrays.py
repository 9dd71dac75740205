"""Arrays between the two layouts: axes are permuted and flattened, values never change."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._types import Layout
from ..adapters import LowRank, low_rank_axes, without_slots
from ._names import RANK, Groups, Leaf, lengths


def factors(leaf: Leaf, delta: LowRank) -> list[tuple[np.ndarray, np.ndarray]]:
    """PEFT's A and B for each module of `leaf`.

    Slots have no equivalent there: they become one A of rank slots·r and one B with zeros outside
    of each slot's own outputs, which is the same ΔW exactly.
    """
    whole = without_slots(delta, leaf.shape)
    pair = list(zip((whole.a, whole.b), _axes(whole.layout), strict=True))
    a, b = pair[::-1] if leaf.name.swapped else pair
    packed = _pack(*a, leaf.name.a_groups, leaf), _pack(*b, leaf.name.b_groups, leaf)
    return list(zip(*packed, strict=True))


def low_rank(
    leaf: Leaf, pairs: Sequence[tuple[np.ndarray, np.ndarray]], rank: int, **static: Any
) -> LowRank:
    """The node of `leaf` from PEFT's A and B of each of its modules: the inverse of `factors`."""
    name, axes = leaf.name, _axes(leaf.name.layout)
    axes_a, axes_b = axes[::-1] if name.swapped else axes
    a = _unpack([a for a, _ in pairs], axes_a, name.a_groups, leaf, rank)
    b = _unpack([b for _, b in pairs], axes_b, name.b_groups, leaf, rank)
    a, b = (b, a) if name.swapped else (a, b)
    return LowRank(jnp.asarray(a), jnp.asarray(b), layout=name.layout, **static)


def _axes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of A and of B: the rank beside those of the weight."""
    found = low_rank_axes(layout)
    a, b = (tuple(d if isinstance(d, int) else RANK for d in found[n]) for n in ("a", "b"))
    return a, b


def weights(leaf: Leaf, value: Any) -> list[np.ndarray]:
    """PyTorch's parameter for each module of `leaf`."""
    return _pack(value, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf)


def weight(leaf: Leaf, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `weights`."""
    return _unpack(parts, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf, 0)


def _pack(x: Any, axes: tuple[int, ...], groups: Groups, leaf: Leaf) -> list[np.ndarray]:
    x = np.asarray(x)
    stacked = leaf.name.where("l")
    order = [*stacked, *itertools.chain(*groups)]
    # Modules or experts that share a factor here get a copy each.
    shared = tuple(d for d in order if d not in axes)
    axes = (*shared, *axes)
    x = np.broadcast_to(x, (*(leaf.shape[d] for d in shared), *x.shape))
    sizes = dict(zip(axes, x.shape, strict=True))
    x = np.transpose(x, [axes.index(d) for d in order])
    x = x.reshape(lengths([stacked, *groups], sizes))
    # Contiguous: the writer of safetensors takes the memory as it lies.
    return [np.ascontiguousarray(part) for part in x]


def _unpack(
    parts: Sequence[np.ndarray], axes: tuple[int, ...], groups: Groups, leaf: Leaf, rank: int
) -> np.ndarray:
    sizes = {**dict(enumerate(leaf.shape)), RANK: rank}
    order = [*leaf.name.where("l"), *itertools.chain(*groups)]
    x = np.stack(parts).reshape([sizes[d] for d in order])
    return np.transpose(x, [order.index(d) for d in axes])
