"""FP8 with scales of the tensor, of its outputs, or of blocks."""

from collections.abc import Iterable

import numpy as np

from ..._quantized import FP8
from ._stored import Dense, Stored
from ._tensors import FLOATS, Tensors, Unreadable

Block = tuple[int, int]


def float8(tensors: Tensors, key: str, name: str, blocks: Iterable[Block]) -> Stored | Dense:
    """W = q·s, q in tensor `key` and s in tensor `name`.

    The shape of s tells what share one: all of W, an output, a block of one of the sizes `blocks`,
    or inputs of an output next to each other.
    """
    rows, columns = tensors.matrix(key)
    codes = tensors.read(key, ("F8_E4M3",), (rows, columns))
    scale, shape = _scale(tensors, name), tensors.shape(name)
    if scale.size == 1 or shape in ((rows,), (rows, 1)):
        return Stored(FP8(block=None), codes, np.broadcast_to(scale.reshape(-1, 1), (rows, 1)))
    for block in blocks:
        if shape == (-(-rows // block[0]), -(-columns // block[1])):
            return _in_blocks(codes, scale, block)
    if len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0:
        return _in_blocks(codes, scale, (1, columns // shape[1]))
    said = ", ".join(f"blocks of {a} × {b}" for a, b in blocks) or "no blocks"
    raise Unreadable(
        f"{name}: expected one scale, one of each of {rows} outputs, or as the configuration says, "
        f"{said}; got shape {shape}"
    )


def _scale(tensors: Tensors, name: str) -> np.ndarray:
    scale = tensors.read(name, (*FLOATS, "F8_E8M0"), tensors.shape(name))
    if tensors.dtype(name) == "F8_E8M0":
        scale = np.where(scale == 255, np.nan, np.exp2(scale.astype(np.float32) - 127))
    if not np.isfinite(scale.astype(np.float32)).all():
        raise Unreadable(f"{name}: has values that are not finite")
    return scale.astype(np.float32)


def _in_blocks(codes: np.ndarray, scale: np.ndarray, block: Block) -> Stored | Dense:
    if block[0] == block[1] and block[0] in FP8.legal:
        return Stored(FP8(block=block[0]), codes, scale)
    rows, columns = codes.shape
    high, wide = min(block[0], rows), min(block[1], columns)
    each = np.repeat(np.repeat(scale, high, 0), wide, 1)[:rows, :columns]
    return Dense(codes.astype(np.float32) * each, "8-bit floats", 8)
