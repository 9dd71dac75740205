"""`jlora.checkpoint_policy`: the same gradients from fewer bytes, and no product twice."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

import jlora

DIM, LAYERS, ROWS = 32, 2, 64


class Block(nn.Module):
    """A norm, two products with an activation between them, and a residual."""

    gelu: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """As the body of a scan."""
        y = nn.Dense(4 * DIM, name="up")(nn.LayerNorm(name="norm")(x))
        y = nn.gelu(y) if self.gelu else nn.relu(y) * nn.silu(y)
        return x + nn.Dense(DIM, name="down")(y), None


class Model(nn.Module):
    """Blocks, scanned or not, under a policy or not."""

    scan: bool
    gelu: bool
    policy: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Rows to rows."""
        block = Block
        if self.policy:
            block = nn.remat(block, policy=jlora.checkpoint_policy, prevent_cse=not self.scan)
        if self.scan:
            scan = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.scan(block, length=LAYERS, **scan)(self.gelu, name="layers")(x, None)[0]
        for i in range(LAYERS):
            x, _ = block(self.gelu, name=f"layer_{i}")(x, None)
        return x


def slope(model: Model, params: Any, x: jax.Array):
    """The values and gradients of an adapter, the bytes kept for them, the products in both."""
    lora = jlora.transform(model.apply, jlora.LoRA("kernel", rank=2, init=laws.start))
    base, adapter = lora.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: v + 0.1, adapter)

    def loss(adapter, base, x):
        return jnp.square(lora.apply(base, adapter, x)).mean()

    _, backward = jax.eval_shape(
        lambda adapter, base, x: jax.vjp(lambda a: loss(a, base, x), adapter), adapter, base, x
    )
    kept = [v.size * v.dtype.itemsize for v in jax.tree.leaves(backward)]
    program = jax.jit(jax.value_and_grad(loss)).lower(adapter, base, x)
    products = program.as_text().count("dot_general")
    return program.compile()(adapter, base, x), sum(kept), products


@pytest.mark.parametrize(
    ("scan", "gelu"),
    [
        pytest.param(True, True, id="scan-gelu"),
        pytest.param(False, False, id="plain-gated", marks=pytest.mark.slow),
        pytest.param(True, False, id="scan-gated", marks=pytest.mark.slow),
        pytest.param(False, True, id="plain-gelu", marks=pytest.mark.slow),
    ],
)
def test_same_gradients_from_fewer_bytes_and_the_same_products(scan, gelu):
    x = jax.random.normal(jax.random.key(2), (ROWS, DIM))
    params = jax.jit(Model(scan, gelu).init)(jax.random.key(1), x)
    plain, plain_bytes, plain_products = slope(Model(scan, gelu), params, x)
    kept, kept_bytes, kept_products = slope(Model(scan, gelu, policy=True), params, x)
    for got, expected in zip(*map(jax.tree.leaves, (kept, plain)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert kept_bytes < plain_bytes
    assert kept_products == plain_products


def test_products_are_saved_and_elementwise_results_are_not():
    saved = {}
    w = jnp.ones((DIM, DIM))

    def f(x):
        y = jax.nn.softmax(jnp.tanh(x @ w) * 2 + 1)
        return jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True)) * y

    for eqn in jax.make_jaxpr(f)(w).jaxpr.eqns:
        name = eqn.primitive.name
        saved[name] = jlora.checkpoint_policy(eqn.primitive, *eqn.invars, **eqn.params)
    assert {n for n, s in saved.items() if not s} >= {"tanh", "mul", "add"}
    assert {n for n, s in saved.items() if s} >= {"rsqrt", "reduce_sum"}
