"""Traces the user's function to a jaxpr."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import _compat
from ._arrays import pick
from ._errors import list_few


class ValueReadError(TypeError):
    """Python code of the user's function reads the value of a traced array."""


def trace(
    f: Callable[..., Any], specs: Sequence[Any], paths: Sequence[str]
) -> tuple[_compat.Jaxpr, Callable[..., Any]]:
    """Traces `f` at arrays or types; returns the jaxpr, and a function from its outputs to `f`'s.

    The outputs of `f` may be any pytree; leaves that are not arrays are returned as they are. If
    Python code of `f` reads a value that does not depend on its arguments, `f` is traced again, and
    such values are computed at once.
    """
    finish: list[Callable[..., Any]] = []

    def flat(*leaves: jax.Array) -> list[Any]:
        arrays, put = pick(f(*leaves), lambda x: isinstance(x, jax.Array | np.ndarray))
        finish.append(put)
        return arrays

    def eager(*leaves: jax.Array) -> list[Any]:
        with jax.ensure_compile_time_eval():
            return flat(*leaves)

    try:
        jaxpr = jax.make_jaxpr(flat)(*specs)
    except _READS:
        try:
            jaxpr = jax.make_jaxpr(eager)(*specs)
        except _READS as e:
            names = list_few(list(map(repr, paths)), 3)
            advice = getattr(e, "remedy", "") or (
                "Name a flag in jax.jit(..., static_argnames=...). For other values use "
                "jax.lax.cond or jnp.where there, or leave the weights out of the rules."
            )
            raise ValueReadError(
                "Python code of the function reads the value of an array that depends on the "
                f"weights {names}, or on an argument that jax.jit traces ({type(e).__name__}). "
                + advice
            ) from e
    return jaxpr, finish[-1]


_READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
