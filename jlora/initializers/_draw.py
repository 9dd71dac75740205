"""What initializers share that draw A at random: B is zero, and W stays as it is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._core import promote


def dtype_of(site: Any, rule: Any) -> jnp.dtype:
    """The dtype of A and B: the rule's, or W's own, but at least float32."""
    return jnp.dtype(promote(site.dtype, jnp.float32) if rule.dtype is None else rule.dtype)


def draw(w: Any, site: Any, rule: Any, sample: Callable[..., jax.Array]) -> tuple[Any, Any, Any]:
    """`(w, a, b)` with A from `sample`, a function of shape and dtype."""
    dtype = dtype_of(site, rule)
    a_shape, b_shape = rule.factor_shapes(site)
    return w, sample(a_shape, dtype), jnp.zeros(b_shape, dtype)


def fan_in(site: Any) -> int:
    """The number of inputs that are summed; one for a lookup."""
    return 1 if site.kind == "embed" else site.inputs
