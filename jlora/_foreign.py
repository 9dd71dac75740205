"""Objects of other libraries where a function or an array belongs, and what to give instead."""

import reprlib
from typing import Any

import jax
import numpy as np

from ._tree import name_of
from ._types import Path

_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct

# Modules that hold their parameters: package, class, and what to give instead.
_MODULES = [
    (
        "flax.linen",
        "Module",
        "Give its apply: jlora.transform(model.apply, ...), with the variables of model.init as "
        "the parameters.",
    ),
    (
        "flax.nnx",
        "Module",
        "Give a function of a module, lambda model, x: model(x), and the module itself as the "
        "parameters. If it has state (batch statistics, dropout), split it, graph, params, rest = "
        "nnx.split(model, nnx.Param, ...), and give a function of params and rest that merges "
        "them, nnx.merge(graph, params, rest, copy=True), and returns the new rest beside its "
        "outputs.",
    ),
    (
        "equinox",
        "Module",
        "Split it, params, static = eqx.partition(model, eqx.is_array), and give "
        "lambda params, x: eqx.combine(params, static)(x).",
    ),
    (
        "keras",
        "Layer",
        "Give lambda params, rest, x: model.stateless_call(params, rest, x), with "
        "[v.value for v in model.trainable_variables] as the parameters.",
    ),
]


def check_apply_fn(apply_fn: Any) -> None:
    """`TypeError` if `apply_fn` is a module that holds its parameters, or no function."""
    for package, name, remedy in _MODULES:
        if _is_a(package, name, apply_fn):
            raise TypeError(
                "`apply_fn` must be a function of parameters; got the module "
                f"{type(apply_fn).__name__} of {package}. {remedy}"
            )
    if not callable(apply_fn):
        raise TypeError(
            "`apply_fn` must be a function of parameters; got one of type "
            f"{type(apply_fn).__name__}. Give it first: transform(model.apply, LoRA(...))."
        )


def check_leaf(x: Any, path: Path) -> None:
    """`TypeError` if a leaf of the parameters is neither an array nor a number."""
    if isinstance(x, _ARRAYS | int | float | complex):
        return
    raise TypeError(
        f"`params` must be a pytree of arrays; the leaf {name_of(path)!r} is {reprlib.repr(x)} of "
        f"type {type(x).__name__}.{_remedy(x)}"
    )


def _remedy(x: Any) -> str:
    if _is_a("keras", "Variable", x):
        return (
            " Give [v.value for v in model.trainable_variables], and "
            "lambda params, rest, x: model.stateless_call(params, rest, x) as the function."
        )
    if callable(x):
        return (
            " Split what is no array off, as params, static = eqx.partition(model, eqx.is_array) "
            "does in Equinox, and combine both in the function: "
            "lambda params, x: eqx.combine(params, static)(x)."
        )
    return " Convert it with jnp.asarray." if hasattr(x, "shape") else ""


def _is_a(package: str, name: str, x: Any) -> bool:
    """Whether `x` is of a class `name` of `package`, which need not be installed."""
    return any(
        c.__name__ == name and f"{c.__module__}.".startswith(f"{package}.") for c in type(x).__mro__
    )
