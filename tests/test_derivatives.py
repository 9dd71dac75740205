"""Forward mode, platforms, pickles: what a transformed function is beside its values."""

import functools
import pickle

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

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


FORWARD = {
    "jvp": lambda f, a: jax.jvp(f, (a,), (a,))[1],
    "linearize": lambda f, a: jax.linearize(f, a)[1](a),
    "jacfwd": lambda f, a: jax.jacfwd(f)(a),
    "hessian": lambda f, a: jax.hessian(lambda a: (f(a) ** 2).sum())(a),
}


@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode(mode):
    lora, base, adapter, x = problem(4)
    actual, expected = jax.jit(
        lambda adapter: (
            FORWARD[mode](lambda a: lora.apply(base, a, x), adapter),
            FORWARD[mode](lambda a: dense(jlora.merge(base, a), x), adapter),
        )
    )(adapter)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), actual, expected
    )


@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "hessian"])
def test_forward_mode_of_many_tokens_is_refused_in_our_words(mode):
    lora, base, adapter, x = problem(256)
    with pytest.raises(
        TypeError, match=r"forward-mode derivatives .* do not reach through a float32"
    ):
        FORWARD[mode](lambda a: lora.apply(base, a, x), adapter)


@pytest.mark.parametrize(("platform", "summed"), [("cpu", True), ("tpu", False), ("cuda", False)])
def test_the_order_is_that_of_the_platform_lowered_for(platform, summed):
    """A TPU would round W + ΔW to bfloat16, also where a CPU traces the program."""
    lora, base, adapter, x = problem(256)

    def slope(adapter, x):
        return jax.grad(lambda a: lora.apply(base, a, x).sum())(adapter)

    for f, args in ((lora.apply, (base, adapter, x)), (slope, (adapter, x))):
        text = jax.export.export(jax.jit(f), platforms=[platform])(*args).mlir_module()
        sums = [s for s in text.split("\n") if "stablehlo.add" in s and "tensor<16x16xf32>" in s]
        assert bool(sums) == summed


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
