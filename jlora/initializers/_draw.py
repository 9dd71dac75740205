"""Draws A at random, with B zero and W unchanged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core import promote


def dtype_of(site: Any, rule: Any) -> jnp.dtype:
    """The dtype of A and B: the rule's, or W's own, but at least float32."""
    return jnp.dtype(promote(site.dtype, jnp.float32) if rule.dtype is None else rule.dtype)


def draw(w: Any, site: Any, rule: Any, sample: Callable[..., jax.Array]) -> tuple[Any, Any, Any]:
    """Returns `(w, a, b)`; `sample` draws A from a shape and a dtype."""
    dtype = dtype_of(site, rule)
    a_shape, b_shape = rule.factor_shapes(site)
    return w, sample(a_shape, dtype), jnp.zeros(b_shape, dtype)


def fan_in(site: Any) -> int:
    """The number of inputs that a product sums: 1 for a lookup."""
    return 1 if site.kind == "embed" else site.inputs
