"""Activations that several products share: their A are concatenated, their gradients added last.

What adapters add to the gradient comes after the sum of all others. The order shows in the value:
with weights of 2**40 and -2**40, whose gradients cancel, and a ΔW of 1, the sum in float32 is 1 if
the large terms meet first, and 0 if the 1 is added to one of them.
"""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_close, randomize, start
from small import array, set_up, set_up_noisy, some_rows

import jlora

LARGE = 2.0**40


def three_products(p, x):
    return x @ p["q"] + x @ p["k"] + x @ p["v"]


def by_einsum(p, x):
    return sum(jnp.einsum("bi,io->bo", x, p[n]) for n in "qkv")


def in_a_layer(p, x):
    return jax.checkpoint(lambda p, x: jax.jit(three_products)(p, 1 * x))(p, x)


def in_a_scan(p, x):
    stacks = jax.tree.map(lambda w: w[None], p)
    return jax.lax.scan(lambda h, p: (three_products(p, 1 * h), None), x, stacks)[0]


MODELS = [three_products, by_einsum, in_a_layer, in_a_scan]


@pytest.mark.parametrize(
    ("adapted", "width"), some_rows([("q", 16), ("qkv", 16), ("qkv", 1)], ("qkv", 16), ("qkv", 1))
)
def test_large_terms_meet_first(adapted, width):
    """Also where x·A is not small beside x, so that each A has a product of its own."""
    weights = {n: np.zeros((width, width), np.float32) for n in "qkv"}
    weights[adapted[0]] += np.float32(LARGE)
    weights["v"] -= np.float32(LARGE)
    x, rule = jnp.ones((1, width)), jlora.LoRA(f"[{adapted}]", rank=1, alpha=1, init=start)
    loras = [jlora.transform(model, rule) for model in MODELS]
    base, adapter = loras[0].init(jax.random.key(0), jax.tree.map(jnp.asarray, weights), x)
    adapter = jax.tree.map(np.ones_like, adapter)  # each ΔW is 1

    @jax.jit
    def slopes(x):
        return [jax.grad(lambda x, f=f: f.apply(base, adapter, x)[0, 0])(x) for f in loras]

    for model, slope in zip(MODELS, slopes(x), strict=True):
        assert (slope == len(adapted)).all(), model


# ------------------------------------------------------------------------------- side by side

DIM = 128


def matrices(names):
    return {n: array(DIM, DIM) * (i + 1) / DIM**0.5 for i, n in enumerate(names)}


def query_key_value(p, x):
    q, k, v = (x @ p[n] for n in "qkv")
    return q * jnp.tanh(k) + v


def with_moves(p, x):
    """The weights of the later products are made between the first product and theirs."""
    q = x @ p["q"]
    k = x @ (2 * p["k"].T.astype(x.dtype))
    v = jnp.einsum("bti,iho->btho", x, p["v"].reshape(DIM, 4, -1)).reshape(q.shape)
    return jnp.tanh(q) * k + v


def from_the_left(p, x):
    """The activation is the second operand."""
    dims = (((0,), (2,)), ((), ()))
    return sum(jnp.tanh(jax.lax.dot_general(p[n], x, dims)) for n in "qkv")


def from_both_sides(p, x):
    """Over two axes, in either order, with the weight's axes and factors turned round."""
    x = x.reshape(2, 3, 8, -1)
    v = jax.lax.dot_general(p["v"].reshape(DIM, 8, -1), x, (((2, 1), (3, 2)), ((), ())))
    q = jax.lax.dot_general(x, p["q"].reshape(8, -1, DIM), (((2, 3), (0, 1)), ((), ())))
    return jnp.tanh(q) + v.transpose(1, 2, 0)


def in_a_scanned_layer(p, x):
    stacks = jax.tree.map(lambda w: jnp.stack([w, w]), p)
    return jax.lax.scan(lambda h, p: (query_key_value(p, h), None), x, stacks)[0]


def of_a_product(p, x):
    """The third weight follows from the product with the first, and must wait for it."""
    q, k = x @ p["q"], x @ p["k"]
    return q + k + x @ (p["v"] * jnp.tanh(q.mean()))


