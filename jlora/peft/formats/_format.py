"""The class of formats of quantized weights, their registry, and the tensors that they read."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..._errors import Problem, shorten
from .._checkpoint import Checkpoint
from .._file import DTYPES, INTEGERS, SHORT, TensorInfo
from ._codes import Codes, Dense

FLOATS = ("F32", "F16", "BF16")
# Scales of a module's inputs and outputs, which are ignored: activations are not quantized here.
OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "input_scale_ub")
OF_ACTIVATIONS += ("input_zero_point", "output_zero_point", "input_global_scale")
READ = DTYPES | SHORT | INTEGERS | {"F8_E8M0": np.dtype(np.uint8)}  # exponents of 2

# Last components of the names of floats that belong to codes.
_OF_CODES = re.compile(
    r"(nested_)?(absmax|quant_map)|SCB|scales"
    r"|(weight|\w*proj)_(scale|scale_inv|global_scale|zero_point)"
)
_BUFFERS = ("num_batches_tracked", "position_ids", "relative_position_index", "token_type_ids")


class Unreadable(Exception):  # noqa: N818 - collected into one ValueError
    """A tensor is missing, or does not have the form of its format."""

    def __init__(self, where: str, why: str, remedy: str = "") -> None:
        super().__init__(where, why)
        self.problem = Problem(where, why, remedy)


def refuse_field(name: str, why: str) -> Unreadable:
    """Makes the error about a field of the quantization in a configuration."""
    return Unreadable(f"`{name}` of the quantization", why)


class Tensors:
    """The tensors of a checkpoint by name.

    Attributes:
        taken: the names of those that were read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Reads nothing yet. The headers of the checkpoint were checked."""
        self._checkpoint = checkpoint
        self.taken = set[str]()

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of a name."""
        return name in self._checkpoint.where

    def __iter__(self) -> Iterator[str]:
        """Iterates over their names."""
        return iter(self._checkpoint.where)

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor, as safetensors calls it."""
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._entry(name).shape

    def matrix(self, name: str) -> tuple[int, int]:
        """Returns the shape of a tensor that must be a matrix."""
        shape = self.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise Unreadable(name, f"expected a matrix, got shape {shape}")
        return shape[0], shape[1]

    def read_matrix(self, name: str, dtypes: Collection[str]) -> np.ndarray:
        """Reads a tensor that must be a matrix of one of the `dtypes`."""
        return self.read(name, dtypes, self.matrix(name))

    def _entry(self, name: str) -> TensorInfo:
        if name not in self:
            raise Unreadable(name, "missing")
        return self._checkpoint.entry(name)

    def read(
        self, name: str, dtypes: Collection[str], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Reads a tensor; raises `Unreadable` for other dtypes, or for another `shape`."""
        entry = self._entry(name)
        shape = entry.shape if shape is None else shape
        if entry.dtype not in dtypes or entry.shape != shape:
            wanted = f"{' or '.join(dtypes)} of shape {shape}"
            raise Unreadable(name, f"expected {wanted}, got {entry.dtype} {entry.shape}")
        return self.bytes(name).view(READ[entry.dtype]).reshape(shape)

    def read_finite(
        self, name: str, dtypes: Collection[str], shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """Reads floats; raises for values that are not finite."""
        x = self.read(name, dtypes, shape)
        if not np.isfinite(x.astype(np.float32)).all():
            raise Unreadable(name, "has values that are not finite")
        return x

    def skip_activations(self, parameter: str) -> None:
        """Marks the scales of a module's activations as read, although they are ignored."""
        module = parameter.rpartition(".")[0]
        names = (f"{module}.{name}" for name in OF_ACTIVATIONS)
        self.taken.update(name for name in names if name in self)

    def bytes(self, name: str) -> np.ndarray:
        """Reads the bytes of a tensor of any dtype."""
        entry = self._entry(name)
        self.taken.add(name)
        whole = b"".join(self._checkpoint.pieces(name, max(entry.stop - entry.start, 1)))
        return np.frombuffer(whole, np.uint8)


def list_left(tensors: Tensors, read: Collection[str]) -> list[Problem]:
    """Lists tensors that were not `read`, and are neither plain floats nor known buffers."""
    left = (name for name in tensors if name not in read and _is_coded(tensors, name))
    return [Problem(name, f"{tensors.dtype(name)} {tensors.shape(name)}") for name in left]


def _is_coded(tensors: Tensors, name: str) -> bool:
    last = name.rpartition(".")[2]
    dtype = tensors.dtype(name)
    if dtype in DTYPES:
        return bool(_OF_CODES.fullmatch(last))
    of_attention = last == "bias" and len(tensors.shape(name)) == 4
    is_mask = dtype == "BOOL" or (dtype == "U8" and of_attention)
    return not is_mask and not (dtype == "I64" and last in _BUFFERS)


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
            raise refuse_field(name, f"expected {expected}, got {shorten(value)}")
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
        known = ", ".join(sorted(FORMATS))
        why = f"has the unknown `quant_method` {shorten(method)}; known are {known}"
        advice = "Give the original checkpoint, and quantize it with jlora.quantize."
        raise checkpoint.source.error(f"config.json {why}. {advice}", "config.json")
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
