"""The quantized tensors of a checkpoint, each read when it is asked for."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..._quantized import Scheme, spelled
from .._checkpoint import open_checkpoint
from . import Dense, Stored, Tensors, Unreadable, check_finite
from ._base import configuration_of, format_of


class Matrix(NamedTuple):
    """A quantized tensor of a checkpoint.

    Attributes:
        name: the tensor.
        shape: its shape.
        scheme: the scheme, spelled.
        size: the bytes that it takes.
        error: ‖W - Q‖ / ‖W‖ where W was there, or None.
        made: the scheme itself; None where no scheme has such codes.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    size: int
    error: float | None
    made: Scheme | None


def matrices(path: str | os.PathLike[str]) -> list[Matrix]:
    """The quantized tensors of a checkpoint; none of one in floats."""
    checkpoint = open_checkpoint(path, "path", follow_links=True)
    config = configuration_of(checkpoint)
    source = Matrices(Tensors(checkpoint), config, "path", jnp.float32)
    return [matrix_of(name, source.read(name)) for name in source.modules]


class Matrices:
    """The quantized parameters of a checkpoint by name."""

    def __init__(self, tensors: Tensors, config: dict[str, Any], argument: str, dtype: Any) -> None:
        self.tensors, self.config, self.argument, self.dtype = tensors, config, argument, dtype
        self.format = format_of(config, argument)
        with self.errors():
            each = self.format.find(tensors, config) if self.format else ()
            self.modules = {f"{m}.{p}": (m, p, shape) for m, p, shape in each}

    def read(self, name: str) -> Stored | Dense:
        assert self.format is not None
        with self.errors():
            stored = self.format.read(self.tensors, self.config, *self.modules[name])
            if stored is None:
                raise Unreadable(f"{name}: is not quantized as the configuration says")
            check_finite(stored, name, stored.dtype or self.dtype)
        return stored

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except Unreadable as e:
            raise ValueError(f"`{self.argument}`: {e}.") from None


def matrix_of(name: str, stored: Stored | Dense) -> Matrix:
    if isinstance(stored, Dense):
        size = stored.values.size * stored.bits // 8
        return Matrix(name, stored.values.shape, stored.what, size, None, None)
    parts = (stored.scale, stored.zero, *(stored.nested or ()))
    size = sum(x.nbytes for x in parts if x is not None)
    size += stored.codes.size * stored.scheme.bits // 8
    return Matrix(name, stored.codes.shape, spelled(stored.scheme), size, None, stored.scheme)
