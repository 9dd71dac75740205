"""The product x·W + s·(x·A)·B: what it forms, costs and keeps, on which platform, how exactly."""

import pickle

import chex
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from nodes import PLAIN
from small import array, dense, set_up, some, some_rows

import jlora
from jlora._core._change import plus

MANY, FEW, DIM = 256, 8, 16  # rows


def test_float16_neither_overflows_nor_vanishes():
    """x·A is beyond float16, s·x·A is not; a small s loses no more than rounding."""
    lora = jlora.transform(dense, jlora.LoRA("w", rank=2))
    base = {"w": jnp.zeros((256, 3), jnp.float16)}
    a, b = jnp.full((256, 2), 4.0), jnp.ones((2, 3))
    node = jlora.types.LowRank(a, b, 0.01, PLAIN)
    y = jax.jit(lora.apply)(base, {"w": node}, jnp.full((4, 256), 100, jnp.float16))
    np.testing.assert_allclose(y, np.full((4, 3), 2048.0), rtol=1e-3)

    def gradient(x, c):
        def loss(node):
            return jnp.sum(c * lora.apply(base, {"w": node}, x).astype(jnp.float32))

        return jax.jit(jax.grad(loss))(node._replace(scale=0.0005)).a

    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (512, 256)).astype(jnp.float16)
    c = jax.random.normal(keys[1], (512, 3)) / 512
    expected = 0.0005 * np.asarray(x, np.float64).T @ np.asarray(c, np.float64) @ np.ones((3, 2))
    error = np.linalg.norm(gradient(x, c) - expected) / np.linalg.norm(expected)
    assert error < 3e-3


def _problem(rows, dtype=jnp.float32, dim=DIM, **rule):
    x, w = array(rows, dim).astype(dtype), (array(dim, dim) / dim**0.5).astype(dtype)
    rule = jlora.LoRA("w", rank=4, alpha=8, init=laws.start, **rule)
    lora, base, adapter = set_up(dense, rule, {"w": w}, x)
    return lora, base, jax.tree.map(lambda v: v + 0.1 * array(*v.shape), adapter), x


