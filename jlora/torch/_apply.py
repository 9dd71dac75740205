"""The call of a module, as a function of its parameters."""

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from torch.utils import _pytree  # pyright: ignore[reportMissingImports]
from torchax.ops import jtorch  # pyright: ignore[reportMissingImports]
from torchax.tensor import Environment, Tensor, View  # pyright: ignore[reportMissingImports]

from .._compat import is_concrete
from .._errors import InputError
from .._rules import near_misses
from .._tree import leaves_by_path
from .._types import PyTree
from ._reads import Watch
from ._skeleton import copy_structure, find_constants, read_structure, to_jax

Shardings = Mapping[str, PartitionSpec | NamedSharding]


class Operators(Environment):
    """The operators of torchax, and what it lacks. It draws no random numbers of its own."""

    def __init__(self) -> None:
        """Adds operators to those of torchax, for this object alone."""
        super().__init__()
        self.override_op_definition(torch.ops.aten.embedding, self._look_up)
        self.override_op_definition(torch.ops.aten._is_all_true, self._check)
        self.override_op_definition(torch.ops.aten._grouped_mm, self._multiply_groups)
        for multiply in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.override_op_definition(multiply, self._multiply)
        self.override_op_definition(torch.nn.functional.scaled_dot_product_attention, self._attend)

    def get_and_rotate_prng_key(self, generator: torch.Generator | None = None) -> jax.Array:
        """Returns the key of a generator; raises without one."""
        if generator is None:
            raise NotImplementedError(
                "the model draws random numbers, which would be the same in each call of a "
                "compiled function. Give it the numbers as an argument, or a torch.Generator."
            )
        return super().get_and_rotate_prng_key(generator)

    def t2j_iso(self, torchtensors: Any) -> Any:
        """Returns the arrays in tensors; also of PyTorch's own, which models make as constants."""

        def convert(x: torch.Tensor) -> jax.Array | float:
            # A scalar of PyTorch does not widen the dtype of an array.
            is_constant = x.ndim == 0 and not isinstance(x, Tensor | View)
            return x.item() if is_constant else to_array(x)

        return _pytree.tree_map_only(torch.Tensor, convert, torchtensors)

    def wrap(self, x: ArrayLike) -> Tensor:
        """Makes a tensor of an array."""
        return Tensor(jnp.asarray(x), self)

    def _look_up(
        self, weight: torch.Tensor, ids: torch.Tensor, padding_idx: int = -1, *options: bool
    ) -> Tensor:
        """Looks up rows of an embedding; that of torchax is a `custom_jvp`, without sites."""
        del options
        table, at = self.t2j_iso((weight, ids))
        found = jnp.take(table, at, axis=0)
        if padding_idx >= 0:
            is_padding = (at == padding_idx)[..., None]
            found = jnp.where(is_padding, jax.lax.stop_gradient(found), found)
        return self.wrap(found)

    def _multiply(self, x: torch.Tensor, y: torch.Tensor) -> Tensor:
        """Multiplies; PyTorch would merge the axes of a batch, which a mesh may shard."""
        return self.wrap(jnp.matmul(*self.t2j_iso((x, y))))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attends, with softmax in float32; what JAX's function does not take, torchax does."""
        is_plain = query.ndim == 4 and query.shape[0] == key.shape[0] and key.shape == value.shape
        if dropout_p or not is_plain or (attn_mask is not None and attn_mask.ndim != 4):
            return jtorch.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        *heads, mask = self.t2j_iso((query, key, value, attn_mask))
        is_bias = mask is not None and mask.dtype != bool
        found = jax.nn.dot_product_attention(
            *(jnp.swapaxes(x, 1, 2) for x in heads),
            **{"bias" if is_bias else "mask": mask},
            scale=scale,
            is_causal=is_causal,
        )
        return self.wrap(jnp.swapaxes(found, 1, 2))

    def _multiply_groups(
        self, x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, *options: Any
    ) -> Tensor:
        """Multiplies rows that are sorted by their experts, each with the matrix of its expert."""
        del options
        rows, stack, ends = self.t2j_iso((x, weights, offs))
        sizes = jnp.diff(ends, prepend=jnp.zeros(1, ends.dtype))
        return self.wrap(jax.lax.ragged_dot(rows, stack, sizes))

    def _check(self, x: torch.Tensor) -> torch.Tensor:
        """Whether a check of the model holds; of traced values nobody knows, so it does."""
        holds = self.t2j_iso(x)
        return torch.tensor(not is_concrete(holds) or bool(holds.all()))


def to_array(x: torch.Tensor) -> jax.Array:
    """Returns the array in a tensor of torchax, or copies one of PyTorch."""
    return x.jax() if isinstance(x, Tensor | View) else jnp.asarray(to_jax(x))


