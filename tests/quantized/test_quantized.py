"""Quantized bases: what a scheme keeps, which leaves it takes, and what the step makes of them."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from chain import FORMS
from hypothesis import strategies as st
from messages import refused
from own_schemes import Pairs
from small import set_up_noisy, some, some_rows

import jlora
from jlora._core import Axis
from jlora._quantized import Scheme, _leaf


def normal(*shape, seed=0, dtype=jnp.float32):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(draw.astype(dtype), dtype)  # nothing is compiled


# Bits a parameter and relative error of normally distributed weights (512, 640).
KEPT = [
    (jlora.NF4("w", double=False), 4.5, 0.0922),
    (jlora.NF4("w"), 4 + 8 / 64 + 32 / (64 * 256), 0.0922),
    (jlora.NF4("w", block=32, double=False), 5, 0.0873),
    (jlora.NF4("w", block=128, double=False), 4.25, 0.0957),
    (jlora.FP4("w"), 4.5, 0.122),
    (jlora.Int8("w"), 8 + 32 / 512, 0.00744),
    (jlora.Int8("w", block=32), 9, 0.00535),
    (jlora.Int4("w"), 4 + 24 / 128, 0.1006),
    (jlora.Int4("w", group=32), 4 + 24 / 32, 0.0808),
    (jlora.FP8("w"), 8 + 32 / 128**2, 0.0263),
    (jlora.FP8("w", block=None), 8 + 32 / 512, 0.0263),
    (jlora.MXFP4("w"), 4.25, 0.1152),
]


SCHEMES = [scheme for scheme, _, _ in KEPT]
DAILY = {type(row[0]): row for row in KEPT[::-1]}.values()  # the first of each type
schemes = pytest.mark.parametrize("scheme", some(SCHEMES, *(row[0] for row in DAILY)), ids=str)
FEW = some(SCHEMES, SCHEMES[7])
few = pytest.mark.parametrize("scheme", FEW, ids=str)


def test_every_scheme_is_in_the_table():
    public = [x for x in vars(jlora).values() if isinstance(x, type) and issubclass(x, Scheme)]
    assert public
    assert {type(s) for s, _, _ in KEPT} == set(public)


@pytest.mark.parametrize(("scheme", "bits", "error"), some_rows(KEPT, *DAILY), ids=str)
def test_bits_and_error(scheme, bits, error):
    w = normal(512, 640)
    found = jlora.summary(jlora.quantize({"w": w}, scheme)).quantized[0]
    assert 8 * found.after / w.size == pytest.approx(bits, rel=0.01)
    assert found.error == pytest.approx(error, rel=0.02)
    back = jlora.dequantize(jlora.quantize({"w": w}, scheme))["w"]
    expected = np.linalg.norm(back - w) / np.linalg.norm(w)
    assert found.error == pytest.approx(expected, rel=1e-3)


def test_errors_of_what_float32_has_no_squares_of():
    powers = {str(n): normal(64, 64) * 2.0**n for n in (0, -70, 70)}
    found = jlora.summary(jlora.quantize(powers, jlora.Int8(".*"))).quantized
    assert [e.error for e in found] == pytest.approx([found[0].error] * 3, rel=1e-3)


@few
@pytest.mark.parametrize("dtype", some([jnp.bfloat16, "f4", "f2"], jnp.bfloat16))
def test_a_second_time(scheme, dtype):
    """The dtype stays; and what codes stand for is of codes for it, but for an affine scheme."""
    once = jlora.dequantize(jlora.quantize({"w": normal(256, 128, dtype=dtype)}, scheme))["w"]
    twice = jlora.dequantize(jlora.quantize({"w": once}, scheme))["w"]
    assert once.dtype == twice.dtype == dtype
    error = np.linalg.norm(np.float32(twice - once)) / np.linalg.norm(np.float32(once))
    assert error < (2e-2 if isinstance(scheme, jlora.Int4) else 1e-3)


@few
def test_shapes_and_jit_and_stacks(scheme):
    """Abstract is concrete, jitted is eager, and each matrix of a stack is quantized as alone."""
    w = normal(3, 256, 128)
    eager = jlora.quantize({"w": w}, scheme)
    jitted = jax.jit(lambda p: jlora.quantize(p, scheme))({"w": w})
    laws.assert_same_codes(jitted, eager)
    abstract = jlora.quantize({"w": jax.ShapeDtypeStruct(w.shape, w.dtype)}, scheme)
    assert jax.eval_shape(lambda: eager) == abstract
    quantize = lambda: jlora.quantize({"w": w}, scheme)  # noqa: E731 - closes over w
    assert jax.eval_shape(quantize) == abstract
    closed = jax.jit(quantize)()
    assert jax.tree.structure(closed) == jax.tree.structure(eager)
    laws.assert_close(jlora.dequantize(closed), jlora.dequantize(eager), 1e-3)
    assert jlora.dequantize(abstract)["w"].shape == w.shape
    for i in range(3):
        alone = jlora.quantize({"w": w[i]}, scheme)["w"]
        of_stack = (eager["w"].data[i], eager["w"].scale[i])
        laws.assert_same_codes((alone.data, alone.scale), of_stack)
    assert eager["w"].shape == (3, 256, 128)
    assert (eager["w"].ndim, eager["w"].size) == (3, w.size)


@schemes
def test_small_weights_and_zeros(scheme):
    """Small weights are quantized in proportion to large ones; zeros stay zeros."""
    w = normal(512, 640)
    large, small, zeros = (
        jlora.dequantize(jlora.quantize({"w": x}, scheme))["w"] for x in (w, w * 2**-9, 0 * abs(w))
    )
    np.testing.assert_array_equal(small, large * 2**-9)
    np.testing.assert_array_equal(zeros, np.zeros((512, 640)))
    assert not np.signbit(zeros).any()


@pytest.mark.slow
@hypothesis.settings(deadline=None, max_examples=6)
@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    block=st.sampled_from([2, 4, 6]),
    double=st.booleans(),
    data=st.data(),
)
def test_values_of_any_shape(shape, block, double, data):
    """Each value is off by at most half of the widest gap between codes, times its scale."""
    axes = data.draw(st.permutations(range(len(shape))))
    stack = data.draw(st.integers(0, len(shape) - 2))
    w = normal(*shape)
    scheme = Pairs("w", block=block, double=double)
    form = scheme.form(tuple(shape), tuple(axes[:stack]), tuple(axes[stack:]), 1)
    leaf = jlora._quantized.quantize_weight(w, scheme, form)
    assert form.flat == (shape[axes[-1]] % block != 0)
    error = np.abs(np.asarray(leaf.array()) - np.asarray(w))
    largest = np.abs(np.asarray(w)).max()
    assert error.max() <= (0.16 + 0.01 * double) * largest


# ------------------------------------------------------------------------------- which leaves


def language_model(params, ids):
    x = params["embed"][ids]
    if "positions" in params:
        x = x + params["positions"][jnp.arange(len(ids))]
    return jnp.tanh(x @ params["up"]) @ params["down"] @ params["head"]


def language_params():
    shapes = {"embed": (96, 64), "up": (64, 128), "down": (128, 64), "head": (64, 96)}
    return {name: normal(*shape) for name, shape in shapes.items()}


def test_without_a_pattern_neither_embeddings_nor_the_head():
    params, ids = language_params(), jnp.arange(4)
    lora = jlora.transform(language_model, jlora.LoRA("up"), jlora.Full("down"))
    sites = lora.sites(params, ids)
    base = jlora.quantize(params, jlora.NF4(), sites=sites)
    assert [name for name, x in base.items() if isinstance(x, jlora.Quantized)] == ["up"]
    assert base["down"] is params["down"]
    frozen = jlora.transform(language_model).sites(params, ids)
    base = jlora.quantize(params, jlora.Int8("down"), jlora.NF4(), sites=frozen)
    kinds = {
        name: type(x.scheme).__name__ for name, x in base.items() if isinstance(x, jlora.Quantized)
    }
    assert kinds == {"up": "NF4", "down": "Int8"}


def test_a_table_of_positions_makes_no_head():
    """It has as many rows as a layer has outputs, as in GPT-2 of 1,024 dimensions."""
    params = language_params() | {"positions": normal(64, 64)}
    sites = jlora.transform(language_model).sites(params, jnp.arange(4))
    base = jlora.quantize(params, jlora.NF4(), sites=sites)
    quantized = {name for name, x in base.items() if isinstance(x, jlora.Quantized)}
    assert quantized == {"up", "down"}


def test_rows_of_an_embedding_are_blocks():
    """So that a lookup reads its rows alone."""
    params, ids = language_params(), jnp.array([[3, 95], [0, 3]])
    rule = laws.from_numpy(jlora.LoRA("embed|head", rank=2))
    lora = jlora.transform(language_model, rule)
    base = jlora.quantize(params, jlora.NF4(".*"), sites=lora.sites(params, ids))
    assert base["embed"].form.order == (0, 1)
    assert base["head"].form.order == (1, 0)
    base, adapter = lora.init(jax.random.key(0), base, ids)
    jaxpr = jax.make_jaxpr(lambda a, ids: lora.apply(base, a, ids))(adapter, ids)
    dense = [v.aval.shape for eqn in subequations(jaxpr) for v in eqn.outvars]
    assert (96, 64) not in [s for s in dense if s]


def subequations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from subequations(inner)


def test_a_table_says_what_is_quantized():
    params, ids = language_params(), jnp.arange(4)
    lora = jlora.transform(language_model, jlora.LoRA("up"))
    base = jlora.quantize(params, jlora.NF4("up|down"), sites=lora.sites(params, ids))
    row = next(x for x in str(lora.sites(base, ids)).splitlines() if x.startswith("up"))
    assert row.endswith("NF4(block=64, double=True)")
    assert jlora.count(base) == jlora.count(params)
    small, large = (jlora.summary(x, {}).base_bytes for x in (base, params))
    assert small == large - 2 * 4 * 64 * 128 + sum(base[k].nbytes for k in ("up", "down"))
    assert repr(base["up"]) == "Quantized(float32[64,128], NF4(block=64, double=True))"


def test_what_a_traced_function_closes_over_is_checked_and_kept():
    """Its values are known: those that are not finite are named, and none is donated."""
    params = {"w": normal(64, 32)}
    jax.jit(lambda: jlora.quantize(params, jlora.NF4("w"), donate=True))()
    assert not params["w"].is_deleted()
    broken = {"w": params["w"].at[0, :2].set(jnp.nan)}
    for tree in (broken, jax.tree.map(np.asarray, broken)):
        with refused(ValueError, "params", "has 2 values that are NaN or infinite at 'w'"):
            jax.jit(lambda tree=tree: jlora.quantize(tree, jlora.NF4("w")))()
    base, lines = jlora.quantize(params, jlora.NF4("w")), []
    jax.jit(lambda: lines.append(str(jlora.summary(base))))()
    assert lines == [str(jlora.summary(base))]


def test_donated_arrays_are_deleted():
    params = language_params()
    base = jlora.quantize(params, jlora.NF4("up"), donate=True)
    assert params["up"].is_deleted()
    assert not params["down"].is_deleted()
    assert base["down"] is params["down"]
    shared = jnp.ones((64, 64))  # one array at three paths, of which one stays
    tree = dict.fromkeys("abc", shared)
    base = jlora.quantize(tree, jlora.NF4("a|b"), donate=True)
    np.testing.assert_array_equal(base["c"], np.ones((64, 64)))
    base = jlora.quantize(tree, jlora.NF4(".*"), donate=True)
    assert shared.is_deleted()
    np.testing.assert_array_equal(jlora.dequantize(base)["b"], np.ones((64, 64)))


# ------------------------------------------------------------------------------------- the step


def moved(p, x):
    """Kernels are joined, cut, turned and scaled."""
    w = jnp.concatenate([p["q"], -p["k"], p["v"].T], 1).astype(jnp.bfloat16)
    w = w.reshape(64, 3, 64).transpose(1, 0, 2)[:, ::-1] * 0.5
    return jnp.einsum("ti,jio->tjo", x.astype(jnp.bfloat16), w[1:, :, 8:40]).sum(1)


# A model, its parameters, which of them are quantized, the rule, the input and a tolerance.
MODELS = {
    "products": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"],
        {"w": normal(256, 128) / 16, "v": normal(128, 64, seed=1) / 8},
        *("w|v", jlora.LoRA("w", rank=4), normal(8, 256, seed=2), 1e-6),
    ),
    "moved": (
        *(moved, {k: normal(64, 64, seed=i) for i, k in enumerate("qkv")}),
        *(".*", jlora.LoRA("q|v", rank=2), normal(5, 64, seed=9), 2e-2),
    ),
    "trained rows beside a frozen table": (
        lambda p, x: x @ jnp.concatenate([p["table"], p["new"]]).T,
        {"table": normal(64, 64), "new": normal(4, 64, seed=1)},
        *("table", jlora.Full("new"), normal(3, 64, seed=2), 1e-6),
    ),
}


def problem(scheme=KEPT[1][0], name="products"):
    """The transform, a quantized base, an adapter and the input of a model."""
    model, params, pattern, rule, x, _ = MODELS[name]
    scheme = type(scheme)(**vars(scheme) | {"pattern": pattern})
    return *set_up_noisy(model, laws.from_numpy(rule), jlora.quantize(params, scheme), x), x


STEPS = [(SCHEMES[1], name) for name in list(MODELS)[1:]]
STEPS += some_rows([(scheme, "products") for scheme in SCHEMES], (SCHEMES[7], "products"))


@pytest.mark.parametrize(("scheme", "name"), STEPS, ids=str)
def test_the_step_is_that_on_dequantized_weights(scheme, name):
    """Values and gradients, of whatever is trained; values without an adapter."""
    lora, base, adapter, x = problem(scheme, name)
    value = laws.value_and_slope(lambda a, base: lora.apply(base, a, x))
    both = jax.jit(lambda a, base: (value(a, base), lora.apply(base, {}, x)))
    actual, expected = (both(adapter, b) for b in (base, jlora.dequantize(base)))
    laws.assert_close(actual, expected, MODELS[name][-1])


def test_moves_of_codes_are_exact():
    lora, base, _, x = problem(name="moved")
    both = lambda base: (lora.apply(base, {}, x), moved(jlora.dequantize(base), x))  # noqa: E731
    np.testing.assert_array_equal(*jax.jit(both)(base))


def test_derivatives_and_batches():
    """Forward, of second order, and of several adapters at once."""
    lora, base, adapter, x = problem()
    two = jax.tree.map(lambda v: np.stack([v, v / 2]), adapter)

    def transformed(base):
        value = lambda adapter: (lora.apply(base, adapter, x) ** 2).sum()  # noqa: E731
        both = [jax.jvp(f, (adapter,), (adapter,)) for f in (value, jax.grad(value))]
        return both, jax.vmap(value)(two)

    f = jax.jit(transformed)
    laws.assert_close(f(base), f(jlora.dequantize(base)), 1e-5)


@schemes
def test_entries_that_are_decoded_in_turn(scheme):
    """What TPUs do with the experts of a ragged product."""
    packed = jlora.quantize({"w": normal(3, 128, 64)}, scheme)["w"].packed(map(Axis, range(3)))
    plain = packed.with_plain_scales or (lambda parts: parts)
    decode = functools.partial(_leaf._decode, packed.axes, packed.dtype)
    turns = functools.partial(_leaf._decode_in_turn, decode, packed.axes[0])
    both = jax.jit(lambda parts: (turns(plain(parts)), decode(plain(parts))))
    actual, expected = both(packed.parts)
    assert actual.axes == expected.axes
    np.testing.assert_array_equal(actual.value, expected.value)


def test_a_scale_that_is_trained_has_its_gradient():
    """The weight is frozen, not what the model multiplies it with."""
    base = jlora.quantize({"w": normal(64, 32)}, jlora.NF4("w"))
    x = normal(4, 64, seed=1)

    def value(s, base):
        return jlora.wrap(lambda p: (x @ (p["w"] * s)).sum())(base)

    actual, expected = (float(jax.grad(value)(2.0, b)) for b in (base, jlora.dequantize(base)))
    assert actual == pytest.approx(expected, rel=1e-5)


def test_params_in_one_tree():
    """As in a train state: the base's arrays have no moments, and stay to the bit as they are."""
    import optax

    lora, base, adapter, x = problem()
    params = jlora.Params(base, adapter)
    tx = jlora.optimizer(optax.adamw(1e-2))
    state = tx.init(params)
    loss = lambda p: (lora.apply(p.base, p.adapter, x) ** 2).sum()  # noqa: E731

    @jax.jit
    def step(params):
        updates, _ = tx.update(jax.grad(loss, allow_int=True)(params), state, params)
        return optax.apply_updates(params, updates)

    new = step(params)
    jax.tree.map(np.testing.assert_array_equal, new.base, base)
    assert not np.array_equal(new.adapter["w"].b, adapter["w"].b)
    moments = [x for x in jax.tree.leaves(state) if np.ndim(x)]
    assert sum(np.size(x) for x in moments) == 2 * jlora.count(adapter)