@pytest.mark.parametrize("rows", some([MANY, FEW], FEW))
def test_gradients_of_the_base_and_twice(rows):
    lora, base, adapter, x = _problem(rows)
    with jax.enable_x64(True):
        base, adapter, x = jax.tree.map(lambda v: v.astype(jnp.float64), (base, adapter, x))

        def loss(base, adapter, x):
            return jnp.sin(lora.apply(base, adapter, x)).sum()

        def plain(base, adapter, x):
            return jnp.sin(x @ jlora.merge(base, adapter)["w"]).sum()

        def slope(f):
            return lambda *args: sum(
                (g**2).sum() for g in jax.tree.leaves(jax.grad(f, (0, 1, 2))(*args))
            )

        for transform in (jax.grad, lambda f, argnums: jax.grad(slope(f), argnums)):
            got = jax.jit(transform(loss, (0, 1, 2)))(base, adapter, x)
            want = jax.jit(transform(plain, (0, 1, 2)))(base, adapter, x)
            chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (MANY * 4, jnp.float32),
        (FEW, jnp.bfloat16),
        pytest.param(MANY * 4, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(FEW, jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_error_is_no_worse_than_the_plain_form(rows, dtype):
    lora, base, adapter, x = _problem(rows, dtype, dim=64)
    [leaf] = jax.tree.leaves(adapter, is_leaf=lambda v: isinstance(v, jlora.types.LowRank))
    a, b = leaf.a.astype(dtype), leaf.b.astype(dtype)
    exact = [np.asarray(v, np.float64) for v in (x, base["w"], a, b)]
    want = exact[0] @ exact[1] + leaf.scale * (exact[0] @ exact[2]) @ exact[3]
    plain = x @ base["w"] + leaf.scale * (x @ a) @ b
    error = np.abs(np.asarray(lora.apply(base, adapter, x), np.float64) - want).max()
    assert error <= 1.5 * np.abs(np.asarray(plain, np.float64) - want).max()
    assert error > 0


@pytest.mark.parametrize("rows", [MANY, FEW])
def test_operations_are_the_frozen_step_and_the_low_rank_products(rows):
    """A step takes six thin products beside those with W."""
    rank = 4
    lora, base, adapter, x = _problem(rows)

    def flops(f, argnums, *args):
        compiled = jax.jit(jax.value_and_grad(f, argnums)).lower(*args).compile()
        return compiled.cost_analysis()["flops"]

    def step(adapter, base, x):
        return (lora.apply(base, adapter, x) ** 2).sum()

    frozen = flops(lambda base, x: ((x @ base["w"]) ** 2).sum(), 1, base, x)
    products = 6 * 2 * rows * DIM * rank
    elementwise = 4 * (rows * DIM + rows * rank + DIM * DIM)
    assert products < flops(step, (0, 2), adapter, base, x) - frozen <= products + elementwise
    # So that dW would show.
    assert elementwise < 2 * rows * DIM * DIM


def test_sizes_that_are_not_known_yet():
    lora, base, adapter, x = _problem(MANY)
    tokens = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 16"), x.dtype)
    exported = jax.export.export(jax.jit(lora.apply))(base, adapter, tokens)
    expected = lora.apply(base, adapter, x)
    np.testing.assert_allclose(exported.call(base, adapter, x), expected, atol=1e-4)


def test_change_divided_by_less_than_float16_can_invert():
    """Its derivative by B alone: XLA may multiply W by the reciprocal, which is infinite."""
    lora = jlora.transform(lambda p, x: x @ (p["w"] / 1e-5), jlora.LoRA("w", rank=4, alpha=4))
    w, x = array(DIM, DIM).astype(jnp.float16), array(FEW, DIM).astype(jnp.float16)
    base, adapter = lora.init(jax.random.key(0), {"w": w}, x)
    node = adapter["w"]
    along = 1e-3 * array(*node.b.shape)
    tangent = {"w": node.replace(a=jnp.zeros_like(node.a), b=along)}
    _, found = jax.jvp(lambda adapter: lora.apply(base, adapter, x), (adapter,), (tangent,))
    expected = x.astype(jnp.float32) @ node.a @ along / 1e-5
    laws.assert_close(found, expected.astype(jnp.float16), 5e-3)


def test_factors_of_fewer_bits_than_the_scale():
    """1e-8 is zero in float16, in which A and B are, but not in float32, in which W is."""
    _, base, _, x = _problem(FEW)
    product = lambda p, x: x @ (p["w"] * 1e-8) * 1e8  # noqa: E731
    lora, _, adapter = set_up(product, jlora.LoRA("w", rank=4, dtype=jnp.float16), base, x)
    adapter = jax.tree.map(lambda v: v + jnp.asarray(0.5, v.dtype), adapter)
    expected = product(jlora.merge(base, adapter), x)
    np.testing.assert_allclose(lora.apply(base, adapter, x), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - product(base, x)).max() > 0.1


def test_float8_weights_have_wider_factors():
    x, w = jnp.ones((3, 6)), jnp.linspace(-1, 1, 30).reshape(6, 5).astype(jnp.float8_e4m3fn)
    product = lambda p, x: x @ p["w"].astype(x.dtype)  # noqa: E731
    lora, base, adapter = set_up(product, jlora.LoRA("w", rank=2, alpha=2), {"w": w}, x)
    adapter = jax.tree.map(lambda v: v + 0.25, adapter)
    assert {v.dtype for v in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}
    merged = jlora.merge(base, adapter)["w"]
    assert merged.dtype == w.dtype
    actual, expected = lora.apply(base, adapter, x), product({"w": merged}, x)
    np.testing.assert_allclose(actual, expected, atol=6 * 2**-4)  # a float8 has 3 bits


@pytest.mark.parametrize("rows", [MANY, pytest.param(FEW, marks=pytest.mark.slow)])
def test_an_activation_that_sites_share_is_kept_once(rows):
    """As q, k and v do."""
    names = ("q", "k", "v")
    params, x = {n: i * array(DIM, DIM) for i, n in enumerate(names, 1)}, array(rows, DIM)

    def model(params, x):
        y = jnp.exp(x)
        return [y @ params[n] for n in names]

    lora, base, adapter = set_up(model, jlora.LoRA(rank=1), params, x)
    _, backward = jax.vjp(lambda adapter: lora.apply(base, adapter, x), adapter)
    kept = {id(v): v.shape for v in jax.tree.leaves(backward) if hasattr(v, "shape")}
    assert list(kept.values()).count(x.shape) == 1, kept


@pytest.mark.parametrize("platform", some(["cpu", "tpu", "cuda"], "tpu"))
@pytest.mark.parametrize(("rows", "dtype"), [(MANY, jnp.float32), (FEW, jnp.bfloat16)])
def test_no_platform_forms_the_sum(platform, rows, dtype):
    """A TPU would round W + ΔW to bfloat16."""
    lora, base, adapter, x = _problem(rows, dtype)
    many = jax.tree.map(lambda v: np.stack([v, v]), adapter)

    def everything(adapter, many, x):
        slope = jax.grad(lambda a, x: lora.apply(base, a, x).astype(jnp.float32).sum(), (0, 1))
        mapped = jax.vmap(lora.apply, (None, 0, None))(base, many, x)
        return lora.apply(base, adapter, x), slope(adapter, x), mapped

    def sums(f, *args):
        text = jax.export.export(jax.jit(f), platforms=[platform])(*args).mlir_module()
        return [s for s in text.split("\n") if "stablehlo.add" in s and "16x16x" in s]

    assert not sums(everything, adapter, many, x)
    assert sums(jlora.merge, base, adapter)


def test_a_transform_can_be_pickled():
    _, base, adapter, x = _problem(FEW)
    lora = jlora.transform(dense, jlora.LoRA("w", rank=2))
    again = pickle.loads(pickle.dumps(lora))
    laws.assert_close(again.apply(base, adapter, x), lora.apply(base, adapter, x), 1e-6)


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


def _experts(p, x):
    return jax.lax.ragged_dot(x, p["w"][None], jnp.array([len(x)]))


def _convolution(p, x):
    return jax.lax.conv(x[:, :, None], p["w"].T[:, :, None], (1,), "VALID")[:, :, 0]


@pytest.mark.parametrize("model", some([dense, _experts, _convolution], dense))
@pytest.mark.parametrize(
    ("scale", "of_a", "of_b"),
    some_rows(
        [(1e6, 1, 1e-6), (1, 1e5, 1e-5), (1, 1e-9, 1e9), (1e-7, 1e7, 1)],
        *[(1e6, 1, 1e-6), (1, 1e-9, 1e9)],
    ),
)
def test_float16_is_merged_whatever_the_sizes_of_s_a_and_b(model, scale, of_a, of_b):
    """Values and gradients where s·A·B is like W, but s, A, B or s·A are not in float16."""
    w = {"w": (array(64, 8) / 8).astype(jnp.float16)}
    x = array(16, 64).astype(jnp.float16)
    node = jlora.types.LowRank(of_a * array(64, 2), of_b * array(2, 8), scale, PLAIN)

    def adapted(node):
        return jlora.wrap(model)(jlora.bind(w, {"w": node}), x).astype(jnp.float32)

    def merged(node):
        whole = w["w"].astype(jnp.float32) + node.scale * node.a @ node.b
        return model({"w": whole}, x.astype(jnp.float32))

    def both(f):
        return jax.jit(lambda node: (f(node), jax.grad(lambda n: laws.scalar(f(n)))(node)))(node)

    laws.assert_close(both(adapted), both(merged), 5e-3, least=0)


def test_float16_with_a_column_of_zeros():
    """It has no norm, by which its row of B could be multiplied out of float16."""
    w, x = {"w": jnp.zeros((4, 3), jnp.float16)}, jnp.ones((2, 4), jnp.float16)
    node = jlora.types.LowRank(jnp.zeros((4, 1)), jnp.full((1, 3), 6e4), 1.0, PLAIN)
    assert not np.any(jlora.wrap(dense)(jlora.bind(w, {"w": node}), x))


def test_a_sum_and_its_derivative_round_alike():
    """Whatever the dtype of the change: both are a sum in float32, or in W's dtype."""
    with jax.enable_x64(True):
        w, change = jnp.float32(1), jnp.float64(2**-24 + 2**-50)
        value, slope = jax.jvp(plus, (w, change), (w, change))
        assert slope == value == 1
