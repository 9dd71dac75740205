"""DoRA: the formula itself, and what follows from its norms."""

from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from messages import refused
from small import as_jax, dense, set_up, set_up_noisy, some

import jlora
from jlora import DoRA, Slots
from jlora.types import Decomposed


def weight_of(node: Decomposed, w: np.ndarray) -> np.ndarray:
    """W' with W + ΔW formed, in float64; W (stack, inputs, outputs)."""
    a, b, m = (np.asarray(x, np.float64) for x in (node.a, node.b, node.m))
    if node.layout.slots is None:
        new = w + node.scale * a @ b
        return m[:, None] * new / np.linalg.norm(new, axis=1, keepdims=True)
    count, chosen, _ = node.layout.slots
    parts = np.split(np.asarray(w, np.float64), count, axis=2)
    for i, slot in enumerate(chosen):
        part = node._replace(
            a=a[:, i], b=b[:, i], m=m[:, i], layout=node.layout._replace(slots=None)
        )
        parts[slot] = weight_of(part, parts[slot])
    return np.concatenate(parts, axis=2)


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.map(lambda wx: wx[1] @ wx[0], (p["w"], x))


@pytest.fixture(params=[None, Slots(3, (2, 0))], ids=["whole", "slots"], scope="module")
def made(request: Any) -> tuple[Any, ...]:
    """Transform, base, random adapter and input of three matrices in a stack."""
    rng = np.random.default_rng(0)
    params = {"w": as_jax(rng.standard_normal((3, 8, 6)), np.float32)}
    x = as_jax(rng.standard_normal((3, 5, 8)), np.float32)
    return *set_up_noisy(scanned, DoRA("w", rank=2, slots=request.param), params, x), x


def test_formula(made: Any) -> None:
    dora, base, adapter, x = made
    expected = weight_of(adapter["w"], np.asarray(base["w"]))
    np.testing.assert_allclose(jlora.merge(base, adapter)["w"], expected, rtol=0, atol=3e-6)
    y = jax.jit(dora.apply)(base, adapter, x)
    np.testing.assert_allclose(y, x @ expected, rtol=0, atol=2e-5)


def test_no_gradient_passes_through_the_norm() -> None:
    w, (dora, adapter) = W.astype(np.float32), one(jnp.asarray(W, jnp.float32))
    adapter, x = laws.randomize(adapter), jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    node = adapter["w"]
    norm = np.linalg.norm(w + node.scale * np.asarray(node.a) @ node.b, axis=0)

    def dense(n: Any) -> jax.Array:
        return jnp.sin(x @ ((w + n.scale * n.a @ n.b) * (n.m / norm))).sum()

    def ours(n: Any) -> jax.Array:
        return jnp.sin(dora.apply({"w": jnp.asarray(w)}, {"w": n}, x)).sum()

    actual, expected = jax.jit(lambda n: (jax.grad(ours)(n), jax.grad(dense)(n)))(node)
    laws.assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("scheme", some([jlora.Int8, jlora.NF4], jlora.Int8))
def test_norms_are_those_of_the_quantized_base(made: Any, scheme: Any) -> None:
    dora, base, adapter, x = made
    packed = jlora.quantize(base, scheme("w"))
    plain, apply = jlora.dequantize(packed), jax.jit(dora.apply)
    fresh, of_plain = (dora.init(jax.random.key(0), b, x)[1] for b in (packed, plain))
    for tree in (adapter, fresh):
        actual, expected = (apply(b, tree, x) for b in (packed, plain))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(fresh["w"].m, of_plain["w"].m, rtol=1e-6)


W = np.random.default_rng(1).standard_normal((4, 3))


def one(w: Any, **changed: Any) -> tuple[Any, Any]:
    """Transform and adapter of one matrix of 4 × 3, with `changed` in its node."""
    dora, _, adapter = set_up(dense, DoRA("w", rank=2, alpha=2), {"w": w}, jnp.ones((1, 4)))
    return dora, {"w": adapter["w"]._replace(**changed)}


@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16], jnp.float32))
def test_nothing_is_nan_where_the_change_cancels_the_weight(dtype: Any) -> None:
    a, b = np.eye(4, 2, dtype=np.float32), np.ones((2, 3), np.float32)
    w = jnp.asarray(-(a @ b), dtype)
    dora, adapter = one(w, a=jnp.asarray(a), b=jnp.asarray(b))
    loss = lambda a: jnp.sum(dora.apply({"w": w}, a, jnp.ones((1, 4), dtype)))  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(adapter)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


