"""GGUF, of llama.cpp: its blocks of 32 as they are, all else dequantized."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._quantized import MXFP4, Int4, Int8
from . import _gguf_file
from ._format import Format
from ._stored import Stored
from ._tensors import Unreadable

BLOCK = 32
SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "MXFP4": 17}  # bytes of a block
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
FLOATS["F64"] = np.dtype(np.float64)


class Tensors:
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
            found = list(_gguf_file.tensors(path, gguf))
        except (ValueError, KeyError) as e:
            raise ValueError(f"`path`: {path} is no sound GGUF file: {e}.") from None
        self._gguf, self._tensors = gguf, {t.name: t for t in found}
        self.taken = set[str]()

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._tensors)

    def blocks(self, name: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray] | None:
        """The type of a tensor and its blocks, (…, blocks, bytes), if codes can be made of them."""
        tensor = self._tensor(name, shape)
        kind = tensor.tensor_type.name
        if kind not in SIZES:
            return None
        self.taken.add(name)
        data = np.asarray(tensor.data).reshape(-1).view(np.uint8)
        return kind, data.reshape(*shape[:-1], shape[-1] // BLOCK, SIZES[kind])

    def packed(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Module, parameter and shape of the tensors of which codes can be made."""
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name in SIZES:
                module, _, parameter = name.rpartition(".")
                yield module, parameter, tuple(int(n) for n in reversed(tensor.shape))

    def read(self, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of `shape`, in its own dtype if that is floating-point, else in float32."""
        del dtypes
        tensor = self._tensor(name, shape)
        self.taken.add(name)
        kind = tensor.tensor_type
        if kind.name in FLOATS:
            data = np.asarray(tensor.data).reshape(-1).view(np.uint8)
            return data.view(FLOATS[kind.name]).reshape(shape)
        try:
            return self._gguf.dequantize(tensor.data, kind).reshape(shape)
        except NotImplementedError:
            raise Unreadable(f"{name}: its type {kind.name} is not known to gguf") from None

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self._tensors:
            raise Unreadable(f"{name}: missing")
        tensor = self._tensors[name]
        got = tuple(int(n) for n in reversed(tensor.shape))
        if got != shape:
            raise Unreadable(f"{name}: expected shape {shape}, got {got}")
        return tensor


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | None:
    """Codes 0 to 15 of a block in the low bits, 16 to 31 in the high ones."""
    del config
    name = f"{module}.{parameter}"
    found = tensors.blocks(name, shape)
    if found is None:
        return None
    kind, blocks = found
    if kind == "MXFP4":  # twice the numbers and half the power
        return Stored(MXFP4(), _codes(blocks[..., 1:], shape), blocks[..., 0])
    scale = _halves(name, blocks, 0)
    if kind == "Q8_0":
        return Stored(Int8(block=BLOCK), blocks[..., 2:].view(np.int8).reshape(shape), scale)
    zero = _halves(name, blocks, 2) if kind == "Q4_1" else None
    codes = _codes(blocks[..., 4 if kind == "Q4_1" else 2 :], shape)
    return Stored(Int4(group=BLOCK), codes, scale, zero)


def _halves(name: str, blocks: np.ndarray, at: int) -> np.ndarray:
    x = np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]
    if not np.isfinite(x).all():
        raise Unreadable(f"{name}: has scales that are not finite")
    return x


def _codes(data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], -1).reshape(shape)


def find(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Tensors of the types of which codes can be made."""
    del config
    yield from tensors.packed()


FORMAT = Format("gguf", find, read)