class Call(torch.nn.Module):
    """A module whose call is the call of a method of `model`."""

    def __init__(self, model: torch.nn.Module, method: str) -> None:
        """Holds the model."""
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method; `forward` with its hooks."""
        call = self.model if self.method == "forward" else getattr(self.model, self.method)
        return call(*args, **kwargs)


class Apply:
    """A function of the parameters of a module; see `jlora.torch.extract`.

    Attributes:
        structure: what `jlora.torch.names` needs to know of the module.
        reads: by each parameter that a call has read, whether only calls of its modules read it.
            All calls and traces add to it; nothing else changes.
    """

    def __init__(self, model: torch.nn.Module, activations: Shardings | None) -> None:
        """Copies the structure of `model`."""
        skeleton = copy_structure(model)
        self.structure = read_structure(skeleton)
        self.reads: dict[str, bool] = {}
        self._constants = find_constants(skeleton)
        self._parameters = dict(skeleton.named_parameters()).keys()
        self._environment = Operators()
        self._model = skeleton
        for pattern, sharding in (activations or {}).items():
            self._constrain(pattern, sharding)

    def __call__(
        self, params: PyTree, /, *args: Any, method: str = "forward", **kwargs: Any
    ) -> Any:
        """Computes what the model computes with `params`."""
        given = {".".join(path): x for path, x in leaves_by_path(params)}
        args, kwargs = _pytree.tree_map(self._to_torch, (args, kwargs))
        # A copy, as modules may keep values in their attributes.
        call = Call(copy.deepcopy(self._model), method)
        watch = Watch(call.model, self.structure.tied, self.reads)
        tensors: dict[str, torch.Tensor]
        tensors = {name: self._environment.wrap(x) for name, x in self._constants.items()}
        for name, x in given.items():
            if name in self._parameters:
                tensors[name] = watch.parameter(name, jnp.asarray(x), self._environment)
            else:
                tensors[name] = self._environment.wrap(jax.lax.stop_gradient(x))
        tensors = {f"model.{name}": x for name, x in tensors.items()}
        with self._environment:
            out = torch.func.functional_call(call, tensors, args, kwargs, strict=True)
        return _to_jax(out, "")

    def _to_torch(self, x: object) -> Any:
        if isinstance(x, torch.Tensor):
            raise TypeError(
                "`apply` takes arrays of JAX or NumPy; got a torch.Tensor. Give x.numpy()."
            )
        return self._environment.wrap(x) if isinstance(x, jax.Array | np.ndarray) else x

    def _constrain(self, pattern: str, sharding: PartitionSpec | NamedSharding) -> None:
        """Constrains the outputs of the modules whose last components match `pattern`."""
        paths = {name.replace(".", "/"): m for name, m in self._model.named_modules()}
        found = [m for path, m in paths.items() if re.fullmatch(f"(?:.*/)?(?:{pattern})", path)]
        if not found:
            raise InputError(
                "activations",
                f"has {pattern!r}, which matches no module. " + near_misses(pattern, list(paths)),
            )

        def constrain(module: torch.nn.Module, args: Any, out: Any) -> Any:
            del module, args
            leaves, structure = _pytree.tree_flatten(out)
            first = next(i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))
            x = jax.lax.with_sharding_constraint(to_array(leaves[first]), sharding)
            leaves[first] = self._environment.wrap(x)
            return _pytree.tree_unflatten(leaves, structure)

        for module in found:
            module.register_forward_hook(constrain)


def _to_jax(x: Any, where: str) -> Any:
    """Replaces tensors by arrays, and registers the classes around them as pytrees."""
    if isinstance(x, torch.Tensor):
        return to_array(x)
    if x is None or isinstance(x, bool | int | float | complex):
        return x
    if isinstance(x, tuple | list):
        each = [_to_jax(y, f"{where}[{i}]") for i, y in enumerate(x)]
        return type(x)(*each) if hasattr(x, "_fields") else type(x)(each)
    if isinstance(x, dict) or dataclasses.is_dataclass(x):
        found = _make(type(x), {k: _to_jax(y, f"{where}[{k!r}]") for k, y in _items(x).items()})
        if jax.tree_util.all_leaves([found]):
            _register(type(x))
        return found
    raise TypeError(
        f"`model` returns an object of type {type(x).__name__} at output{where}, which holds no "
        "arrays of JAX. Ask for outputs without it, for example by use_cache=False."
    )


def _items(x: Any) -> Mapping[str, Any]:
    return x if isinstance(x, dict) else vars(x)


def _make(kind: type[Any], items: Mapping[str, Any]) -> Any:
    """Makes a dict or a dataclass without its constructor, which may read the values."""
    found: Any = kind.__new__(kind)
    for name, x in items.items():
        if isinstance(found, dict):
            found[name] = x
        else:
            object.__setattr__(found, name, x)
    return found


def _register(kind: type[Any]) -> None:
    jax.tree_util.register_pytree_with_keys(
        kind,
        lambda x: ([(jax.tree_util.GetAttrKey(k), y) for k, y in _items(x).items()], (*_items(x),)),
        lambda keys, values: _make(kind, dict(zip(keys, values, strict=True))),
    )
