"""Arrays of JAX as tensors of PyTorch, of which several may share their memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from jax.lax import stop_gradient
from jax.typing import ArrayLike

from ..._compat import is_concrete
from .. import _private
from .._private import pytree
from .._skeleton import to_jax
from ._refuse import find_place, refuse

Convert = Callable[[jax.Array], jax.Array]
# That of PyTorch's CPU, whose branches models take; the number tells arrays from constants.
DEVICE = torch.device("cpu", 1)


class Memory:
    """Values that a tensor and its views share.

    Attributes:
        array: the values.
        writes: how often they have changed.
    """

    def __init__(self, array: jax.Array) -> None:
        """Holds the values."""
        self.array = array
        self.writes = 0

    def write(self, x: jax.Array, convert: Convert) -> None:
        """Changes the values; under `no_grad` their gradient stays that of the old ones."""
        self.array = _settle(self.array, x, convert)
        self.writes += 1

    @property
    def type(self) -> Any:
        """What has the shape and the dtype of the values."""
        return self.array


class Pending(Memory):
    """The memory of a tensor that has no values, or none outside of a scan.

    Attributes:
        type: its shape and dtype.
        value: the values of all layers, if it is a parameter of each.
    """

    type: Any = None

    def __init__(self, type: Any, does: str, value: Any = None) -> None:
        """Takes what a module does that reads it, for the error."""
        self.type = type
        self.value = value
        self._does = does
        self.writes = 0

    @property
    def array(self) -> jax.Array:
        """Raises."""
        refuse(self._does, "Leave its list out of `scan`.")


class PartMemory(Memory):
    """The memory of a view.

    Attributes:
        source: the memory that it is a part of.
        read: the function from the array of the source to that of the view.
        convert: what changes the gradient of what is read, such as `stop_gradient`.
    """

    def __init__(self, source: Memory, read: Convert, convert: Convert) -> None:
        """Reads the values."""
        self.source = source
        self.read = read
        self.convert = convert
        self._known = (-1, source.array)
        self._known = (self.writes, self.array)

    @property
    def writes(self) -> int:
        """How often the source has changed."""
        return self.source.writes

    @property
    def array(self) -> jax.Array:
        """The values, which follow those of the source."""
        if self._known[0] != self.writes:
            self._known = (self.writes, self.convert(self.read(self.source.array)))
        return self._known[1]

    def write(self, x: jax.Array, convert: Convert) -> None:
        """Writes into the source; a detached view then has a gradient that its source has not."""
        x = _settle(self.array, x, convert)
        is_detached = self.convert is stop_gradient
        whole = _put(self.source.array, x, self.read)
        self.source.write(whole, stop_gradient if is_detached else convert)
        self._known = (self.writes, x)


def keep(x: jax.Array) -> jax.Array:
    """Returns its argument."""
    return x


def _settle(old: jax.Array, new: jax.Array, convert: Convert) -> jax.Array:
    return _replace(old, new) if convert is stop_gradient else convert(new)


@jax.custom_jvp
def _replace(old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns `new`, with the derivative of `old`."""
    del old
    return new


