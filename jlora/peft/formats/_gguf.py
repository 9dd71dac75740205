"""GGUF, of llama.cpp: its blocks of 32 as they are, all else dequantized."""

from collections.abc import Collection, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ..._quantized import MXFP4, Int4, Int8
from ._codes import Codes
from ._format import Format
from ._gguf_file import read_tensors
from ._tensors import Unreadable

BLOCK = 32
SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "MXFP4": 17}  # bytes of a block
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
FLOATS["F64"] = np.dtype(np.float64)


class GgufTensors:
    """The tensors of a GGUF file by name.

    Attributes:
        taken: the names of those that were read.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header; the data is mapped into memory."""
        try:
            import gguf
        except ImportError:
            raise ImportError(
                "`path` is a GGUF file, for which gguf is needed: pip install gguf."
            ) from None
        if not path.is_file():
            raise FileNotFoundError(f"`path`: there is no file {path}.")
        try:
            self._tensors = {t.name: t for t in read_tensors(path, gguf)}
        except (ValueError, KeyError) as e:
            raise ValueError(f"`path`: {path} is no sound GGUF file: {e}.") from None
        self._gguf, self.taken = gguf, set[str]()

    def __iter__(self) -> Iterator[str]:
        """Iterates over their names."""
        return iter(self._tensors)

    def take(self, name: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """Returns the type of a tensor of a shape, and its bytes."""
        if name not in self._tensors:
            raise Unreadable(f"{name}: missing")
        tensor = self._tensors[name]
        if (got := tensor.shape[::-1]) != shape:
            raise Unreadable(f"{name}: expected shape {shape}, got {got}")
        self.taken.add(name)
        return tensor.tensor_type.name, tensor.data

    def read(self, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> np.ndarray:
        """Reads a tensor of a shape in its own dtype if that is floating-point, else in float32."""
        del dtypes
        kind, data = self.take(name, shape)
        if kind in FLOATS:
            return data.reshape(-1).view(FLOATS[kind]).reshape(shape)
        try:
            return self._gguf.dequantize(data, self._tensors[name].tensor_type).reshape(shape)
        except NotImplementedError:
            raise Unreadable(f"{name}: its type {kind} is not known to gguf") from None


class Gguf(Format):
    """Blocks of 32 whose codes 0 to 15 are in the low bits of a byte, 16 to 31 in the high ones."""

    def read(self, module: str, parameter: str, shape: tuple[int, ...]) -> Codes | None:
        """Reads a parameter of one of the types of which codes can be made."""
        name = f"{module}.{parameter}"
        kind, data = self.tensors.take(name, shape)
        if kind not in SIZES:
            return None
        blocks = data.reshape(*shape[:-1], shape[-1] // BLOCK, SIZES[kind])
        if kind == "MXFP4":  # twice the numbers and half the power
            return Codes(MXFP4(), _codes(blocks[..., 1:], shape), blocks[..., 0])
        scale = _halves(name, blocks, 0)
        if kind == "Q8_0":
            return Codes(Int8(block=BLOCK), blocks[..., 2:].view(np.int8).reshape(shape), scale)
        zero = _halves(name, blocks, 2) if kind == "Q4_1" else None
        codes = _codes(blocks[..., 4 if kind == "Q4_1" else 2 :], shape)
        return Codes(Int4(group=BLOCK), codes, scale, zero)


def _halves(name: str, blocks: np.ndarray, at: int) -> np.ndarray:
    x = np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]
    if not np.isfinite(x).all():
        raise Unreadable(f"{name}: has scales that are not finite")
    return x


def _codes(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], -1).reshape(shape)
