"""MXFP4, as gpt-oss ships its experts."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..._quantized import MXFP4
from ._format import Format, register
from ._stored import Stored
from ._tensors import Tensors, Unreadable


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | None:
    """Blocks (experts, rows, blocks, 16) of two codes a byte, the first in the low bits."""
    del config
    blocks, scales = (f"{module}.{parameter}_{kind}" for kind in ("blocks", "scales"))
    if blocks not in tensors:
        return None
    *lead, inputs = shape
    if inputs % 32:
        raise Unreadable(f"{blocks}: {inputs} inputs are no multiple of 32")
    pairs = tensors.read(blocks, ("U8",), (*lead, inputs // 32, 16))
    scale = tensors.read(scales, ("U8",), (*lead, inputs // 32))
    if (scale == 255).any():
        raise Unreadable(f"{scales}: has values that are NaN")
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(shape)
    return Stored(MXFP4(), codes, scale)


def find(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Parameters in blocks."""
    del config
    for name in tensors:
        if name.endswith("_blocks"):
            module, _, parameter = name.removesuffix("_blocks").rpartition(".")
            shape = tensors.shape(name)
            if len(shape) != 4 or 0 in shape:
                raise Unreadable(f"{name}: expected (experts, rows, blocks, 16), got {shape}")
            yield module, parameter, (*shape[:2], 32 * shape[2])


register(Format("mxfp4", find, read))
