"""Products of two arrays in a dtype, whatever the user's promotion rules and mesh are."""

import string
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ._explicit import explicit, join_shardings


def einsum(
    x: Sequence[Hashable],
    y: Sequence[Hashable],
    out: Sequence[Hashable],
    x_value: jax.Array,
    y_value: jax.Array,
    *,
    precision: Any,
    dtype: Any = None,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """The Einstein sum of two arrays, in `dtype`, by default float32 or better.

    `x`, `y` and `out` name the axes of the arrays and of the result by letters or any other values.
    Along explicit mesh axes the result has `sharding`; by default each of its axes is sharded as in
    x, or else as in y, and what is contracted is summed over the mesh.
    """
    of_x, of_y, of_out = spell(x, y, out)
    return jnp.einsum(
        f"{of_x},{of_y}->{of_out}",
        x_value,
        y_value,
        precision=precision,
        preferred_element_type=dtype or promote(x_value.dtype, jnp.float32),
        out_sharding=sharding or join_shardings(x, y, out, explicit(x_value), explicit(y_value)),
    )


def spell(*each: Sequence[Hashable]) -> list[str]:
    """A letter for each name, as `jnp.einsum` wants them."""
    names = dict.fromkeys(name for names in each for name in names)
    letters = dict(zip(names, string.ascii_letters, strict=False))
    return ["".join(letters[name] for name in names) for names in each]


def letters(n: int) -> str:
    """The first `n` names of axes."""
    return string.ascii_letters[:n]


def promote(*dtypes: Any) -> Any:
    """The dtype that holds all `dtypes`, also where the user made implicit promotion an error."""
    # Nothing is promoted to or from float8, which JAX leaves to the user.
    wide = [jnp.bfloat16 if _is_float8(dtype) else dtype for dtype in dtypes]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*wide)


def _is_float8(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16
