"""The tensors of a quantized checkpoint; each is checked and read on demand."""

import re
from collections.abc import Collection, Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from ..._errors import Problem
from .._checkpoint import Checkpoint
from .._file import DTYPES, TensorInfo

FLOATS = ("F32", "F16", "BF16")
# Scales of a module's inputs and outputs, which are ignored: activations are not quantized here.
OF_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "input_scale_ub")
OF_ACTIVATIONS += ("input_zero_point", "output_zero_point", "input_global_scale")
READ = DTYPES | {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(np.uint8),  # exponents of 2
}

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
            wanted = " or ".join(dtypes)
            raise Unreadable(
                name, f"expected {wanted} of shape {shape}, got {entry.dtype} {entry.shape}"
            )
        return self.bytes(name).view(READ[entry.dtype]).reshape(shape)

    def check_copied(self, names: Iterable[str]) -> None:
        """Raises if one of `names` has a dtype that cannot be copied."""
        for name in names:
            if (dtype := self.dtype(name)) not in READ:
                raise Unreadable(name, f"its dtype {dtype} cannot be copied")

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


def is_pair(x: object) -> bool:
    """Whether a value of JSON is two positive integers."""
    return isinstance(x, list) and len(x) == 2 and all(type(n) is int and n > 0 for n in x)


def unpack(
    words: np.ndarray, axis: int, bits: int = 4, order: tuple[int, ...] | None = None
) -> np.ndarray:
    """Unpacks codes from int32 words, lowest bits first; the k-th is at place `order[k]`."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    places = order or range(32 // bits)
    mask = np.uint32(2**bits - 1)
    codes = np.stack([(words >> np.uint32(bits * k) & mask).astype(np.uint8) for k in places], -1)
    return np.moveaxis(codes.reshape(*words.shape[:-1], -1), -1, axis)
