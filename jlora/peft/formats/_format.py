"""The class of formats of quantized weights, and their registry."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..._errors import InputError
from .._checkpoint import Checkpoint
from .._file import shorten
from ._codes import Codes, Dense
from ._tensors import Tensors, Unreadable


class Format:
    """Reads the quantized weights of a checkpoint. This base class finds none.

    Attributes:
        tensors: the tensors of the checkpoint.
        config: `quantization_config` of its `config.json`.
        marks: endings of the names of tensors in codes, with the endings of their parameters.
        dtypes: dtypes of tensors that are parameters in codes.
        keeps_axes: whether codes of experts have the same axes as their parameter in floats. If
            not, codes are (experts, outputs, inputs), and floats (experts, inputs, outputs).
    """

    marks: ClassVar[Mapping[str, str]] = {}
    dtypes: ClassVar[Collection[str]] = ()
    keeps_axes: ClassVar[bool] = False

    def __init__(self, tensors: Any, config: dict[str, Any]) -> None:
        """Reads nothing yet."""
        self.tensors, self.config = tensors, config

    def find(self) -> Iterator[str]:
        """Yields the names of the quantized parameters, some of them more than once."""
        for name in self.tensors:
            ends = [end for end in self.marks if name.endswith(end)]
            yield from (name.removesuffix(end) + self.marks[end] for end in ends)
            if self.tensors.dtype(name) in self.dtypes:
                yield name

    def read(self, name: str) -> Codes | Dense:
        """Reads a parameter that `find` yields, (…, outputs, inputs).

        Returns:
            `Codes`, or `Dense` if no scheme has such codes.

        Raises:
            Unreadable: if its tensors contradict each other.
        """
        raise NotImplementedError

    def field(self, name: str, legal: Collection[Any], default: Any = None) -> Any:
        """Returns a field of the configuration; raises unless it has one of the `legal` values."""
        value = self.config.get(name, default)
        if type(value) not in {type(x) for x in legal} or value not in legal:
            expected = " or ".join(map(str, legal))
            raise Unreadable(
                f"`{name}` of the quantization", f"expected {expected}, got {shorten(value)}"
            )
        return value


FORMATS: dict[str, type[Format]] = {}  # by `quant_method` of the configuration
F = TypeVar("F", bound=type[Format])


def register(*methods: str) -> Callable[[F], F]:
    """Registers a format for the `quant_method`s of configurations."""

    def add(format: F) -> F:
        FORMATS.update(dict.fromkeys(methods, format))
        return format

    return add


def open_format(checkpoint: Checkpoint) -> Format:
    """Opens a checkpoint in the format that its configuration names."""
    tensors = Tensors(checkpoint)
    config = checkpoint.quantization
    method = config.get("quant_method")
    if not config:
        return Format(tensors, config)
    if not isinstance(method, str) or method not in FORMATS:
        raise InputError(
            checkpoint.source.argument,
            f"config.json has the unknown `quant_method` "
            f"{shorten(method)}; known are {', '.join(sorted(FORMATS))}. Give the original "
            "checkpoint, and quantize it with jlora.quantize.",
            path="config.json",
        )
    return FORMATS[method](tensors, config)


def read_checked(
    format: Format, name: str, dtype: DTypeLike, shape: tuple[int, ...] | None = None
) -> Codes | Dense:
    """Reads a parameter; raises `Unreadable` for another `shape`, or for values that overflow.

    `dtype` is used unless the file states another.
    """
    found = format.read(name)
    if shape not in (None, found.shape):
        raise Unreadable(name, f"expected shape {shape}, got {found.shape}")
    dtype = jnp.dtype(found.dtype or dtype)
    bound = found.bound
    if math.isnan(bound):
        raise Unreadable(name, "has values that are NaN")
    if bound > float(jnp.finfo(dtype).max):
        raise Unreadable(name, f"its scales allow values up to {bound:.3g}, beyond {dtype}")
    return found
