"""Reads the header of a GGUF file, in time and memory proportional to the file's size.

The reader of the package gguf makes an object for each value of an array, as many as a file claims.
"""

import math
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

_VERSIONS = (2, 3)
# Bytes of a value by its type. Strings and arrays contain their lengths.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9


class GgufTensor(NamedTuple):
    """A tensor whose bytes are mapped into memory; blocks are along the last axis of `shape`."""

    type: Any
    shape: tuple[int, ...]
    data: np.ndarray


def read_tensors(path: Path, gguf: ModuleType) -> dict[str, GgufTensor]:
    """Reads the tensors of a file by name; `gguf` is the package with the types.

    Raises:
        ValueError: if the file is truncated or damaged.
    """
    if path.stat().st_size < 24:
        raise ValueError("it has fewer than 24 bytes")
    data: Any = np.memmap(path, mode="r")
    file = _File(memoryview(data))
    magic, version, count, fields = file.numbers("4sIQQ")
    if magic != b"GGUF" or version not in _VERSIONS:
        versions = " or ".join(map(str, _VERSIONS))
        raise ValueError(f"expected version {versions} in little-endian order")
    alignment = 32
    for _ in range(fields):
        key = file.string()
        [kind] = file.numbers("I")
        if key == b"general.alignment" and kind == _UINT32:
            [alignment] = file.numbers("I")
        else:
            file.skip(kind)
    infos = [_info(file) for _ in range(count)]
    if not 0 < alignment <= 2**20:
        raise ValueError(f"its alignment is {alignment}")
    start = -(-file.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise ValueError(f"it has two tensors {name!r}")
        type_ = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[type_]
        if shape and shape[-1] % block:
            raise ValueError(f"{name!r} of shape {shape} does not divide into blocks of {block}")
        end = start + offset + math.prod(shape) // block * size
        if end > len(data):
            raise ValueError(f"{name!r} ends at byte {end} of {len(data)}")
        bytes_ = np.asarray(data[start + offset : end])
        found[name] = GgufTensor(
            type_, shape, bytes_.reshape(*shape[:-1], -1) if bytes_.size else bytes_
        )
    return found


def _info(file: "_File") -> tuple[str, tuple[int, ...], int, int]:
    name = file.string().decode()
    [axes] = file.numbers("I")
    if axes > 16:
        raise ValueError(f"{name!r} has {axes} axes")
    return name, file.numbers("Q" * axes)[::-1], *file.numbers("IQ")


class _File:
    """The bytes of a file, and the position up to which they were read."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> memoryview:
        """Takes the next `count` bytes."""
        start = self.at
        self.at += count
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}; expected byte {self.at}")
        return self.data[start : self.at]

    def numbers(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def string(self) -> bytes:
        return self.take(*self.numbers("Q")).tobytes()

    def skip(self, kind: int) -> None:
        """Skips a value of a type."""
        kind, count = self.numbers("IQ") if kind == _ARRAY else (kind, 1)
        if kind in _SIZES:
            self.take(count * _SIZES[kind])
        elif kind == _STRING:
            for _ in range(count):
                self.take(*self.numbers("Q"))
        else:
            raise ValueError(f"it has values of type {kind}, which is not supported")