def test_merging():
    _, base, adapter, _ = problem()
    bfloat = jax.tree.map(
        lambda leaf: jlora.quantize({"w": leaf.array(jnp.bfloat16)}, jlora.NF4("w"))["w"],
        base,
        is_leaf=lambda x: isinstance(x, jlora.Quantized),
    )
    merged = jlora.merge(bfloat, adapter)
    delta = np.float32(adapter["w"].scale) * np.asarray(adapter["w"].a @ adapter["w"].b)
    exact = np.asarray(bfloat["w"].array(jnp.float32)) + delta
    half = float(jnp.finfo(jnp.bfloat16).eps) / 2
    np.testing.assert_allclose(np.float32(merged["w"]), exact, rtol=1.001 * half)  # rounded once
    laws.assert_close(merged["v"], bfloat["v"].array(), half)
    again = jlora.merge(base, adapter, requantize=True)
    assert again["v"] is base["v"]
    back, dense = (np.asarray(x) for x in (again["w"].array(), jlora.merge(base, adapter)["w"]))
    found = {e.path: e.error for e in jlora.summary(again).quantized}
    error = np.linalg.norm(back - dense) / np.linalg.norm(dense)
    assert found["w",] == pytest.approx(error, rel=1e-3)
    # As from a checkpoint of codes, whose errors are not known.
    unknown = dataclasses.replace(jax.device_put(base["w"], jax.devices()[0]), error=None)
    requantized = jlora.merge(base | {"w": unknown}, adapter, requantize=True)["w"]
    jax.tree.map(np.testing.assert_array_equal, requantized, again["w"])
    full = {"v": jnp.ones(base["v"].shape)}
    trained = jlora.merge(base, full, check=True, requantize=True)["v"]
    assert trained.scheme == base["v"].scheme
    laws.assert_close(trained.array(), full["v"], 1e-2)
    with refused(ValueError, "merge", "v", f"{full['v'].size} of"):
        jlora.merge(base, {"v": jnp.nan * full["v"]}, check=True, requantize=True)