@pytest.mark.parametrize("case", [("bi,ihd->bhd", (8, 2, 4)), ("bhd,hdo->bo", (2, 4, 8))])
def test_heads_in_16_bits(case: tuple[str, tuple[int, ...]]) -> None:
    """Norms of weights with several axes of outputs, or of inputs."""
    equation, shape = case
    w = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    f = lambda params, x: jnp.einsum(equation, x, params["w"])  # noqa: E731
    dora = jlora.transform(f, DoRA("w", rank=2))
    x = jnp.ones((2, *shape[: equation.index(",") - 1]), jnp.bfloat16)
    _, adapter = dora.init(jax.random.key(0), {"w": w}, x)
    expected = jnp.linalg.norm(w.astype(jnp.float32).reshape(8, 8), axis=0)
    np.testing.assert_allclose(adapter["w"].m.ravel(), expected, rtol=1e-6)


def test_a_column_of_zeros_stays() -> None:
    w, x = jnp.asarray(np.ones((4, 3), np.float32) * [1, 0, 1], jnp.float32), jnp.ones((1, 4))
    dora, adapter = one(w)
    f = lambda a: dora.apply({"w": w}, a, x)  # noqa: E731
    both = jax.jit(lambda a: (f(a), jax.grad(lambda a: f(a).sum())(a)))
    for tree in (adapter, {"w": adapter["w"]._replace(b=np.ones((2, 3), np.float32))}):
        y, slope = both(tree)
        np.testing.assert_allclose(y[:, 1], 0, atol=1e-12)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_a_gain_of_zero_has_a_gradient(dtype: Any) -> None:
    """Of what it multiplies, which the backward pass has from the result alone."""
    w, x = jnp.eye(4, 3, dtype=dtype), jnp.asarray([[1.0, 2.0, 3.0, 4.0]], dtype)
    dora, adapter = one(w, m=jnp.zeros(3))
    f = lambda a: dora.apply({"w": w}, a, x).sum().astype(jnp.float32)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(f))(adapter)["w"].m, [1, 2, 3], rtol=1e-2)
    for m in (0.0, -1e-30, 1e-10):  # one below 2⁻⁶⁰ counts as 2⁻⁶⁰, in either form
        node = adapter["w"]._replace(m=jnp.full(3, m))
        large = x * jnp.asarray(1e3, dtype)
        y, expected = dora.apply({"w": w}, {"w": node}, large), jlora.merge({"w": w}, {"w": node})
        least = 4e3 * float(jnp.finfo(dtype).smallest_subnormal)  # of the merged weight
        np.testing.assert_allclose(y, large @ expected["w"], rtol=1e-2, atol=max(least, 1e-7))
        assert np.all(np.abs(np.asarray(y, np.float32)) <= 1.1e7 * max(abs(m), 2.0**-60))


def test_an_m_of_another_shape_and_dropout_are_refused(made: Any) -> None:
    dora, base, adapter, x = made
    node = adapter["w"]
    with refused(ValueError, "adapter", "w", "needs A ", "and M (3,"):
        dora.apply(base, {"w": node._replace(m=node.m[..., :1])}, x)
    expected = r"`dropout` of DoRA\('w'\) must be 0, as PEFT's DoRA .* accepts dropout\); got 0.1\."
    with pytest.raises(ValueError, match=expected):
        DoRA("w", dropout=0.1)


def test_formed_weight_has_the_dtype_of_the_weight() -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        return jax.lax.dot(x, jnp.tanh(p["w"]))

    x, params = jnp.ones((2, 8), jnp.bfloat16), {"w": jnp.ones((8, 4), jnp.bfloat16)}
    lora, base, adapter = set_up(model, DoRA("w", rank=2, materialize=True), params, x)
    jaxpr = jax.make_jaxpr(lora.apply)(base, adapter, x)
    [formed] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "tanh"]
    assert formed.outvars[0].aval.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", some(["int8", "bfloat16"], "int8"))
def test_a_tied_head_scales_inputs_of_any_dtype(dtype: str) -> None:
    """In the dtype of the product: the gain of an embedding is along the head's inputs."""

    def model(p: Any, x: jax.Array) -> Any:
        return p["w"][jnp.array([1])], jax.lax.dot_general(x, p["w"], (((1,), (1,)), ((), ())))

    x = jnp.asarray([[1, 2, 3], [-1, 0, 2]], dtype)
    dora, base, adapter = set_up_noisy(model, DoRA("w", rank=2), {"w": jnp.asarray(W)}, x)
    laws.assert_close(dora.apply(base, adapter, x), model(jlora.merge(base, adapter), x), 1e-5)
