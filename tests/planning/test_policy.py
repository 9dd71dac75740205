"""`jlora.remat_policy`: the same gradients from fewer bytes, and no large product twice."""

from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import array, set_up_noisy, some

import jlora
from jlora import sharding
from jlora._tree import size_in_bytes

DIM, LAYERS, ROWS = 32, 2, 64
PARAMS = {"up": array(LAYERS, DIM, 4 * DIM) / 6, "down": array(LAYERS, 4 * DIM, DIM) / 11}
ACTIVATIONS = {"gelu": jax.nn.gelu, "gated": lambda y: jax.nn.relu(y) * jax.nn.silu(y)}


def model(activation: Any, is_scanned: bool, keeps: bool) -> Any:
    """Layers of a norm, two products and a residual, under the policy or not."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        x -= x.mean(-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True))
        return x + activation(y @ p["up"]) @ p["down"], None

    if keeps:
        policy = jlora.remat_policy
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not is_scanned)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, x, params, unroll=1 if is_scanned else LAYERS)[0]

    return apply


def slope(apply: Any, x: jax.Array) -> tuple[Any, list[Any], int]:
    """The value and gradients of an adapter, the arrays kept for them, the products in both."""
    lora, base, adapter = set_up_noisy(apply, jlora.LoRA(rank=2, init=laws.start), PARAMS, x)

    def loss(adapter: Any, base: Any, x: jax.Array) -> jax.Array:
        return jnp.square(lora.apply(base, adapter, x)).mean()

    _, backward = jax.eval_shape(lambda a: jax.vjp(lambda a: loss(a, base, x), a), adapter)
    program = jax.jit(jax.value_and_grad(loss)).lower(adapter, base, x).compile()
    products = program.as_text().count(" dot(")
    return program(adapter, base, x), jax.tree.leaves(backward), products


@pytest.mark.parametrize("name", some(ACTIVATIONS, "gelu"))
@pytest.mark.parametrize("is_scanned", some([True, False], True))
def test_same_gradients_from_fewer_bytes_and_the_same_products(name: str, is_scanned: bool) -> None:
    x = array(ROWS // 4, DIM)  # so few that no product is thin
    (plain, kept_by_plain, products), (same, kept, same_products) = (
        slope(model(ACTIVATIONS[name], is_scanned, keeps), x) for keeps in (False, True)
    )
    for got, expected in zip(*map(jax.tree.leaves, (same, plain)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert size_in_bytes(kept) < size_in_bytes(kept_by_plain)
    assert same_products == products > 0


@pytest.mark.parametrize("is_scanned", some([True, False], True))
def test_of_a_sum_one_term_is_kept(is_scanned: bool) -> None:
    """Of x·W + h·B, which an activation function reads: h·B is computed again."""
    _, kept, _ = slope(model(jax.nn.gelu, is_scanned, keeps=True), array(ROWS, DIM))
    hidden = [v.size for v in kept if v.shape[-2:] == (ROWS, 4 * DIM)]
    assert sum(hidden) == LAYERS * ROWS * 4 * DIM


@pytest.mark.parametrize("is_scanned", some([True, False], True))
@pytest.mark.parametrize("scheme", some([jlora.NF4(), jlora.MXFP4()], jlora.NF4()))
def test_quantized_weights_are_unpacked_again(scheme: Any, is_scanned: bool) -> None:
    """What is kept is smaller by what quantizing saves, also if the codes are gathered."""
    mesh = jax.make_mesh((1,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:1])
    whole = dict.fromkeys(PARAMS, NamedSharding(mesh, P()))
    x = jax.device_put(array(ROWS // 4, DIM), whole["up"])
    lora = jlora.transform(model(jax.nn.gelu, is_scanned, keeps=True), jlora.LoRA(rank=2))
    dense = jax.device_put(PARAMS, whole)
    packed = jlora.quantize(dense, scheme, sites=lora.sites(dense, x))
    kept = []
    for params in (dense, packed):
        base, adapter = lora.init(jax.random.key(0), params, x)
        call = lambda a, b=base: lora.apply(sharding.gathered(b, whole), a, x)  # noqa: E731
        kept.append(size_in_bytes(jax.eval_shape(lambda a, f=call: jax.vjp(f, a)[1], adapter)))
    size = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (dense, packed)]
    assert kept[0] - kept[1] > 0.8 * (size[0] - size[1])


def test_products_are_saved_and_elementwise_results_are_not() -> None:
    saved = {}
    w = jnp.ones((DIM, DIM))

    def f(x: jax.Array) -> jax.Array:
        y = jax.nn.softmax(jnp.tanh(x @ w) * 2 + 1)
        return jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True)) * y

    for eqn in jax.make_jaxpr(f)(w).jaxpr.eqns:
        name, operands = eqn.primitive.name, [v.aval for v in eqn.invars]
        saved[name] = jlora.remat_policy(eqn.primitive, *operands, **eqn.params)
    assert {n for n, s in saved.items() if not s} >= {"tanh", "mul", "add"}
    assert {n for n, s in saved.items() if s} >= {"dot_general", "rsqrt", "reduce_sum"}
