"""Activations that several products share: their A are concatenated, their gradients added last.

What adapters add to the gradient comes after the sum of all others. The order shows in the value:
with weights of 2**40 and -2**40, whose gradients cancel, and a ΔW of 1, the sum in float32 is 1 if
the large terms meet first, and 0 if the 1 is added to one of them.
"""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_close, randomize

import jlora
from jlora._core._interpret import RULES
from jlora._core._shared import groups

LARGE = 2.0**40


def three_products(p, x):
    return x @ p["q"] + x @ p["k"] + x @ p["v"]


def by_einsum(p, x):
    return sum(jnp.einsum("bi,io->bo", x, p[n]) for n in "qkv")


def within_a_call(p, x):
    return jax.jit(three_products)(p, x)


def of_an_intermediate(p, x):
    return three_products(p, 1 * x)


def in_a_layer(p, x):
    return jax.checkpoint(of_an_intermediate)(p, x)


def in_a_scan(p, x):
    stacks = jax.tree.map(lambda w: w[None], p)
    return jax.lax.scan(lambda h, p: (of_an_intermediate(p, h), None), x, stacks)[0]


MODELS = [
    three_products,
    by_einsum,
    within_a_call,
    of_an_intermediate,
    in_a_layer,
    in_a_scan,
]


@pytest.mark.parametrize(("adapted", "width"), [("q", 16), ("qkv", 16), ("qkv", 1)])
@pytest.mark.parametrize("model", MODELS)
def test_large_terms_meet_first(model, adapted, width):
    """Also where x·A is not small beside x, so that each A has a product of its own."""
    weights = {n: jnp.zeros((width, width)) for n in "qkv"}
    weights[adapted[0]] += LARGE
    weights["v"] -= LARGE
    x = jnp.ones((1, width))
    lora = jlora.transform(model, jlora.LoRA(f"[{adapted}]", rank=1, alpha=1))
    base, adapter = lora.init(jax.random.key(0), weights, x)
    adapter = jax.tree.map(jnp.ones_like, adapter)  # each ΔW is 1

    def loss(x):
        return lora.apply(base, adapter, x)[0, 0]

    assert (jax.jit(jax.grad(loss))(x) == len(adapted)).all()


def test_groups():
    """Equations that multiply one activation with weights, none of which follows from a product."""

    def model(w, u, x, y):
        q = x @ w
        return x @ u, x @ (w * q), y @ w.T, x @ w.astype(x.dtype)

    square = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(model)(*[square] * 4).jaxpr
    [group] = groups(jaxpr, jaxpr.eqns, [True, True, False, False], RULES)
    assert [jaxpr.eqns.index(eqn) for eqn in group] == [0, 1, 6]
    assert not groups(jaxpr, jaxpr.eqns, [False] * 4, RULES)


# ------------------------------------------------------------------------------- side by side

DIM = 128


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def matrices(names, dim=DIM):
    return {n: jax.random.normal(jax.random.key(ord(n)), (dim, dim)) / dim**0.5 for n in names}


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


RULES_ALIKE = [jlora.LoRA("[qkv]", rank=4)]
RULES_MIXED = [jlora.LoRA("q", rank=2), jlora.LoRA("k", rank=4, alpha=3), jlora.LoRA("v", rank=1)]
# the model, the rules, and the columns of A by which the activation is multiplied
SIDE_BY_SIDE = [
    pytest.param(query_key_value, RULES_ALIKE, [12], marks=pytest.mark.slow),
    (query_key_value, RULES_MIXED, [7]),
    pytest.param(query_key_value, [jlora.LoRA("[qv]", rank=4)], [8], marks=pytest.mark.slow),
    pytest.param(
        query_key_value, [jlora.LoRA("[qkv]", rank=DIM)], [DIM] * 3, marks=pytest.mark.slow
    ),  # as wide as the activation
    pytest.param(with_moves, RULES_ALIKE, [12], marks=pytest.mark.slow),
    pytest.param(from_the_left, RULES_ALIKE, [12], marks=pytest.mark.slow),
    (from_both_sides, [jlora.LoRA("q", rank=4), jlora.LoRA("v", rank=2)], [6]),
    (in_a_scanned_layer, RULES_ALIKE, [12]),
    (of_a_product, RULES_ALIKE, [4, 8]),
]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("model", "rules", "columns"), SIDE_BY_SIDE)
def test_an_activation_is_multiplied_once(model, rules, columns):
    """With the A of all weights at once; values and gradients are those of merged weights."""
    params, x = matrices("qkv"), jax.random.normal(jax.random.key(0), (2, 3, DIM))
    lora = jlora.transform(model, *rules)
    base, adapter = lora.init(jax.random.key(1), params, x)
    adapter = randomize(adapter)

    def adapted(adapter, x):
        return jnp.cos(lora.apply(base, adapter, x)).sum()

    def merged(adapter, x):
        return jnp.cos(model(jlora.merge(base, adapter), x)).sum()

    assert sorted(columns_of(jax.make_jaxpr(adapted)(adapter, x).jaxpr)) == sorted(columns)
    actual, expected = (jax.jit(jax.value_and_grad(f))(adapter, x) for f in (adapted, merged))
    assert_close(actual, expected, 1e-10)


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
    lora = jlora.transform(model, jlora.LoRA("[qk]", rank=4))
    base, adapter = lora.init(jax.random.key(1), params, x)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        out = lora.apply(base, adapter, x)
        jax.effects_barrier()
    assert printed.getvalue().split("\n") == ["first", f"second {DIM}", ""]
    np.testing.assert_allclose(out, x @ (params["q"] + 2 * params["k"]), rtol=1e-4)