HALF = jnp.asarray(0.5, jnp.bfloat16)
SCALED = {
    "negated": lambda w: -w,
    "by a number": lambda w: w * 0.5,
    "by an array": lambda w: w * HALF,
    "by an array's inverse": lambda w: w / HALF,
}


@pytest.mark.parametrize("name", SCALED)
def test_a_scaled_weight_is_unpacked_next_to_its_product(name):
    """The backward pass keeps its codes, as for a weight that is used as it is."""
    params, x = {"w": normal(128, 64, seed=1).astype(jnp.bfloat16)}, normal(4, 128, seed=2)

    def kept(scale):
        lora = jlora.transform(lambda p, x: x @ scale(p["w"]), jlora.LoRA("w", rank=2))
        base, adapter = lora.init(jax.random.key(0), jlora.quantize(params, jlora.Int4("w")), x)

        def residuals(adapter, base, x):
            return jax.vjp(lambda adapter, x: lora.apply(base, adapter, x), adapter, x)[1]

        shapes = jax.eval_shape(residuals, adapter, base, x.astype(jnp.bfloat16))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    assert kept(SCALED[name]) < kept(lambda w: w) + 64


@pytest.mark.parametrize("scheme", some(SCHEMES, jlora.Int8("w")), ids=str)
def test_a_moved_weight_is_unpacked_next_to_its_product(scheme):
    """The backward pass of a loop reads the codes that are there, and keeps no moved ones."""
    base, x = jlora.quantize({"w": normal(4, 128, 128)}, scheme), normal(4, 128)

    def held(move):
        layer = lambda h, w: (h @ move(w), None)  # noqa: E731
        model = jlora.wrap(lambda p, x: jax.lax.scan(layer, x, p["w"])[0].sum())
        compiled = jax.jit(jax.grad(model, 1)).lower(base, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    least = held(lambda w: w) + min(c.nbytes for c in jax.tree.leaves(base["w"].data)) / 2
    assert held(lambda w: w[::-1]) < least
    assert held(lambda w: w.reshape(8, 16, 128).reshape(128, 128)) < least


@few
def test_no_layers(scheme):
    """What is left of a stack may be empty."""
    base = jlora.quantize({"w": normal(3, 128, 128)}, scheme)
    layers = jlora.wrap(lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"][3:])[0])
    np.testing.assert_array_equal(layers(base, jnp.ones((2, 128))), np.ones((2, 128)))
    assert jlora.wrap(lambda p: p["w"][:0][::-1].sum())(base) == 0


# ------------------------------------------------------------------------------------- memory

LAYERS, DIM, TOKENS = 8, 512, 64
# XLA's CPU compiler of JAX 0.10 joins what a barrier keeps apart, of the model's own remat too.
NEWEST = jax.__version_info__ >= (0, 11)


def memory_cases():
    """Every form, of which all or the first weights are adapted; of Int8 one every day."""
    forms = [f for f in FORMS if NEWEST or "scan" in f]
    for scheme, pattern, form in itertools.product(TWO, (r"w\d?$", r"w0?$"), forms):
        daily = (scheme, pattern, form) == LAST
        yield pytest.param(form, pattern, scheme, marks=[] if daily else pytest.mark.slow)


TWO = [jlora.NF4(r"w\d?"), jlora.Int8(r"w\d?")]
LAST = (TWO[1], r"w0?$", "scan")


@pytest.mark.parametrize(("form", "pattern", "scheme"), list(memory_cases()), ids=str)
def test_one_weight_at_a_time(form, pattern, scheme):
    """Beside what the step holds on a dense base, one weight of the many is unpacked."""
    stack = (LAYERS,) if "scan" in form else ()
    names = ["w"] if stack else [f"w{i}" for i in range(LAYERS)]
    shape = jax.ShapeDtypeStruct((*stack, DIM, DIM), jnp.float32)
    params, x = dict.fromkeys(names, shape), jax.ShapeDtypeStruct((TOKENS, DIM), jnp.float32)
    lora = jlora.transform(FORMS[form], jlora.LoRA(pattern, rank=8))

    def held(params):
        base, adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
        step = jax.jit(jax.value_and_grad(lambda a, b, x: (lora.apply(b, a, x) ** 2).sum()))
        options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        compiled = step.lower(adapter, base, x).compile(options if NEWEST else None)
        return compiled.memory_analysis().temp_size_in_bytes

    one = 4 * DIM * DIM
    assert held(jlora.quantize(params, scheme)) <= held(params) + 1.2 * one
