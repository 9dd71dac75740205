"""FP8 with a scale for each tensor, output or block, as in DeepSeek and Qwen."""

from collections.abc import Iterable

import numpy as np

from ..._quantized import FP8
from ._codes import Codes, Dense
from ._format import FLOATS, Format, Tensors, Unreadable, refuse_field, register

Block = tuple[int, int]


@register("fp8", "fbgemm_fp8")
class Fp8(Format):
    """W = q·s. In spite of its name, `weight_scale_inv` is s."""

    dtypes = ("F8_E4M3",)

    def read(self, name: str) -> Codes | Dense:
        """Reads a parameter whose tensor is in FP8."""
        block = self.config.get("weight_block_size")
        if block is not None and not _is_pair(block):
            raise refuse_field("weight_block_size", f"expected two numbers or null, got {block!r}")
        self.tensors.skip_activations(name)
        scale = f"{name}_scale" if f"{name}_scale" in self.tensors else f"{name}_scale_inv"
        return read_float8(self.tensors, name, scale, [] if block is None else [tuple(block)])


def read_float8(tensors: Tensors, key: str, name: str, blocks: Iterable[Block]) -> Codes | Dense:
    """Reads W = q·s: tensor `key` is q, and tensor `name` is s.

    The shape of s tells which entries share a scale: all entries of W, of an output, of a block of
    one of the sizes `blocks`, or of neighboring inputs of an output.
    """
    codes = tensors.read_matrix(key, ("F8_E4M3",))
    rows, columns = codes.shape
    scale = _read_scale(tensors, name)
    shape = tensors.shape(name)
    if scale.size == 1 or shape in ((rows,), (rows, 1)):
        return Codes(FP8(block=None), codes, np.broadcast_to(scale.reshape(-1, 1), (rows, 1)))
    for block in blocks:
        if shape == (-(-rows // block[0]), -(-columns // block[1])):
            return _in_blocks(codes, scale, block)
    if len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0:
        return _in_blocks(codes, scale, (1, columns // shape[1]))
    known = ", ".join(f"blocks of {a} × {b}" for a, b in blocks) or "no blocks"
    wanted = f"one scale, one for each of {rows} outputs, or by the configuration {known}"
    raise Unreadable(name, f"expected {wanted}; got shape {shape}")


def _is_pair(x: object) -> bool:
    """Whether a value of JSON is two positive integers."""
    return isinstance(x, list) and len(x) == 2 and all(type(n) is int and n > 0 for n in x)


def _read_scale(tensors: Tensors, name: str) -> np.ndarray:
    scale = tensors.read(name, (*FLOATS, "F8_E8M0"))
    if tensors.dtype(name) == "F8_E8M0":
        scale = np.where(scale == 255, np.nan, np.exp2(scale.astype(np.float32) - 127))
    if not np.isfinite(scale.astype(np.float32)).all():
        raise Unreadable(name, "has values that are not finite")
    return scale.astype(np.float32)


def _in_blocks(codes: np.ndarray, scale: np.ndarray, block: Block) -> Codes | Dense:
    if block[0] == block[1] and block[0] in FP8.legal:
        return Codes(FP8(block=block[0]), codes, scale)
    rows, columns = codes.shape
    high, wide = min(block[0], rows), min(block[1], columns)
    each = np.repeat(np.repeat(scale, high, 0), wide, 1)[:rows, :columns]
    return Dense(codes.astype(np.float32) * each, "8-bit floats", 8)