_replace.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def _put(whole: jax.Array, x: jax.Array, read: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns `whole`, with `x` where `read` reads."""
    if x.dtype != whole.dtype:
        refuse("writes into a view of another dtype", "Write into the tensor itself.")
    if jnp.issubdtype(whole.dtype, jnp.inexact):
        back = jax.linear_transpose(read, whole)
        return jnp.where(back(jnp.ones_like(x))[0] != 0, back(x)[0], whole)
    at = read(jnp.arange(whole.size).reshape(whole.shape))
    return whole.reshape(-1).at[at.reshape(-1)].set(x.reshape(-1)).reshape(whole.shape)


class Tensor(torch.Tensor):
    """An array of JAX. Its methods are PyTorch's own, so that the modes see each call.

    Attributes:
        call: the number of the call of the model on whose arguments they depend; 0 if on none.
        function: the call of an autograd.Function that has made it, if one has.
    """

    call = 0
    function: Any = None
    is_meta = False
    device = DEVICE
    __torch_function__ = _private.NO_FUNCTION

    @staticmethod
    def __new__(cls, memory: Memory, strides: Any = None) -> "Tensor":
        """Makes a tensor of which PyTorch knows the shape and the strides, but not the values."""
        shape = [n if isinstance(n, int) else 1 for n in memory.type.shape]
        dtype = _private.find_torch_dtype(memory.type.dtype)
        return _private.make_wrapper(cls, shape, strides, dtype)

    def __init__(self, memory: Memory, strides: Any = None) -> None:
        """Holds the memory."""
        del strides
        self._memory = memory

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises: a mode sees each call within that of a model."""
        raise NotImplementedError(
            f"{func} is called with a tensor of `apply` after its call. Return it as an output."
        )

    def __repr__(self, **_: Any) -> str:
        """Has the array."""
        return f"Tensor({self.memory.type})"

    @property
    def memory(self) -> Memory:
        """Where its values are."""
        if self.function is not None:
            self.function.settle()
        return self._memory

    @memory.setter
    def memory(self, memory: Memory) -> None:
        self._memory = memory

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Returns a part; a view where PyTorch does."""
        index = _make_index(index)
        if not _is_traced(index):
            return torch.Tensor.__getitem__(self, index)
        at = pytree.tree_map_only(torch.Tensor, to_array, index)
        convert = keep if torch.is_grad_enabled() else stop_gradient
        found = Tensor(PartMemory(self.memory, lambda x: x[at], convert))
        found.call = self.call
        return found

    def __setitem__(self, index: Any, x: Any) -> None:
        """Changes a part."""
        index = _make_index(index)
        if _is_traced(index):
            torch.Tensor.__setitem__(self[index], ..., x)
        else:
            torch.Tensor.__setitem__(self, index, x)

    @property
    def shape(self) -> torch.Size:
        """Returns the shape, of numbers alone."""
        shape = self.memory.type.shape
        if not all(isinstance(n, int) for n in shape):
            refuse(
                f"reads the shape {shape}, which is symbolic", "Export for each shape of its own."
            )
        return torch.Size(shape)

    @property
    def data(self) -> torch.Tensor:
        """The values without gradients; to write them changes no gradient."""
        return self.detach()

    @data.setter
    def data(self, x: torch.Tensor) -> None:
        self.memory.write(to_array(x), stop_gradient)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Returns the values; raises if they are traced."""
        del force
        if not is_concrete(self.memory.type):
            raise TracedError("NumPy")
        return np.array(self.memory.array)

    def jax(self) -> jax.Array:
        """Returns the array; `transformers` asks it whether values are traced."""
        return self.memory.array

    def tolist(self) -> Any:
        """Returns the values; raises if they are traced."""
        return self.numpy().tolist()


def to_tensor(x: ArrayLike) -> Tensor:
    """Makes a tensor of an array."""
    return Tensor(Memory(jnp.asarray(x)))


def to_array(x: torch.Tensor) -> jax.Array:
    """Returns the array in a tensor, or copies one of PyTorch."""
    if isinstance(x, Tensor):
        return x.memory.array
    with jax.ensure_compile_time_eval():
        return jnp.asarray(to_jax(x))


class StateError(NotImplementedError):
    """A call of a model reads what the one before has left."""

    def __init__(self, why: str = "") -> None:
        """Says where."""
        super().__init__(
            why or f"{find_place()} reads what the call before left. Pass it as an argument."
        )


class TracedError(jax.errors.TracerArrayConversionError):
    """A module reads traced values."""

    remedy = "Use PyTorch's functions there, or compute the values outside of the model."

    def __init__(self, by: str) -> None:
        """Says where, and by what."""
        why = f"{find_place()} reads values by {by}, which JAX cannot trace."
        TypeError.__init__(self, f"{why} {self.remedy}")


def _is_traced(index: Any) -> bool:
    """Whether numbers in an index have no values yet, which PyTorch would read."""
    numbers = [x for x in pytree.tree_leaves(index) if isinstance(x, Tensor) and x.ndim == 0]
    return not all(is_concrete(x.memory.type) for x in numbers)


def _make_index(index: Any) -> Any:
    """Makes tensors of lists of numbers, of which PyTorch would keep the shape alone."""
    if isinstance(index, tuple):
        return tuple(map(_make_index, index))
    numbers = pytree.tree_leaves(index) if isinstance(index, list) else []
    is_list = bool(numbers) and all(isinstance(i, int) for i in numbers)
    return torch.tensor(index) if is_list or isinstance(index, np.ndarray) else index
