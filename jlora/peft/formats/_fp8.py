"""FP8 in squares, as DeepSeek and Qwen ship it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...quantized import FP8
from ._format import Format, register
from ._stored import Stored
from ._tensors import FLOATS, Tensors, Unreadable


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | None:
    """W = q·s, where `weight_scale_inv` is s in spite of its name."""
    key = f"{module}.{parameter}"
    if key not in tensors or tensors.dtype(key) != "F8_E4M3":
        return None
    codes, name = tensors.read(key, ("F8_E4M3",), shape), f"{key}_scale_inv"
    said = config.get("weight_block_size")
    if not isinstance(said, list) or len(said) != 2 or said[0] != said[1]:
        raise Unreadable(f"`weight_block_size` of the quantization: expected squares, got {said!r}")
    try:
        scheme = FP8(block=said[0])
    except ValueError as e:
        raise Unreadable(f"{key}: {e}") from None
    grid = tuple(-(-n // said[0]) for n in shape)
    scale = tensors.read(name, (*FLOATS, "F8_E8M0"), grid)
    if tensors.dtype(name) == "F8_E8M0":
        scale = np.where(scale == 255, np.nan, np.exp2(scale.astype(np.float32) - 127))
    if not np.isfinite(scale.astype(np.float32)).all():
        raise Unreadable(f"{name}: has values that are not finite")
    return Stored(scheme, codes, scale.astype(np.float32))


def find(tensors: Tensors) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Tensors in FP8."""
    for name in tensors:
        if tensors.dtype(name) == "F8_E4M3":
            module, _, parameter = name.rpartition(".")
            yield module, parameter, tensors.matrix(name)


register(Format("fp8", find, read))
