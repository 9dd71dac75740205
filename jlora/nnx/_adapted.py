r"""A module of NNX with an adapter, for NNX's optimizers and trainers.

$$\mathrm{adapted}(x) = \mathrm{model}_{W + s \cdot A B}(x)$$
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from .._adapters import is_node
from .._arrays import pick
from .._compat import place_of
from .._merge import merge
from .._site import Rule
from .._transform import dropout, transform
from .._tree import bind, leaves_by_path, name_of, nest
from .._types import Holder, PyTree
from ..sharding import specs
from ._changes import find_attributes, find_changes, make_changes

# What a checkpoint of a trained model has otherwise, or does not need.
NO_STATE = nnx.Param, nnx.RngState, nnx.Cache, nnx.Intermediate
OWN = ("base", "lora", "rngs", "deterministic")  # attributes of an `Adapted`, not of its model


class Adapted(Holder, nnx.Module):
    r"""A module that computes what `model` computes with W + s·A·B instead of each adapted W.

    Train it with `nnx.Optimizer(adapted, tx, wrt=nnx.LoRAParam)`, where `tx` is of optax alone:
    there is no base to freeze. `jlora.optimizer`, `lora_plus` and `precondition` raise here, and
    say what to give instead. Differentiate only with respect to the adapter, by
    `argnums=nnx.DiffState(0, nnx.LoRAParam)`. Do not write `nnx.Param`, which includes
    `nnx.LoRAParam` but also trains the base. The model's methods are adapted like its call. Its
    other attributes can be read and set, except its parts, whose calls would not be adapted.

    Args:
        model: the module. Its arrays are shared, not copied.
        adapter: an adapter of the model's `nnx.Param`s, for example from `jlora.peft.load` or
            `jlora.checkpoint.restore`.
        rngs: a source of keys for the dropout of the low-rank path. Without it this dropout is off.

    Attributes:
        base: the frozen module. Calls update its state that is not trained, such as batch
            statistics and dropout counts.
        lora: the tree of the adapter, with each array as an `nnx.LoRAParam`, which is sharded like
            the axes of W that it has.
        adapter: the adapter as a tree of arrays, for all other functions of jlora. Assign another
            one to it to go on with that, such as the best one of a run.
        deterministic: whether the dropout of the low-rank path is off. `adapted.eval()` sets it to
            True and `adapted.train()` to False, here and in the base.

    Raises:
        TypeError: if `model` is not a module, or `adapter` is not an adapter.
        ValueError: if `adapter` does not fit the model; if the model already has `nnx.LoRAParam`s;
            if the adapter has dropout, and `rngs` neither a `dropout` nor a `default` stream.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, jlora
        >>> from flax import nnx
        >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
        >>> adapted = jlora.nnx.adapt(model, jlora.LoRA(rank=2), rngs=nnx.Rngs(1), example=(x,))
        >>> optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=nnx.LoRAParam)
        >>> gradient = nnx.grad(lambda m: m(x).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))
        >>> _ = optimizer.update(adapted, gradient(adapted))
        >>> bool(jnp.allclose(adapted(x), adapted.merge()(x), atol=1e-6))
        True
    """

    def __init__(self, model: nnx.Module, adapter: PyTree, *, rngs: nnx.Rngs | None = None) -> None:
        self.base = model
        self.adapter = adapter
        drops = any(x.dropout for _, x in leaves_by_path(adapter, is_node) if is_node(x))
        self.rngs = _stream(rngs, "dropout").fork() if rngs is not None and drops else None
        self.deterministic = False

    @property
    def adapter(self) -> PyTree:
        """The adapter as a tree of arrays."""
        return nnx.as_pure(self.lora)

    @adapter.setter
    def adapter(self, adapter: PyTree) -> None:
        params = _split(self.base)[1]
        bind(params, adapter)  # raises unless it fits
        held = vars(self).get("lora")
        new = _variables(params, adapter)
        if jax.tree.structure(held) == jax.tree.structure(new):
            nnx.update(held, nnx.state(new))  # a new attribute would not leave nnx.jit(graph=False)
        else:
            self.lora = nnx.data(new)

    def find_state(self) -> list[str]:
        """Lists variables of the base that are not trained, but that calls may change."""
        state = nnx.to_flat_state(nnx.state(self.base, nnx.Not(nnx.Any(*NO_STATE))))
        return [name_of(tuple(map(str, path))) for path, x in state if _has_state(x)]

    def merge(self) -> nnx.Module:
        """Makes a module of the model's class with W + s·A·B, in W's dtype; see `jlora.merge`.

        `merged` is another name of it.
        """
        graph, params, rest = _split(self.base)
        return nnx.merge(graph, merge(params, self.adapter), rest, copy=True)

    merged = merge

    @property
    def __call__(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The adapted call of the model, with its signature, which trainers read."""
        return self._adapt("__call__")

    def _adapt(self, method: str) -> Callable[..., Any]:
        own = getattr(type(self.base), method)
        if inspect.isgeneratorfunction(own):  # its body runs after the call, so each step is one
            return types.MethodType(own, self)

        @functools.wraps(getattr(self.base, method))
        def call(*args: Any, **kwargs: Any) -> Any:
            return self.run(own, *args, **kwargs)

        return call

    def run(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Computes `f(model, *args, **kwargs)` with the adapted model.

        Changes that `f` makes to the model's variables and attributes are made to the base. Changes
        to other modules and variables among the arguments are made to these.
        """
        given, put = pick((args, kwargs), _has_state, _has_state)
        held = [self.base, *given]
        graph, params, rest = nnx.split(held, _is_weight, ...)
        attributes = []

        def pure(params: nnx.State, rest: nnx.State) -> tuple[Any, nnx.State]:
            own = nnx.merge(graph, nnx.State({0: params}), rest, copy=True)
            args, kwargs = put(own[1:])
            out = f(own[0], *args, **kwargs)
            attributes[:] = find_attributes(held, own)
            if isinstance(out, Iterator):
                raise TypeError(
                    f"`f` returned a {type(out).__name__}, whose steps would run when the adapted "
                    "weights are gone. Return a list of its values."
                )
            return out, find_changes(rest, nnx.state(own, lambda *x: not _is_weight(*x)))

        adapter = self.adapter
        if self.rngs is not None and not self.deterministic:
            adapter = dropout(adapter, self.rngs())
        out, changes = transform(pure).apply(params[0], adapter, rest)
        make_changes(held, changes, attributes)
        return out

    def __setattr__(self, name: str, value: object) -> None:
        base = vars(self).get("base")
        is_own = name in OWN or hasattr(type(self), name) or not hasattr(base, name)
        if name == "adapter":  # NNX would refuse its arrays before the property gets them
            object.__setattr__(self, name, value)
        elif is_own:
            super().__setattr__(name, value)
        else:
            setattr(base, name, value)

    def __getattr__(self, name: str) -> Any:
        base = vars(self).get("base")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        found = getattr(base, name)
        if getattr(found, "__self__", None) is base:
            return self._adapt(name)
        if _has_state(found):
            raise AttributeError(
                f"calls of {name!r}, a part of the model, would not be adapted: use it in "
                f"adapted.run(lambda model, *args: ..., *args), or read adapted.base.{name}."
            )
        return found


def adapt(
    model: nnx.Module,
    *rules: Rule,
    rngs: nnx.Rngs,
    example: tuple[Any, ...] | Callable[[Any], Any],
) -> Adapted:
    """Adapts a module by rules.

    Args:
        model: the module. It does not change; its arrays are shared, not copied.
        *rules: as for `jlora.transform`. They match the model's `nnx.Param`s, whose paths are paths
            of attributes, such as `layers/0/kernel`.
        rngs: a source of keys: its `params` stream for A, its `dropout` stream for dropout.
        example: the arguments of a call, as a tuple of arrays or `jax.ShapeDtypeStruct`s. The call
            is only traced, to find how the model uses its weights. For other calls, give a function
            that gets the model and calls it.

    Returns:
        The adapted module. If the model's arrays are on a mesh, A and B are sharded like W.

    Raises:
        TypeError: if `model` is not a module, or `rngs` or `example` has the wrong type.
        ValueError: if a rule matches no leaf, or a leaf that it cannot adapt; if the model already
            has `nnx.LoRAParam`s; if `rngs` lacks a stream, and has no `default` stream either.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from flax import nnx
        >>> model, x = nnx.Linear(16, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 16))
        >>> adapted = jlora.nnx.adapt(model, jlora.LoRA(rank=2), rngs=nnx.Rngs(1), example=(x,))
        >>> jlora.count(adapted.adapter)
        48
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"`rngs` must be flax.nnx.Rngs, such as nnx.Rngs(0); got {type(rngs).__name__}."
        )
    if not isinstance(example, tuple) and not callable(example):
        raise TypeError(
            "`example` must be the tuple of the arguments of a call, such as (x,), or a function "
            f"of the model; got {type(example).__name__}. Write example=(x,) for one array."
        )
    graph, params, rest = _split(model)

    def pure(params: nnx.State, rest: nnx.State, *args: Any) -> Any:
        own = nnx.merge(graph, params, rest, copy=True)
        return example(own) if callable(example) else own(*args)

    args = () if callable(example) else example
    base, adapter = transform(pure, *rules).init(_stream(rngs, "params")(), params, rest, *args)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(base), strict=True)
    if any(x is not y for x, y in pairs):  # an initializer has changed W
        model = nnx.merge(graph, base, rest, copy=True)
    return Adapted(model, _place(base, adapter), rngs=rngs)


