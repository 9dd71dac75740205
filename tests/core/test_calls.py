"""Layers that a model calls again under `jit` or `checkpoint`: each is traced once.

Eager calls evaluate each layer in its place, so that they are the reference.
"""

import jax
import jax.numpy as jnp
import pytest
from laws import assert_close, leaks_checked
from messages import refused
from small import array, set_up, set_up_noisy, some

import jlora

WIDTH, LAYERS = 8, 4
X = array(3, WIDTH)


def layer(p, x):
    """Products with one activation, and one alone."""
    q, k, v = (x @ p[n] for n in "qkv")
    y = jnp.tanh(q * k) + jnp.sin(v)
    for _ in range(12):
        y = jnp.cos(y)
    return jnp.tanh(x + y @ p["o"])


def in_place(params, x):
    for p in params.values():
        x = layer(p, x)
    return x


def in_jit(params, x):
    f = jax.jit(layer)
    for name, p in params.items():
        with jax.named_scope(name):
            x = f(p, x)
    return x


def in_jit_each(params, x):
    """Each layer is a function of its own."""
    for p in params.values():
        x = jax.jit(lambda p, x: layer(p, x))(p, x)
    return x


def computed_again(params, x):
    f = jax.checkpoint(layer, prevent_cse=False)
    for p in params.values():
        x = f(p, x)
    return x


def of_two_kinds(params, x):
    """Every second layer is of another kind; two layers have one weight."""
    f, last = jax.jit(layer), [*params.values()][-1]
    g = jax.jit(lambda x: jnp.tanh(f(last, jnp.tanh(x))))
    for i, p in enumerate(params.values()):
        x = f(p, x) if i % 2 else g(x)
    return x


def moved_in_jit(params, x):
    """A weight comes out of a function that is called again and again."""
    turn = jax.jit(lambda w: w.T)
    for p in params.values():
        x = layer({n: turn(turn(w)) for n, w in p.items()}, x)
    return x


def within_a_scan(params, x):
    def step(x, _):
        return in_jit(params, computed_again(params, x)), None

    return jax.lax.scan(step, x, None, 2)[0]


def across_layers(params, x):
    """One activation is multiplied in every layer."""
    f, out = jax.jit(layer), x
    for p in params.values():
        out = f(p, out) + jnp.tanh(x @ p["q"])
    return out


def with_numbers(params, x):
    """The layers differ in a number, or in nothing else than an operand that is known."""
    f = jax.jit(lambda p, x, s: layer(p, x) * s)
    for i, p in enumerate(params.values()):
        x = f(p, x, 1.0 if i % 2 else 0.5)
    return x


MODELS = [in_jit, in_jit_each, computed_again, of_two_kinds, moved_in_jit]
MODELS += [within_a_scan, across_layers, with_numbers]
PARAMS = {
    f"layer_{i}": {n: array(i + 1, WIDTH, WIDTH)[i] / 4 for n in "qkvo"} for i in range(LAYERS)
}
RULES = {
    "all": [jlora.LoRA(rank=2)],
    "some layers": [jlora.LoRA("layer_[12]/[qo]", rank=2)],
    "other ranks": [jlora.LoRA("layer_0/.*", rank=1), jlora.LoRA(rank=2)],
    "dropout": [jlora.LoRA(rank=2, dropout=0.5)],
    "DoRA": [jlora.DoRA(rank=2)],
    "full": [jlora.LoRA("layer_../[qk]|layer_./[qk]", rank=2), jlora.Full("layer_./o")],
}


def start(model, rules, params=PARAMS, x=X):
    lora, base, adapter = set_up_noisy(model, rules, params, x)
    return lora, base, jlora.dropout(adapter, jax.random.key(1))


def derivatives(lora):
    """Values, slopes in both modes, and those of a batch of adapters."""

    def all_of_it(base, adapter, x):
        def loss(adapter, x):
            return jnp.sum(jnp.sin(lora.apply(base, adapter, x)))

        grad = jax.grad(loss, (0, 1), allow_int=True)
        along = jax.jvp(lambda x: loss(adapter, x), (x,), (jnp.cos(x),))
        rows = jax.vmap(lora.apply, (None, None, 0))(base, adapter, jnp.stack([x, 2 * x]))
        slopes = [g for g in jax.tree.leaves(grad(adapter, x)) if g.dtype == x.dtype]
        return lora.apply(base, adapter, x), slopes, along, rows

    return all_of_it


def check_compiled(model, rules):
    """Against what runs eagerly; in float64, as many layers in a row magnify roundings."""
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (PARAMS, X))
        lora, base, adapter = start(model, rules, params, x)
        f = derivatives(lora)
        with leaks_checked():
            found = jax.jit(f)(base, adapter, x)
        assert_close(found, f(base, adapter, x), 1e-10)


