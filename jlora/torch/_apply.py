"""The call of a module, as a function of its parameters."""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from jax.sharding import NamedSharding, PartitionSpec

from .._compat import is_concrete, is_staged
from .._errors import InputError
from .._rules import near_misses
from .._tree import leaves_by_path
from .._types import PyTree
from ._caches import register_caches
from ._calls import WITHIN, Scan, recompute
from ._names import Stack
from ._private import pytree
from ._scopes import enter_scopes
from ._skeleton import check_hooks, copy_structure, find_constants, find_saved, read_structure
from ._stacks import NO_SCAN, stack_arrays, strip
from .operators._dispatch import running
from .operators._refuse import DRAWN, SAME, refuse
from .operators._state import find_left, read_attributes, read_draws
from .operators._tensor import Pending, StateError, Tensor, to_array, to_tensor

Shardings = Mapping[str, PartitionSpec | NamedSharding]
Policies = Mapping[str, Callable[..., bool] | None]


class MethodCall(torch.nn.Module):
    """A module whose call is the call of a method of `model`."""

    def __init__(self, model: torch.nn.Module, method: str) -> None:
        """Holds the model."""
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the method with arrays; raises if its next call would compute something else."""
        before = read_attributes(self.model)
        draws = read_draws()
        out = self._call(1, args, kwargs)
        if draws != read_draws():
            self._check_draws(args, kwargs)
        check_hooks(self.model)
        left = find_left(before, read_attributes(self.model))
        if left:
            self._check(left, args, kwargs)
        return convert(out, _to_jax)  # while the model has its parameters

    def _call(self, number: int, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(functools.partial(self._wrap, number), (args, kwargs))
        call = self.model if self.method == "forward" else getattr(self.model, self.method)
        return call(*args, **kwargs)  # the module's own, with its hooks

    def _wrap(self, number: int, x: object) -> Any:
        if not jax.tree_util.all_leaves([x]):  # a cache
            return jax.tree.map(functools.partial(self._wrap, number), x)
        if not is_static(x):
            found: Any = to_tensor(x)
        elif isinstance(x, torch.Tensor | np.ndarray):
            is_copied = isinstance(x, np.ndarray)  # as the model may change it
            found = torch.tensor(x) if is_copied else x.detach().clone()
        else:
            return x
        found.call = number
        return found

    def _check_draws(self, args: Any, kwargs: Any) -> None:
        """Raises if two more calls differ; numbers that are seeded or not used change nothing."""

        def again() -> list[jax.Array]:
            out = pytree.tree_leaves(self._call(1, args, kwargs))
            return [to_array(x) for x in out if isinstance(x, Tensor)]

        one, two = (jax.make_jaxpr(lambda: again())() for _ in range(2))  # not a cached one
        pairs = zip(one.consts, two.consts, strict=False)
        is_same = all(x is y or (is_concrete(x) and np.array_equal(x, y)) for x, y in pairs)
        if not is_same or str(one.jaxpr) != str(two.jaxpr):
            raise NotImplementedError(
                f"`model` draws numbers by Python or NumPy, {SAME}. {DRAWN[1]}"
            )

    def _check(self, left: list[str], args: Any, kwargs: Any) -> None:
        """Calls again, and raises if that reads what the first call left in attributes."""

        def again() -> tuple[()]:
            out = pytree.tree_leaves(self._call(2, args, kwargs))
            if any(getattr(x, "call", 0) == 1 for x in out):
                raise StateError("An output is one of the first call.")
            return ()

        try:
            jax.eval_shape(again) if is_staged() else again()
        except StateError as e:
            raise NotImplementedError(
                f"`model` leaves values in its {', '.join(left)} which its next call reads, and "
                "they would be lost. Return them as outputs, and pass them as arguments."
            ) from e


class Apply:
    """A function of the parameters of a module; see `jlora.torch.extract`.

    Attributes:
        structure: what `jlora.torch.names` needs to know of the module.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        activations: Shardings | None,
        stacks: Sequence[Stack],
        remat: Policies,
    ) -> None:
        """Copies the structure of `model`."""
        register_caches()
        skeleton = copy_structure(model)
        self.structure = read_structure(skeleton)._replace(stacks=tuple(stacks))
        self._constants = stack_arrays(find_constants(skeleton), stacks)
        for stack in stacks:
            strip(skeleton, stack)
        self._buffers = find_saved(skeleton).keys() - dict(skeleton.named_parameters()).keys()
        self._remat = {x: p for path, p in remat.items() for x in _match(skeleton, "remat", path)}
        self._model = skeleton
        for pattern, sharding in (activations or {}).items():
            self._constrain(pattern, sharding)

    @property
    def inside(self) -> tuple[str, ...]:
        """The modules that are traced on their own, and the lists of layers that a scan runs."""
        return (*self._remat, *(stack.name for stack in self.structure.stacks))

    def __call__(
        self, params: PyTree, /, *args: Any, method: str = "forward", **kwargs: Any
    ) -> Any:
        """Computes what the model computes with `params`."""
        return self.run(params, args, kwargs, method)

    def run(
        self,
        params: PyTree,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        method: str,
        seen: dict[str, Any] | None = None,
    ) -> Any:
        """Calls a method; adds what modules return to `seen`, but for those of `inside`."""
        every = {".".join(path): x for path, x in leaves_by_path(params)}
        for name in self._buffers & every.keys():
            every[name] = jax.lax.stop_gradient(every[name])
        every |= self._constants
        tensors: dict[str, torch.Tensor]
        tensors = {f"model.{name}": self._wrap(x, name) for name, x in every.items()}
        # A copy, as modules may keep values in their attributes.
        model = copy.deepcopy(self._model)
        enter_scopes(model)
        if seen is not None:
            record_outputs(model, self.inside, seen, to_array)
        for name, policy in self._remat.items():
            recompute(model.get_submodule(name), policy)
        for stack in self.structure.stacks:
            Scan(stack, model)
        call = MethodCall(model, method)
        with running():
            return torch.func.functional_call(call, tensors, tuple(args), dict(kwargs), strict=True)

    def _wrap(self, x: jax.Array, name: str) -> Tensor:
        """Makes the tensor of a leaf; of several layers, one that only their scan can read."""
        if not any(stack.place(name) for stack in self.structure.stacks):
            return to_tensor(x)
        one = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        does = "reads a parameter of a layer in `scan` outside of its call"
        return Tensor(Pending(one, does, x))

    def _constrain(self, pattern: str, sharding: PartitionSpec | NamedSharding) -> None:
        """Constrains the outputs of the modules whose last components match `pattern`."""

        def constrain(module: torch.nn.Module, args: Any, out: Any) -> Any:
            del module, args
            leaves, structure = pytree.tree_flatten(out)
            first = next(i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor))
            x = leaves[first]
            leaves[first] = to_tensor(jax.lax.with_sharding_constraint(to_array(x), sharding))
            return pytree.tree_unflatten(leaves, structure)

        for name in _match(self._model, "activations", pattern):
            self._model.get_submodule(name).register_forward_hook(constrain)