def _split(model: nnx.Module) -> tuple[Any, nnx.State, nnx.State]:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` must be a module of flax.nnx; got {type(model).__name__}.")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    own = nnx.to_flat_state(nnx.filter_state(params, nnx.LoRAParam))
    if own:
        path = name_of(tuple(map(str, own[0][0])))
        raise ValueError(
            f"`model` must not have nnx.LoRAParams, which jlora would take for the adapter, but "
            f"has some at {path}. Give the model without them, such as adapted.merge()."
        )
    return graph, params, rest


def _variables(params: nnx.State, adapter: PyTree) -> PyTree:
    """Makes a variable of each array, with its sharding as metadata."""
    own = {tuple(map(str, path)): x.get_metadata() for path, x in nnx.to_flat_state(params)}
    names = {path: PartitionSpec(*(x.get("out_sharding") or ())) for path, x in own.items()}

    def variable(x: jax.Array, spec: PartitionSpec) -> nnx.LoRAParam:
        found = nnx.LoRAParam(x)
        if any(spec):  # afterward, as there may be no mesh in scope now
            found.set_metadata(out_sharding=tuple(spec))
        return found

    return jax.tree.map(variable, adapter, specs(nest(names), adapter))


def _place(base: nnx.State, adapter: PyTree) -> PyTree:
    """Shards an adapter like its base if the base has arrays on a mesh."""
    is_on_mesh = any(isinstance(place_of(x), NamedSharding) for x in jax.tree.leaves(base))
    return jax.device_put(adapter, specs(base, adapter)) if is_on_mesh else adapter


def _stream(rngs: nnx.Rngs, name: str) -> nnx.RngStream:
    """Returns the stream `name`, or else the one named `default`."""
    if name not in rngs and "default" not in rngs:
        raise ValueError(
            f"`rngs` must have the stream {name!r} or 'default'; got {', '.join(rngs) or 'none'}. "
            f"Give nnx.Rngs(0), or add {name}=0."
        )
    return getattr(rngs, name)


def _has_state(x: object) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _is_weight(path: tuple[Any, ...], x: object) -> bool:
    return path[0] == 0 and issubclass(type(x), nnx.Param)
