"""Parts of `examples/pod_plan.py` that need no compiler for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


def test_moments_in_float32():
    """Adam in float32 on bfloat16 parameters is Adam on their float32 copies."""
    tx = pod_plan.in_float32(optax.adam(0.1))
    params = {"w": jnp.linspace(-1, 1, 7, dtype=jnp.bfloat16)}
    grads = jax.tree.map(jnp.cos, params)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(jnp.float32)}
    updates, _ = tx.update(grads, state, params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    expected, _ = optax.adam(0.1).update(wide[1], optax.adam(0.1).init(wide[0]), wide[0])
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16
