"""PRNG keys."""

import zlib

import jax
import jax.numpy as jnp

from ._types import Path


def check_key(key: object) -> None:
    """Raises `TypeError` unless `key` is one PRNG key, new or old style."""
    refuse_rngs("`key` must be one PRNG key", key)
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    shape = getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and ndim == 0) and not (dtype == jnp.uint32 and ndim == 1):
        got = type(key).__name__ if dtype is None else f"an array of {dtype} and shape {shape}"
        raise TypeError(f"`key` must be one PRNG key, such as jax.random.key(0); got {got}.")


def refuse_rngs(expected: str, key: object) -> None:
    """Raises `TypeError` if `key` is NNX's `Rngs`, which would answer for any attribute."""
    is_of_nnx = any(c.__module__.startswith("flax.nnx") for c in type(key).__mro__)
    if is_of_nnx and callable(key):
        raise TypeError(f"{expected}; got {type(key).__name__} of flax.nnx. Give rngs.params().")


def fold(key: jax.Array, parts: Path) -> jax.Array:
    """Folds a path into a key; the result does not depend on other paths."""
    # So that the one part `a/b` is not the two parts `a` and `b`.
    name = "/".join(part.replace("/", "\0") for part in parts)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
