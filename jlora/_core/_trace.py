"""From a function to its jaxpr, with all but the weights as it came."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _compat


class ValueReadError(TypeError):
    """Python code of the user's function asks for the value of a traced array."""


def trace(
    f: Callable[..., Any], specs: Sequence[jax.ShapeDtypeStruct], paths: Sequence[str]
) -> tuple[_compat.Jaxpr, Callable[..., Any]]:
    """Traces `f` at `specs`; gives the jaxpr, and what turns the list of its outputs into `f`'s.

    `f`'s outputs may be any pytree; leaves that are no arrays come back as they are. What `f`
    closes over stays concrete if it was: should Python code of `f` ask for the value of something
    that its arguments do not reach, `f` is traced again with such values computed at once.
    """
    finish: list[Callable[..., Any]] = []

    def flat(*leaves: Any) -> list[Any]:
        arrays, put = take(f(*leaves), lambda x: isinstance(x, jax.Array | np.ndarray))
        finish.append(put)
        return arrays

    def eager(*leaves: Any) -> list[Any]:
        with jax.ensure_compile_time_eval():
            return flat(*leaves)

    try:
        jaxpr = jax.make_jaxpr(flat)(*specs)
    except _READS:
        try:
            jaxpr = jax.make_jaxpr(eager)(*specs)
        except _READS as e:
            names = ", ".join(map(repr, paths[:3])) + (", …" if len(paths) > 3 else "")
            raise ValueReadError(
                "the function asks in Python for the value of an array that depends on the weights "
                f"{names}, or on arguments that are traced themselves ({type(e).__name__}). Use "
                "jax.lax.cond or jnp.where there, or leave the weight out of the rules."
            ) from e
    return jaxpr, finish[-1]


_READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def take(
    tree: Any, pick: Callable[[Any], bool], is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Takes the leaves that `pick` picks; gives them, and what builds the tree from such leaves."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    at = [i for i, x in enumerate(leaves) if pick(x)]
    picked = [leaves[i] for i in at]
    for i in at:  # so that `put` keeps nothing alive
        leaves[i] = None

    def put(values: Sequence[Any]) -> Any:
        full = dict(enumerate(leaves)) | dict(zip(at, values, strict=True))
        return jax.tree.unflatten(structure, list(full.values()))

    return picked, put
