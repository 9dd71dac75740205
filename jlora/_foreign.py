"""Errors for objects of other libraries that were given instead of a function or an array."""

import contextlib
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ._errors import InputError, shorten
from ._tree import leaves_by_path, name_of
from ._types import Path, PyTree, short

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


_NAMES = {"params", "parameters", "variables"}


def check_apply_fn(apply_fn: object) -> None:
    """Raises `TypeError` if `apply_fn` holds its parameters, as modules do, or is not callable."""
    inner = _unwrap(apply_fn)
    holder = _holder(inner)
    method = "" if holder is inner else inner.__name__
    for (package, name), remedy in _MODULES.items():
        is_pure = method and (package == "flax.linen" or method.startswith("stateless_"))
        if _is_a(package, name, holder) and not is_pure:
            raise TypeError(
                "`apply_fn` must be a function of parameters; got "
                f"{f'{method} of the module' if method else 'the module'} "
                f"{type(holder).__name__} of {package}. {remedy}"
            )
    if not callable(apply_fn):
        raise TypeError(
            "`apply_fn` must be a function of parameters; got an object of type "
            f"{type(apply_fn).__name__}. The function comes first: "
            "transform(model.apply, LoRA(...))."
        )


def _unwrap(f: Any) -> Any:
    """Returns the function in one of `functools.partial` or `jax.jit`."""
    is_plain = inspect.isfunction(f) or inspect.ismethod(f)  # such as one by `functools.wraps`
    inner = f.func if isinstance(f, functools.partial) else getattr(f, "__wrapped__", f)
    return f if is_plain or inner is f else _unwrap(inner)


def _holder(f: Any) -> object:
    """Returns the object whose method `f` is; any other function is returned as it is."""
    return getattr(f, "__self__", f)


@contextlib.contextmanager
def note_call(apply_fn: Callable[..., Any], params: PyTree) -> Iterator[None]:
    """Adds to errors of `apply_fn` what it must get first, if that may be something else."""
    try:
        yield
    except Exception as e:
        if _is_other(apply_fn, params):
            keys = f" of {shorten(list(params))}" if isinstance(params, Mapping) else ""
            is_array = hasattr(params, "dtype")
            got = short(params) if is_array else f"a {type(params).__name__}{keys}"
            e.add_note(
                f"jlora: `init` and `sites` call apply_fn(params, ...), here with {got}. Give all "
                "parameters that apply_fn takes: in Flax linen the variables, {'params': ...}, and "
                "no TrainState. If it takes other arguments first, give jlora.transform a function "
                "such as lambda params, x: apply_fn(x, params)."
            )
        raise


def _is_other(apply_fn: Callable[..., Any], params: PyTree) -> bool:
    """Whether `params` may be something else than the parameters that `apply_fn` takes first."""
    is_linen = _is_a("flax.linen", "Module", _holder(_unwrap(apply_fn)))
    is_part = is_linen and isinstance(params, Mapping) and "params" not in params
    is_state = _is_a("flax.training.train_state", "TrainState", params)
    return is_part or is_state or hasattr(params, "dtype") or _takes_params_later(apply_fn)


def _takes_params_later(apply_fn: Callable[..., Any]) -> bool:
    """Whether the names of arguments say so."""
    try:
        first, *later = inspect.signature(apply_fn).parameters
    except (TypeError, ValueError):  # it has none, or no argument
        return False
    return first not in ("p", "weights", *_NAMES) and not _NAMES.isdisjoint(later)


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
