"""Errors for objects of other libraries that were given instead of a function or an array."""

import functools
import reprlib
from collections.abc import Callable

import jax
import numpy as np

from ._errors import InputError
from ._tree import leaves_by_path, name_of
from ._types import Path, PyTree

_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct

_SPLIT = (
    "split it by graph, params, rest = nnx.split(model, nnx.Param, ...). Then give a function of "
    "params and rest that merges them by nnx.merge(graph, params, rest, copy=True), and returns "
    "the new rest beside its outputs."
)
_NAMED = (
    "{v.path: v.value for v in model.trainable_variables} as the parameters, and lambda params, "
    "rest, x: model.stateless_call([params[v.path] for v in model.trainable_variables], rest, x) "
    "as the function"
)

# What to give instead of a module that holds its parameters, by package and class.
_MODULES = {
    ("flax.linen", "Module"): "Give its apply: jlora.transform(model.apply, ...), with the "
    "variables of model.init as the parameters.",
    ("flax.nnx", "Module"): "Give a function of a module, lambda model, x: model(x), and the "
    "module itself as the parameters. If it has state (batch statistics, dropout), " + _SPLIT,
    ("equinox", "Module"): "Split it by params, static = eqx.partition(model, eqx.is_array), and "
    "give lambda params, x: eqx.combine(params, static)(x).",
    ("keras", "Layer"): f"Give {_NAMED}.",
    ("torch", "Module"): "Give what jlora.torch.extract makes of it: params, apply = "
    "jlora.torch.extract(model).",
}


def check_apply_fn(apply_fn: object) -> None:
    """Raises `TypeError` if `apply_fn` is a module that holds its parameters, or not callable."""
    for (package, name), remedy in _MODULES.items():
        if _is_a(package, name, apply_fn):
            raise TypeError(
                "`apply_fn` must be a function of parameters; got the module "
                f"{type(apply_fn).__name__} of {package}. {remedy}"
            )
    if not callable(apply_fn):
        raise TypeError(
            "`apply_fn` must be a function of parameters; got an object of type "
            f"{type(apply_fn).__name__}. The function comes first: "
            "transform(model.apply, LoRA(...))."
        )


def check_leaf(x: object, path: Path) -> None:
    """Raises `TypeError` if a leaf of the parameters is neither an array nor a number."""
    if isinstance(x, _ARRAYS | int | float | complex):
        return
    raise TypeError(
        f"`params` must be a pytree of arrays; the leaf {name_of(path)!r} is {reprlib.repr(x)} of "
        f"type {type(x).__name__}.{_remedy_for(x)}"
    )


def check_kept(params: PyTree) -> Callable[[], None]:
    """Returns a check that raises `ValueError` if variables of an NNX module in `params` changed.

    The function gets a new module at each call, so its changes would be lost.
    """
    is_variable = functools.partial(_is_a, "flax.nnx", "Variable")
    if not any(map(is_variable, jax.tree.leaves(params, is_leaf=is_variable))):
        return lambda: None
    before = dict(leaves_by_path(params))

    def check() -> None:
        after = leaves_by_path(params)
        if changed := [name_of(path) for path, x in after if before.get(path, x) is not x]:
            raise InputError(
                "apply_fn",
                f"changes variables of the module of flax.nnx that it gets, at "
                f"{', '.join(changed)}. The change would be lost: each step would start with the "
                f"same statistics and dropout keys. Call model.eval() before, or {_SPLIT}",
            )

    return check


def _remedy_for(x: object) -> str:
    if _is_a("keras", "Variable", x):
        return f" Give {_NAMED}."
    if _is_a("flax.nnx", "HijaxVariable", x):
        return " Make the module without HiJAX: with flax.nnx.var_defaults(hijax=False)."
    if callable(x):
        return (
            " Separate the arrays from the rest and combine both in the function. In Equinox: "
            "params, static = eqx.partition(model, eqx.is_array), and "
            "lambda params, x: eqx.combine(params, static)(x)."
        )
    return " Convert it with jnp.asarray." if hasattr(x, "shape") else ""


def _is_a(package: str, name: str, x: object) -> bool:
    """Whether `x` is an instance of `name` in `package`, which need not be installed."""
    return _is_subclass(package, name, type(x))


@functools.cache
def _is_subclass(package: str, name: str, cls: type) -> bool:
    return any(
        c.__name__ == name and f"{c.__module__}.".startswith(f"{package}.") for c in cls.__mro__
    )
