"""Arrays of JAX as tensors of PyTorch, of which several may share their memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from jax.lax import stop_gradient
from torch.utils import _pytree  # pyright: ignore[reportMissingImports]
from torchax import tensor as torchax  # pyright: ignore[reportMissingImports]
from torchax.ops import mappings  # pyright: ignore[reportMissingImports]

from ..._compat import is_concrete
from ._refuse import find_place, refuse

Convert = Callable[[jax.Array], jax.Array]


class Memory:
    """What tensors share.

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


class Tensor(torchax.Tensor):
    """An array of JAX. Its methods are PyTorch's own, so that the environment sees each call.

    Attributes:
        memory: where its values are.
        call: the number of the call of the model on whose arguments they depend; 0 if on none.
    """

    call = 0
    is_meta = False

    @staticmethod
    def __new__(cls, memory: Memory, env: Any, strides: Any = None) -> "Tensor":
        """Makes a tensor of which PyTorch knows the shape and the strides, but not the values."""
        del env
        shape = [n if isinstance(n, int) else 1 for n in memory.type.shape]
        dtype = mappings.j2t_dtype(memory.type.dtype)
        return cls._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device="meta")

    def __init__(self, memory: Memory, env: Any, strides: Any = None) -> None:
        """Holds the memory."""
        del strides
        self.memory = memory
        self._env = env

    detach = torch.Tensor.detach
    flatten = torch.Tensor.flatten
    type_as = torch.Tensor.type_as

    def detach_(self) -> "Tensor":
        """Stops gradients; other tensors with the same memory keep theirs."""
        self.memory = PartMemory(self.memory, keep, stop_gradient)
        return self

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Returns a part; a view where PyTorch does."""
        index = _make_index(index)
        if not _is_traced(index):
            return torch.Tensor.__getitem__(self, index)
        at = self._env.t2j_iso(index)
        convert = keep if torch.is_grad_enabled() else stop_gradient
        found = Tensor(PartMemory(self.memory, lambda x: x[at], convert), self._env)
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
    def _elem(self) -> jax.Array:
        """The name of torchax for the values."""
        return self.memory.array

    @_elem.setter
    def _elem(self, x: jax.Array) -> None:
        self.memory.write(x, keep)

    @property
    def data(self) -> torch.Tensor:
        """The values without gradients; to write them changes no gradient."""
        return self.detach()

    @data.setter
    def data(self, x: torch.Tensor) -> None:
        self.memory.write(self._env.t2j_iso(x), stop_gradient)

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """Returns the values; raises if they are traced."""
        del force
        if not is_concrete(self._elem):
            raise TracedError("NumPy")
        return np.array(self._elem)

    def tolist(self) -> Any:
        """Returns the values; raises if they are traced."""
        return self.numpy().tolist()


class TracedError(jax.errors.TracerArrayConversionError):
    """A module reads traced values."""

    remedy = "Use PyTorch's functions there, or compute the values outside of the model."

    def __init__(self, by: str) -> None:
        """Says where, and by what."""
        why = f"{find_place()} reads values by {by}, which JAX cannot trace."
        TypeError.__init__(self, f"{why} {self.remedy}")


def _is_traced(index: Any) -> bool:
    """Whether numbers in an index have no values yet, which PyTorch would read."""
    numbers = [x for x in _pytree.tree_leaves(index) if isinstance(x, Tensor) and x.ndim == 0]
    return not all(is_concrete(x._elem) for x in numbers)


def _make_index(index: Any) -> Any:
    """Makes tensors of lists of numbers, of which PyTorch would keep the shape alone."""
    if isinstance(index, tuple):
        return tuple(map(_make_index, index))
    numbers = _pytree.tree_leaves(index) if isinstance(index, list) else []
    is_list = bool(numbers) and all(isinstance(i, int) for i in numbers)
    return torch.tensor(index) if is_list or isinstance(index, np.ndarray) else index
