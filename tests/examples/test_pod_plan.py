"""What `examples/pod_plan.py` counts without a compiler for TPUs."""

import jax
import jax.numpy as jnp
import pod_plan
import pytest


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]


# A function of (4, 8) and three (8, 8), and how many products of the two it computes.
PRODUCTS = [
    (lambda x, w: x @ w[0], 1),
    (lambda x, w: jax.jit(jnp.matmul)(x, w[0]) + x @ w[1], 2),
    (scanned, 3),
    (jax.checkpoint(scanned), 3),
    (jax.grad(lambda x, w: scanned(x, w).sum(), argnums=1), 9),
    (lambda x, w: x + w[0, 0], 0),
]


@pytest.mark.parametrize(("f", "products"), PRODUCTS)
def test_flops(f, products):
    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.ones((3, 8, 8)))
    assert pod_plan.flops(jaxpr) == products * 2 * 4 * 8 * 8
