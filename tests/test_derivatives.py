"""Derivatives, platforms, pickles: what a transformed function is beside its values."""

import pickle

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from cases import Case, Problem

import jlora


def dense(params, x):
    return jnp.tanh(x @ params["w"])


def problem(rows, dtype=jnp.float32):
    draw = np.random.default_rng(0).standard_normal
    params = {"w": jnp.asarray(draw((16, 16)) / 4, dtype)}
    x = jnp.asarray(draw((rows, 16)), dtype)
    lora = jlora.transform(dense, jlora.LoRA(rank=2, alpha=2))
    base, adapter = lora.init(jax.random.key(0), params, x)
    return lora, base, jax.tree.map(lambda v: v + 0.1, adapter), x


DIM = 64  # from which on the gradient of A is a thin product


def attention(p, x):
    """Products that share an activation, of many tokens."""
    q, k, v = (x @ p[n] for n in "qkv")
    return x + jnp.tanh(q) * k + v


def two_layers(p, x):
    for i in range(2):
        x = attention({n: w[i] for n, w in p.items()}, x)
    return x


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (attention(w, h), None), x, p)[0]


def scanned_and_computed_again(p, x):
    layer = jax.checkpoint(lambda h, w: (attention(w, h), None))
    return jax.lax.scan(layer, x, p)[0]


def row_by_row(p, x):
    return jax.lax.map(lambda row: two_layers(p, row), x)


def one_product_by_row(p, x):
    return jax.lax.map(lambda row: jnp.tanh(row @ p["q"][0]), x)


LAYERS = [two_layers, scanned, scanned_and_computed_again, row_by_row, one_product_by_row]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("model", LAYERS)
def test_every_order_in_both_modes(model, dtype, compiled):
    """Up to second derivatives of two layers, in one program or eagerly."""
    draw = np.random.default_rng(0).standard_normal
    x = jnp.asarray(0.3 * draw((2, 1, DIM, DIM)), dtype)
    params = {n: jnp.asarray(draw((2, DIM, DIM)) / DIM**0.5, dtype) for n in "qkv"}

    def loss(p, x):  # a sum of squares, whose second derivatives do not cancel
        return jnp.square(model(p, x).astype(jnp.float32)).sum()

    pattern = "q" if model is one_product_by_row else None
    lora = jlora.transform(loss, jlora.LoRA(pattern, rank=2, alpha=1))
    base, adapter = lora.init(jax.random.key(0), params, x)
    case = Case("", "", lambda dtype: Problem(loss, params, (x,)), (), 0, 0, jit=compiled)
    made = laws.Made(case, case.build(dtype), lora, base, adapter, laws.randomize(adapter))
    laws.derivatives_are_merged(made, 1e-4 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_no_platform_forms_the_sum(platform):
    """A TPU would round W + ΔW to bfloat16."""
    lora, base, adapter, x = problem(256)

    def slope(adapter, x):
        return jax.grad(lambda a: lora.apply(base, a, x).sum())(adapter)

    for f, args in ((lora.apply, (base, adapter, x)), (slope, (adapter, x))):
        text = jax.export.export(jax.jit(f), platforms=[platform])(*args).mlir_module()
        sums = [s for s in text.split("\n") if "stablehlo.add" in s and "tensor<16x16xf32>" in s]
        assert not sums


def test_a_transform_can_be_pickled():
    lora = jlora.transform(dense, jlora.LoRA("w", rank=2))
    again = pickle.loads(pickle.dumps(lora))
    _, base, adapter, x = problem(4)
    laws.assert_close(again.apply(base, adapter, x), lora.apply(base, adapter, x), 1e-6)


def test_convolution_of_an_empty_batch():
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["k"], (1, 1), "SAME", dimension_numbers=numbers
    )
    lora = jlora.transform(conv, jlora.LoRA(rank=2))
    x = jnp.zeros((0, 5, 5, 4))
    base, adapter = lora.init(jax.random.key(0), {"k": jnp.ones((3, 3, 4, 5))}, x)
    assert lora.apply(base, adapter, x).shape == (0, 5, 5, 5)


def test_tracing_costs_little_more_than_the_model():
    """Equations of the gradient of 24 unrolled layers, beside those of the model's own."""

    def model(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return x

    params = [jnp.ones((16, 16))] * 24
    lora = jlora.transform(model, jlora.LoRA(rank=2))
    x = jnp.ones((4, 16))
    base, adapter = lora.init(jax.random.key(0), params, x)

    def equations(f, *args):
        return len(jax.make_jaxpr(jax.grad(lambda p: f(p).sum()))(*args).jaxpr.eqns)

    ours = equations(lambda a: lora.apply(base, a, x), adapter)
    assert ours <= 3 * equations(lambda p: model(p, x), params)
