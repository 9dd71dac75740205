"""What adapters add to the gradient of a shared activation comes after the sum of all others.

The order shows in the value: with weights of 2**40 and -2**40, whose gradients cancel, and a ΔW of
1, the sum in float32 is 1 if the large terms meet first, and 0 if the 1 is added to one of them.
"""

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora.core._fork import shared
from jlora.core._interpret import RULES

LARGE = 2.0**40


def three_products(p, x):
    return x @ p["q"] + x @ p["k"] + x @ p["v"]


def by_einsum(p, x):
    return sum(jnp.einsum("bi,io->bo", x, p[n]) for n in "qkv")


def by_calls(p, x):
    dot = jax.jit(lambda x, w: x @ w)
    return dot(x, p["q"]) + dot(x, p["k"]) + dot(x, p["v"])


def within_a_call(p, x):
    return jax.jit(three_products)(p, x)


def of_an_intermediate(p, x):
    return three_products(p, 1 * x)


def in_a_layer(p, x):
    return jax.checkpoint(of_an_intermediate)(p, x)


def in_a_scan(p, x):
    stacks = jax.tree.map(lambda w: w[None], p)
    return jax.lax.scan(lambda h, p: (of_an_intermediate(p, h), None), x, stacks)[0]


def by_moved_weights(p, x):
    other_way_round = jax.lax.dot_general(p["v"], x, (((0,), (1,)), ((), ())))
    return x @ p["q"].T + x @ p["k"].reshape(1, 1) + other_way_round.T


def by_convolutions(p, x):
    x = x[:, :, None]

    def conv(w):
        return jax.lax.conv(x, w[:, :, None], (1,), "VALID")[:, :, 0]

    return conv(p["q"]) + conv(p["k"]) + conv(p["v"])


MODELS = [
    three_products,
    by_einsum,
    by_calls,
    within_a_call,
    of_an_intermediate,
    in_a_layer,
    in_a_scan,
    by_moved_weights,
    by_convolutions,
]


@pytest.mark.parametrize("adapted", ["q", "k", "v", "qv", "qkv"])
@pytest.mark.parametrize("model", MODELS)
def test_large_terms_meet_first(model, adapted):
    weights = {n: jnp.zeros((1, 1)) for n in "qkv"}
    weights[adapted[0]] += LARGE
    weights["k" if adapted == "v" else "v"] -= LARGE
    x = jnp.ones((1, 1))
    lora = jlora.transform(model, jlora.LoRA(f"[{adapted}]", rank=1, alpha=1))
    base, adapter = lora.init(jax.random.key(0), weights, x)
    adapter = jax.tree.map(jnp.ones_like, adapter)  # each ΔW is 1

    def loss(x):
        return lora.apply(base, adapter, x).sum()

    assert jax.jit(jax.grad(loss))(x).item() == len(adapted)


def test_what_is_shared():
    """Only what is used several times, one of them with a weight that is adapted."""

    def model(w, u, x, y, z):
        once = jax.jit(jnp.matmul)(x.T, w.astype(x.dtype))
        return x @ w, x @ u, y @ w, z @ u, z @ u, once

    square = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(model)(*[square] * 5)
    found = shared(jaxpr.jaxpr, [True, *[False] * 4], RULES)
    assert found == {jaxpr.jaxpr.invars[2]}
    assert not shared(jaxpr.jaxpr, [False] * 5, RULES)


def test_integers_are_not_forked():
    """An index has no gradient: a table that is looked up and multiplied with the same array."""

    def model(p, i):
        return p["w"][i] + i @ p["w"] + i @ p["w"]

    lora = jlora.transform(model, jlora.LoRA("w", rank=1))
    i = jnp.zeros(2, int)
    base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((2, 2))}, i)
    assert lora.apply(base, adapter, i).shape == (2, 2)