ALIKE = (jlora.LoRA("[qkv]", rank=4, alpha=16),)  # larger sums lose digits in the cosine
MIXED = (jlora.LoRA("q", rank=2), jlora.LoRA("k", rank=4, alpha=3), jlora.LoRA("v", rank=1))
WIDE = (jlora.LoRA("[qkv]", rank=DIM),)  # as wide as the activation
# The model, the rules, and the columns of A by which the activation is multiplied.
SIDE_BY_SIDE = [
    (query_key_value, MIXED, (7,)),
    (from_both_sides, (jlora.LoRA("q", rank=4), jlora.LoRA("v", rank=2)), (6,)),
    (in_a_scanned_layer, ALIKE, (12,)),
    (of_a_product, ALIKE, (4, 8)),
    (query_key_value, (jlora.LoRA("[qv]", rank=4),), (8,)),
    (query_key_value, WIDE, (DIM,) * 3),
    (with_moves, ALIKE, (12,)),
    (from_the_left, ALIKE, (12,)),
]


@pytest.mark.parametrize(
    ("model", "rules", "columns"), some_rows(SIDE_BY_SIDE, SIDE_BY_SIDE[1], SIDE_BY_SIDE[3])
)
def test_an_activation_is_multiplied_once(model, rules, columns):
    """With the A of all weights at once; values and gradients are those of merged weights."""
    with jax.enable_x64(True):
        params, x = jax.tree.map(np.float64, (matrices("qkv"), array(2, 3, DIM)))
        rules = [dataclasses.replace(rule, init=start) for rule in rules]
        lora, base, adapter = set_up_noisy(model, rules, params, x)

        def adapted(adapter, x):
            return jnp.cos(lora.apply(base, adapter, x)).sum()

        def merged(adapter, x):
            return jnp.cos(model(jlora.merge(base, adapter), x)).sum()

        found = columns_of(jax.make_jaxpr(adapted)(adapter, x).jaxpr)
        assert sorted(found) == sorted(columns)
        slopes = jax.jit(lambda *args: [jax.value_and_grad(f)(*args) for f in (adapted, merged)])
        assert_close(*slopes(adapter, x), 1e-10)


def columns_of(jaxpr):
    """The lengths of the rank in the products of activations with factors."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "jit" and eqn.params["name"] == "_low_rank":
            firsts = eqn.invars[:-1:2]  # p and q of each term, then the activation
            found.append(sum(p.aval.shape[-1] for p in firsts))
            continue
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=has_equations):
            if has_equations(inner):
                found += columns_of(getattr(inner, "jaxpr", inner))
    return found


def has_equations(x):
    return hasattr(x, "eqns")


@pytest.mark.parametrize("dropped", ["q", "qkv"])
def test_each_has_its_own_dropout(dropped):
    """A mask is drawn for each site: what they multiply is not the same."""
    lora = jlora.transform(query_key_value, *(jlora.LoRA(n, rank=2, dropout=0.5) for n in dropped))
    params, x = matrices("qkv"), jnp.ones((2, 3, DIM))
    base, adapter = lora.init(jax.random.key(1), params, x)
    adapter = jlora.dropout(randomize(adapter), jax.random.key(2))
    jaxpr = jax.make_jaxpr(lambda a: lora.apply(base, a, x))(adapter)
    assert columns_of(jaxpr.jaxpr) == [2] * len(dropped)


def test_effects_keep_their_order():
    """What prints is not moved, whatever weight follows from it."""

    def model(p, x):
        q = x @ p["q"]
        jax.debug.print("first", ordered=True)
        doubled = 2 * p["k"]
        jax.debug.print("second {}", doubled.shape[0], ordered=True)
        return q + x @ doubled

    params, x = matrices("qk"), jnp.ones((2, DIM))
    lora, base, adapter = set_up(model, jlora.LoRA("[qk]", rank=4), params, x)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        out = lora.apply(base, adapter, x)
        jax.effects_barrier()
    assert printed.getvalue().split("\n") == ["first", f"second {DIM}", ""]
    np.testing.assert_allclose(out, x @ (params["q"] + 2 * params["k"]), rtol=1e-4)