def _to_jax(x: torch.Tensor, where: str) -> jax.Array:
    if getattr(x, "call", 0) == WITHIN:
        refuse(f"returns a value of a layer in a scan, at output{where}", NO_SCAN)
    return to_array(x)


def convert(x: Any, change: Callable[[torch.Tensor, str], Any], where: str = "") -> Any:
    """Changes the tensors of an output, and registers the classes around them as pytrees."""
    if isinstance(x, torch.Tensor):
        return change(x, where)
    if x is None or isinstance(x, bool | int | float | complex | jax.Array):
        return x
    if isinstance(x, tuple | list):
        each = [convert(y, change, f"{where}[{i}]") for i, y in enumerate(x)]
        return type(x)(*each) if hasattr(x, "_fields") else type(x)(each)
    if isinstance(x, dict) or dataclasses.is_dataclass(x):
        items = {k: convert(y, change, f"{where}[{k!r}]") for k, y in _items(x).items()}
        found = _make(type(x), items)
        if jax.tree_util.all_leaves([found]):
            _register(type(x))
        return found
    if not jax.tree_util.all_leaves([x]):  # a cache
        return jax.tree.map(lambda y: convert(y, change, where), x)
    raise TypeError(
        f"`model` returns an object of type {type(x).__name__} at output{where}, which holds "
        "no arrays of JAX. Ask for outputs without it."
    )


def record_outputs(
    model: torch.nn.Module,
    inside: Sequence[str],
    seen: dict[str, Any],
    read: Callable[[torch.Tensor], Any],
) -> None:
    """Has `seen` get what modules return, by number and name; not of those in `inside`."""

    def leave(module: torch.nn.Module, args: Any, out: Any) -> None:
        del args
        for x in filter(torch.is_tensor, pytree.tree_leaves(out)):
            seen[f"{len(seen)} {names[module]}"] = read(x)

    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if not any(f"{name}.".startswith(f"{x}.") for x in inside):
            module.register_forward_hook(leave)


def is_static(x: object) -> bool:
    """Whether the model may read the values of an argument, which is not traced then."""
    is_array = isinstance(x, jax.Array | np.ndarray)
    return not is_array or (isinstance(x, np.ndarray) and x.dtype.kind in "biu")


def _match(model: torch.nn.Module, argument: str, pattern: str) -> list[str]:
    """Finds the modules whose last components match a pattern."""
    paths = {name.replace(".", "/"): name for name, _ in model.named_modules()}
    found = [x for path, x in paths.items() if re.fullmatch(f"(?:.*/)?(?:{pattern})", path)]
    if not found:
        why = f"has {pattern!r}, which matches no module. {near_misses(pattern, list(paths))}"
        raise InputError(argument, why)
    return found


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
