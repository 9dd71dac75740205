"""Integers in groups of inputs, which share a scale and a zero point."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..._quantized import Int4, Int8
from .._file import brief
from ._stored import Dense, Stored
from ._tensors import Unreadable


def affine(
    module: str,
    bits: int,
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    order: np.ndarray | None = None,
    sizes: Sequence[Any] = (),
) -> Stored | Dense:
    """W = s·(q - z), of 4 or 8 bits.

    Args:
        module: whose weight it is.
        bits: of a code.
        codes: q, unsigned, (outputs, inputs).
        scale: s, (outputs, groups).
        zero: z, unsigned, (outputs, groups); None for half of the codes.
        order: the group of each input; None where each group is of inputs next to each other.
        sizes: each `group_size` of the configuration; what is not positive is all inputs.
    """
    if not np.isfinite(scale.astype(np.float32)).all():
        raise Unreadable(f"{module}: has scales that are not finite")
    inputs, groups = codes.shape[1], scale.shape[1]
    if order is None and (groups < 1 or inputs % groups):
        raise Unreadable(f"{module}: {groups} groups of scales do not divide {inputs} inputs")
    if order is None and not _is_said(inputs, groups, sizes):
        raise Unreadable(
            f"{module}: {groups} groups of scales for {inputs} inputs contradict `group_size` of "
            f"the quantization, {', '.join(map(brief, sizes[:9]))}"
        )
    if order is not None and not 0 <= order.min(initial=0) <= order.max(initial=0) < groups:
        raise Unreadable(f"{module}: has inputs of other groups than the {groups} with scales")
    usual = np.arange(inputs) * groups // max(inputs, 1)
    order = usual if order is None else order
    if inputs % groups == 0 and np.array_equal(order, usual):
        found = _in_blocks(bits, codes, scale, zero, inputs // groups)
        if found is not None:
            return found
    w = _centered(bits, codes, zero, order).astype(np.float32)
    return Dense(w * scale.astype(np.float32)[:, order], f"{bits}-bit integers", bits)


def _is_said(inputs: int, groups: int, sizes: Sequence[Any]) -> bool:
    """Whether groups of inputs next to each other are of one of the sizes, if any is given."""
    given = [n for n in sizes if isinstance(n, int) and n > 0]
    whole = groups == 1 and (len(given) < len(sizes) or max(given, default=0) > inputs)
    return whole or not given or inputs // groups in given


def _in_blocks(
    bits: int, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, group: int
) -> Stored | None:
    """In a scheme, if that has such groups and codes."""
    fits = [n for n in Int4.legal if group % n == 0]
    if not fits:
        return None
    part = max(fits)  # of a longer group all parts have the same scale
    scale = np.repeat(scale, group // part, 1)
    if bits == 4:
        zero = None if zero is None else np.repeat(zero, group // part, 1)
        return Stored(Int4(group=part), codes, scale, zero)
    w = _centered(bits, codes, zero, np.arange(codes.shape[1]) // group)
    if w.min(initial=0) < -128 or w.max(initial=0) > 127:
        return None
    scale = scale if scale.dtype == np.float16 else scale.astype(np.float32)
    return Stored(Int8(block=part), w.astype(np.int8), scale)


def _centered(
    bits: int, codes: np.ndarray, zero: np.ndarray | None, order: np.ndarray
) -> np.ndarray:
    """Q - z."""
    half = np.int16(2 ** (bits - 1))
    return codes.astype(np.int16) - (half if zero is None else zero.astype(np.int16)[:, order])
