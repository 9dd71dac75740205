"""GGUF of llama.cpp: Q4_0, Q4_1, Q8_0 and MXFP4 stay in codes, other types are dequantized."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from ..._errors import InputError, MissingError
from ..._quantized import MXFP4, Int4, Int8
from .._file import DTYPES
from ._codes import Codes
from ._format import Format, Unreadable
from ._gguf_file import read_tensors

BLOCK = 32
HEADS = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2, "MXFP4": 1}  # bytes of a block before its codes


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
                "`path` is a GGUF file, which needs the package gguf: pip install 'jlora[gguf]'."
            ) from None
        if not path.is_file():
            raise MissingError("path", f"there is no file {path}.", path=path)
        try:
            self._tensors = read_tensors(path, gguf)
        except (ValueError, KeyError) as e:
            raise InputError("path", f"{path} is not a valid GGUF file: {e}.", path=path) from None
        self._gguf = gguf
        self.taken = set[str]()

    def __iter__(self) -> Iterator[str]:
        """Iterates over their names."""
        return iter(self._tensors)

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor, as gguf calls it."""
        return self._tensors[name].type.name

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._tensors[name].shape

    def blocks(self, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        """Returns the bytes of a tensor in blocks of 32 numbers, and its shape."""
        tensor = self._tensors[name]
        if not tensor.shape or 0 in tensor.shape:
            raise Unreadable(name, f"expected a matrix, got shape {tensor.shape}")
        self.taken.add(name)
        *rows, columns = tensor.shape
        return tensor.data.reshape(*rows, columns // BLOCK, -1), tensor.shape

    def read(self, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> np.ndarray:
        """Reads a tensor of `shape` in its own dtype if that is floating-point, else in float32."""
        del dtypes
        if name not in self._tensors:
            raise Unreadable(name, "missing")
        type_, got, data = self._tensors[name]
        if got != shape:
            raise Unreadable(name, f"expected shape {shape}, got {got}")
        self.taken.add(name)
        if type_.name in DTYPES:
            return np.array(data.reshape(-1)).view(DTYPES[type_.name]).reshape(shape)
        try:
            return self._gguf.dequantize(data, type_).reshape(shape)
        except NotImplementedError:
            raise Unreadable(name, f"gguf cannot dequantize its type {type_.name}") from None


class Gguf(Format):
    """Blocks of 32: codes 0 to 15 are in the low bits of bytes, codes 16 to 31 in the high bits."""

    dtypes = HEADS

    def read(self, name: str) -> Codes:
        """Reads a parameter whose type can be read as codes."""
        kind = self.tensors.dtype(name)
        blocks, shape = self.tensors.blocks(name)
        head, data = np.split(blocks, [HEADS[kind]], -1)
        if kind == "Q8_0":
            codes = data.view(np.int8).reshape(shape)
        else:
            codes = np.concatenate([data & 15, data >> 4], -1).reshape(shape)
        if kind == "MXFP4":  # GGUF has twice the codes' values, and half the scale
            return Codes(MXFP4(), codes, head[..., 0])
        halves = np.ascontiguousarray(head).view(np.float16)
        if not np.isfinite(halves).all():
            raise Unreadable(name, "has scales that are not finite")
        scheme = Int8(block=BLOCK) if kind == "Q8_0" else Int4(group=BLOCK)
        return Codes(scheme, codes, *np.moveaxis(halves, -1, 0))
