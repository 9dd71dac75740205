"""Which parameters a model reads otherwise than in a call of their modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import torch  # pyright: ignore[reportMissingImports]
from torchax.ops import mappings  # pyright: ignore[reportMissingImports]
from torchax.tensor import Environment, Tensor  # pyright: ignore[reportMissingImports]


class Parameter(Tensor):
    """A tensor that calls `tell` when its values are read, other than its shape and dtype."""

    def __new__(cls, x: jax.Array, environment: Environment, tell: Callable[[], None]) -> Any:
        """Makes the shell that PyTorch sees."""
        del tell
        return super().__new__(cls, x, environment)

    def __init__(self, x: jax.Array, environment: Environment, tell: Callable[[], None]) -> None:
        """Holds the array."""
        self._tell = tell
        super().__init__(x, environment)

    @property
    def _elem(self) -> jax.Array:
        """The array, which all operators of torchax read here."""
        self._tell()
        return self._held

    @_elem.setter
    def _elem(self, x: jax.Array) -> None:
        self._held = x

    @property
    def shape(self) -> torch.Size:
        """The shape."""
        return torch.Size(self._held.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self._held.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return mappings.j2t_dtype(self._held.dtype)


class Watch:
    """Sees the calls of a model's modules, and who reads its parameters.

    Attributes:
        reads: by each parameter that was read, whether only calls of its modules read it.
    """

    def __init__(
        self, model: torch.nn.Module, tied: Mapping[str, Sequence[str]], reads: dict[str, bool]
    ) -> None:
        """Watches a model, in which some parameters have several names."""
        self.reads = reads
        self._model, self._tied = model, tied
        self._called: list[torch.nn.Module] = []
        for module in model.modules():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)

    def parameter(self, name: str, x: jax.Array, environment: Environment) -> Parameter:
        """Makes a tensor of the array of a parameter."""
        every = (name, *self._tied.get(name, ()))
        owners = [self._model.get_submodule(x.rpartition(".")[0]) for x in every]

        def tell() -> None:
            is_called = any(owner is module for owner in owners for module in self._called)
            self.reads[name] = self.reads.get(name, True) and is_called

        return Parameter(x, environment, tell)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        del args
        self._called.append(module)

    def _leave(self, module: torch.nn.Module, args: Any, outputs: Any) -> None:
        del module, args, outputs
        self._called.pop()