@pytest.mark.parametrize("model", some(MODELS, moved_in_jit))
def test_shared_layers_are_those_in_place(model):
    check_compiled(model, RULES["all"])


@pytest.mark.parametrize("rules", some(RULES, "full"))
def test_whatever_the_layers_are_adapted_by(rules):
    check_compiled(in_jit, RULES[rules])


@pytest.mark.parametrize("scheme", some([jlora.Int8, jlora.NF4], jlora.Int8))
def test_quantized_layers(scheme):
    lora, base, adapter = start(in_jit, RULES["all"], jlora.quantize(PARAMS, scheme(".*")))
    f = jax.jit(derivatives(lora))
    assert_close(f(base, adapter, X), f(jlora.dequantize(base), adapter, X), 1e-5)
    few, many = (size(*start_of(n, in_jit, scheme)) for n in (4, 8))
    assert many - few <= 4 * FEW


@pytest.mark.slow
def test_routed_tables():
    lora, base, adapter = start(in_jit, RULES["all"])
    table = jlora.many.stack([adapter, jax.tree.map(lambda x: 2 * x, adapter)])
    apply = jlora.many.route(lora.apply)
    ids = jnp.array([0, 1, -1])
    assert_close(jax.jit(apply)(base, table, ids, X), apply(base, table, ids, X), 1e-5)


def test_a_weight_with_a_known_value_is_in_the_program_once():
    params = {"w": array(1, 64, 64)}

    def model(p, x):
        f = jax.jit(lambda w, x: jnp.tanh(x @ w))
        for _ in range(6):
            x = f(p["w"], x)
        return x

    lora, base, adapter = set_up(model, jlora.LoRA(rank=2), params, jnp.ones((2, 64)))
    lowered = jax.jit(lambda adapter, x: lora.apply(base, adapter, x)).lower(
        adapter, jnp.ones((2, 64))
    )
    assert lowered.as_text().count('dense<"0x') == 1


# -------------------------------------------------------------------------------- what is counted

FEW = 24  # equations that a layer may add beside those of the first


def start_of(layers, model, scheme=None):
    params = {f"layer_{i}": PARAMS["layer_0"] for i in range(layers)}
    if scheme is not None:
        params = jlora.quantize(params, scheme(".*"))
    lora, base, adapter = start(model, RULES["all"], params)
    return lambda a, base: jnp.sum(lora.apply(base, a, X)), adapter, base


def size(f, *args):
    """The equations of a gradient, those of each distinct jaxpr once."""
    seen = set()

    def count(jaxpr):
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) in seen:
            return 0
        seen.add(id(jaxpr))
        inner = (x for e in jaxpr.eqns for v in e.params.values() for x in jax.tree.leaves(v))
        return len(jaxpr.eqns) + sum(count(x) for x in inner if hasattr(x, "eqns"))

    return count(jax.make_jaxpr(jax.grad(f))(*args))


@pytest.mark.parametrize("model", some([in_jit, in_jit_each, computed_again], in_jit_each))
def test_tracing_follows_distinct_layers(model):
    four, eight = (size(*start_of(n, model)) for n in (4, 8))
    assert eight - four <= 4 * FEW
    of_a_layer = size(*start_of(2, in_place)) - size(*start_of(1, in_place))
    assert of_a_layer > 2 * FEW  # so that the bound says something


def test_program_is_the_same():
    found = []
    for model in (in_place, in_jit, in_jit_each):
        f, adapter, base = start_of(LAYERS, model)
        compiled = jax.jit(jax.grad(f)).lower(adapter, base).compile()
        costs = dict(compiled.cost_analysis() or {})
        found.append([costs["flops"], costs["bytes accessed"]])
    assert found[0] == found[1] == found[2]


def test_scopes_keep_their_names():
    f, adapter, base = start_of(LAYERS, in_jit)
    text = str(jax.jit(jax.grad(f)).lower(adapter, base).compile().as_text())
    assert all(f"(layer_{i})" in text for i in range(LAYERS))


def test_errors_name_a_path_and_a_line():
    def model(params, x):
        for name, p in params.items():
            with jax.named_scope(name):
                x = layer(p, x) + jnp.linalg.inv(p["q"])[0]  # no product
        return x

    _, base, adapter = start(in_jit, RULES["all"])
    with refused(NotImplementedError, "", "layer_0/q", "test_calls.py"):
        jax.jit(jlora.transform(model).apply)(base, adapter, X)
