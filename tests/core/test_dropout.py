"""Dropout on the low-rank path: `jlora.dropout` and the rule's `dropout`.

For a model that is linear in its weight and in its input, y = f(W, x) + f(ΔW, drop(x)), so over the
keys the mean of y is f(W + ΔW, x) and its variance is p / (1 - p) · f(ΔW², x²), whatever f is. For
any model, an input that is dropped has no part in the gradient of A, so that the rows of that
gradient that are zero show the mask.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from jax import lax
from laws import assert_close
from messages import refused
from small import as_jax, every, raw, set_up, some

import jlora
from jlora import many
from jlora.extend import RANK, Delta, Factor
from jlora.many._route import FORMS

KEY = jax.random.key(7)


def draw(seed: int, *shape: int) -> jax.Array:
    """Numbers between 1/2 and 3/2 of either sign: none so small that it could look like zero."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], shape)
    return as_jax(signs * rng.uniform(0.5, 1.5, shape), np.float32)


random = functools.partial(laws.start, of_b=0.5)  # a B that is not zero


def adapt(apply: Any, params: Any, x: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Transform, base and adapter of all sites."""
    rule = jlora.LoRA(**{"pattern": ".*", "rank": 2, "dropout": 0.25, "init": random} | options)
    return set_up(apply, rule, params, x)


# ----------------------------------------------------------------------- one linear use of W


def conv(w: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """A convolution, channels last."""
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, **options)


IDS = jnp.array([[3, 0, 6], [3, 3, 2]])
GROUPS = jnp.array([2, 0, 5], jnp.int32)
EXPERT = jnp.array([2, 0, 2, 1])

# f(W, x), the shape of W, and x.
LINEAR: dict[str, tuple[Any, tuple[int, ...], jax.Array]] = {
    "dense": (lambda w, x: x @ w, (6, 5), draw(0, 3, 6)),
    "left": (lambda w, x: w @ x, (5, 6), draw(0, 6, 3)),
    "heads": (lambda w, x: jnp.einsum("bhk,hkd->bd", x, w), (2, 3, 5), draw(0, 4, 2, 3)),
    "conv_grouped": (lambda w, x: conv(w, x, feature_group_count=2), (3, 2, 6), draw(0, 2, 6, 4)),
    "embed": (lambda w, x: w[IDS] * x, (7, 4), draw(0, 2, 3, 1)),
    "one_hot": (lambda w, x: jax.nn.one_hot(IDS, 7) @ w * x, (7, 4), draw(0, 2, 3, 1)),
    "experts_mapped": (jax.vmap(lambda w, x: x @ w), (3, 6, 5), draw(0, 3, 2, 6)),
    "experts_that_share": (
        *(lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), (3, 6, 5)),
        draw(0, 3, 2, 6),
    ),
    "experts_ragged": (lambda w, x: lax.ragged_dot(x, w, GROUPS), (3, 6, 5), draw(0, 7, 6)),
    "experts_gathered": (
        lambda w, x: jnp.einsum("ti,tio->to", x, w[EXPERT]),
        (3, 6, 5),
        draw(0, 4, 6),
    ),
    "map": (lambda w, x: lax.map(lambda wx: wx[1] @ wx[0], (w, x)), (3, 6, 5), draw(0, 3, 2, 6)),
    "fused": (lambda w, x: jnp.concatenate(jnp.split(x @ w, 3, -1)), (6, 6), draw(0, 3, 6)),
}


def linear(name: str, **options: Any) -> tuple[Any, Any, Any, jax.Array]:
    """Transform, base, adapter and input of an entry of `LINEAR`."""
    f, shape, x = LINEAR[name]
    if name == "fused":
        options["slots"] = jlora.Slots(3, (0, 2))
    if name == "experts_that_share":
        options["share"] = "outputs"
    return *adapt(lambda p, x: f(p["w"], x), {"w": draw(1, *shape)}, x, **options), x


def over_keys(name: str, f: Any, keys: jax.Array) -> Any:
    """`f` at each of `keys`; JAX cannot map a ragged product."""
    return lax.map(f, keys) if name == "experts_ragged" else jax.vmap(f)(keys)


def one_of(*daily: str) -> Any:
    """Entries of `LINEAR`, of which some run every day."""
    return pytest.mark.parametrize("name", some(LINEAR, *daily))


@one_of("embed")
def test_mean_and_variance_over_keys(name: str) -> None:
    """The mean is the output without dropout; the variance is that of one coin for each input.

    The bounds are six standard errors of 2000 keys; the variance of a weighted sum of coins with
    p = 1/4 has a kurtosis below 3.
    """
    n, p = 2000, 0.25
    lora, base, adapter, x = linear(name, dropout=p)
    at = lambda key: lora.apply(base, jlora.dropout(adapter, key), x)  # noqa: E731
    ys = jax.jit(lambda keys: over_keys(name, at, keys))(jax.random.split(KEY, n))
    expected = np.asarray(lora.apply(base, adapter, x), np.float64)
    delta = jlora.merge(jax.tree.map(jnp.zeros_like, base), adapter)["w"]
    variance = np.asarray(p / (1 - p) * LINEAR[name][0](delta**2, x**2), np.float64)
    error = np.abs(np.mean(np.asarray(ys, np.float64), 0) - expected)
    assert np.all(error <= 6 * np.sqrt(variance / n) + 1e-4)
    actual = np.var(np.asarray(ys, np.float64), 0)
    assert np.all(np.abs(actual - variance) <= 6 * np.sqrt(2 / n) * variance + 1e-6)


@one_of("dense")
def test_one_key_is_one_mask(name: str) -> None:
    """Compiled, computed again in the backward pass, or mapped over keys; none without a key."""
    lora, base, adapter, x = linear(name, dropout=0.5)
    plain, _, same, _ = linear(name, dropout=0.0)
    assert raw(same) == raw(adapter)

    def output(adapter: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return lora.apply(base, jlora.dropout(adapter, key), x)

    def loss(f: Any) -> Any:
        return jax.value_and_grad(lambda a, x, k: (jnp.tanh(f(a, x, k)) ** 2).sum(), (0, 1))

    keys = jnp.stack([jax.random.key(8), KEY])

    @jax.jit
    def others(adapter: Any, x: jax.Array) -> tuple[Any, ...]:
        at = lambda key: loss(output)(adapter, x, key)  # noqa: E731
        _, scanned = lax.scan(lambda _, key: (None, at(key)), None, keys)
        last = [jax.tree.map(lambda v: v[1], tree) for tree in (over_keys(name, at, keys), scanned)]
        outputs = lora.apply(base, adapter, x), plain.apply(base, same, x), output(adapter, x, KEY)
        return outputs, [at(KEY), loss(jax.checkpoint(output))(adapter, x, KEY), *last]

    expected = loss(output)(adapter, x, KEY)
    (off, without, on), found = others(adapter, x)
    for actual in found:
        assert_close(actual, expected, 1e-5)
    assert_close(off, without, 1e-6)
    assert raw(on) != raw(off)


def test_gradients_of_dropped_inputs_are_zero() -> None:
    """Those of A and, through ΔW, of x; what is kept has gradients as for x / (1 - p)."""
    f, x = (lambda params, x: x @ params["w"]), draw(0, 1, 64)
    lora, base, adapter = adapt(f, {"w": draw(1, 64, 8)}, x, dropout=0.5)
    noisy = jlora.dropout(adapter, KEY)

    def loss(a: jax.Array, b: jax.Array, x: jax.Array, node: Any) -> jax.Array:
        return (lora.apply(base, {"w": node._replace(a=a, b=b)}, x) * jnp.arange(1.0, 9)).sum()

    site = noisy["w"]
    slope = jax.jit(jax.grad(loss, (0, 1, 2)))
    da, db, dx = slope(site.a, site.b, x, site)
    dropped = ~np.any(da, axis=1)
    assert 0 < dropped.sum() < 64
    kept = jnp.asarray(np.where(dropped, 0.0, 2 * x), jnp.float32)
    ea, eb, ex = slope(site.a, site.b, kept, adapter["w"])
    assert_close((da, db), (np.where(dropped[:, None], np.float32(0), ea), np.asarray(eb)), 1e-5)
    of_base = np.asarray(base["w"]) @ np.arange(1.0, 9)
    assert_close(dx, np.float32(np.where(dropped, of_base, of_base + 2 * (ex - of_base))), 1e-5)


# --------------------------------------------------------------------------- masks of a model


ONE = draw(3, 1, 64)
LAYERS = {"up": draw(5, 3, 64, 64) / 8, "down": draw(6, 3, 64, 64) / 8}


def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
    """A residual layer of two products of 64 inputs each."""
    return x + jnp.tanh(x @ p["up"]) @ p["down"], None


@functools.cache
def model(axis: int = 0, pattern: str | None = None, layer: Any = layer) -> tuple[Any, Any, Any]:
    """Transform, base and adapter of three scanned layers, stacked along `axis`, under a head."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        layers = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), params["layers"])
        return lax.scan(layer, x, layers)[0] @ params["head"]

    layers = {name: as_jax(np.moveaxis(w, 0, axis)) for name, w in LAYERS.items()}
    params = {"layers": layers, "head": draw(7, 64, 5)}
    return adapt(apply, params, ONE, pattern=pattern, dropout=0.5)


@functools.cache
def compiled_gradient(lora: jlora.types.Transformed) -> Any:
    """The gradient of a loss with dropout with respect to the adapter, compiled once."""

    def loss(adapter: Any, base: Any, key: jax.Array) -> jax.Array:
        return (lora.apply(base, jlora.dropout(adapter, key), ONE) ** 2).sum()

    return jax.jit(jax.grad(loss))


def gradient(lora: jlora.types.Transformed, base: Any, adapter: Any, key: jax.Array) -> Any:
    """That gradient."""
    return compiled_gradient(lora)(adapter, base, key)


def masks(slope: Any) -> dict[str, np.ndarray]:
    """The inputs that each product kept, for a batch of one: by site, and layer if stacked."""
    found = {"head": ~np.all(slope["head"].a == 0, -1)}
    for name in LAYERS:
        a = np.asarray(slope["layers"][name].a)
        found |= {f"{name}{i}": np.any(a[i] != 0, axis=-1) for i in range(3)}
    return found


@pytest.mark.parametrize("axis", some([0, 1, -1], 0))
def test_masks_differ_by_site_layer_and_key(axis: int) -> None:
    """Seven products, seven masks, of which any two agree at about half of the inputs."""
    at = model(axis=axis)
    first = gradient(*at, KEY)
    assert raw(first) == raw(gradient(*at, KEY))
    found, others = masks(first), masks(gradient(*at, jax.random.key(2)))
    assert len(found) == 7
    for name, mask in found.items():
        assert 12 < mask.sum() < 52, name
        assert np.any(mask != others[name]), name
        for other, theirs in found.items():
            assert name == other or 8 < np.sum(mask == theirs) < 56, (name, other)


@pytest.mark.parametrize("policy", some([None, "dots_saveable", "nothing_saveable"], None))
def test_remat_computes_the_same_mask_again(policy: str | None) -> None:
    """A rematerialized model has the gradient of the plain one, whatever is saved.

    Also of a rule for one site: it draws the same whatever other rules there are.
    """
    kept = policy and getattr(jax.checkpoint_policies, policy)
    remat = jax.checkpoint(layer, policy=kept, prevent_cse=False)
    whole = gradient(*model(), KEY)
    few = gradient(*model(pattern="up", layer=remat), KEY)["layers"]["up"].a
    up = whole["layers"]["up"].a
    assert np.array_equal(np.any(few != 0, -1), np.any(up != 0, -1))
    actual = gradient(*model(layer=remat), KEY)
    assert_close(actual, whole, 1e-5)
    pairs = zip(masks(actual).values(), masks(whole).values(), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)


def _twice(f: Any) -> Any:
    """The outputs of two calls of `f` of one weight and one input."""
    return lambda w, x: jnp.stack([f(w, x), f(w, x)])


def _dot(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w


def _in_while(w: jax.Array, x: jax.Array) -> jax.Array:
    def body(state: Any) -> Any:
        i, ys = state
        return i + 1, ys.at[i].set(x @ w)

    return lax.while_loop(lambda s: s[0] < 3, body, (0, jnp.zeros((3, 1, 64))))[1]


# Several uses of one weight, each with the same input.
USES: dict[str, Any] = {
    "twice": _twice(_dot),
    "jit": _twice(jax.jit(_dot)),
    "nested": _twice(jax.jit(_twice(jax.jit(_dot)))),
    "checkpoint": _twice(jax.checkpoint(_dot)),
    "casts": _twice(lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(x.dtype)),
    "cast once": lambda w, x: _twice(_dot)(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)),
    "tied": lambda w, x: jnp.stack([w[jnp.arange(64)].sum(0)[None], jnp.ones((1, 64)) @ w]),
    "scan": lambda w, x: lax.scan(lambda _, i: (None, x @ w), None, jnp.arange(3))[1],
    "sliced": lambda w, x: lax.map(lambda w: x @ w, jnp.broadcast_to(w, (3, 64, 64))),
    "carried": lambda w, x: lax.scan(lambda w, i: (w, x @ w), w, jnp.arange(3))[1],
    "layers": lambda w, x: lax.scan(lambda _, i: (None, _twice(_dot)(w, x)), None, jnp.arange(2))[
        1
    ],
    "while": _in_while,
}


@pytest.mark.parametrize("name", some([*USES], "tied", "while"))
def test_each_use_has_its_own_mask(name: str) -> None:
    """So says JAX's checker of keys too; without a key all uses are alike."""
    x, w = draw(3, 1, 64), {"w": draw(4, 64, 64)}
    lora, base, adapter = adapt(lambda p, x: USES[name](p["w"], x), w, x, dropout=0.5)
    noisy = jlora.dropout(adapter, KEY)
    plain, eager = lora.apply(base, adapter, x), lora.apply(base, noisy, x)
    with jax.debug_key_reuse(True):
        found = jax.jit(lora.apply)(base, noisy, x)
    assert_close(found, eager, 1e-2 if "cast" in name else 1e-5)
    delta = np.asarray(found - plain, np.float32).reshape(-1, 64)
    same = [np.abs(a - b).max() < 1e-2 for a, b in itertools.combinations(delta, 2)]
    assert len(delta) >= 2 and not any(same)
    if name != "while":
        f = lambda a: lora.apply(base, jlora.dropout(a, KEY), x).astype(jnp.float32)  # noqa: E731
        slopes = [jax.grad(lambda a, g=g: laws.scalar(g(a))) for g in (f, jax.checkpoint(f))]
        slope, again = jax.jit(lambda a: [g(a) for g in slopes])(adapter)
        assert_close(again, slope, 1e-2 if "cast" in name else 1e-5)


def scanned() -> Any:
    """Transform, base, adapter and input of the model of layers."""
    return *model(), ONE


# A table that is routed, and the same as one whose slots are their adapters.
TABLES: dict[str, Any] = {
    "one key": lambda table: (jlora.dropout(table, KEY),) * 2,
    "a key for each slot": lambda table: (
        (jax.vmap(jlora.dropout)(table, jax.random.split(KEY, 3)),) * 2
    ),
    "prepared": lambda table: (
        jlora.dropout(many.prepare(table), KEY),
        jlora.dropout(table, KEY),
    ),
}


@pytest.mark.parametrize(
    ("name", "how", "form"),
    every(
        [*LINEAR, "scanned"],
        TABLES,
        FORMS,
        daily=[
            ("scanned", "prepared", "gathered"),
            ("dense", "a key for each slot", "side by side"),
            ("experts_ragged", "one key", "gathered"),
        ],
    ),
)
def test_each_row_of_a_table_has_its_own_mask(name: str, how: str, form: str) -> None:
    """By the keys of its slot: the first row of a slot as alone, whatever other rows there are."""
    lora, base, adapter, x = scanned() if name == "scanned" else linear(name, dropout=0.5)
    adapters = [jax.tree.map(lambda v, i=i: v * (1 + i), adapter) for i in range(3)]
    routed_table, table = TABLES[how](many.stack(adapters))

    def apply(base: Any, adapter: Any, x: jax.Array) -> jax.Array:
        return lora.apply(base, adapter, x[0])[None]

    @jax.jit
    def rows(*ids: Any) -> list[jax.Array]:
        route = many.route(apply, form=form)
        each = [route(base, routed_table, i, jnp.stack([x] * len(i))) for i in ids]
        return [*each, *(lora.apply(base, many.take(table, i), x) for i in (0, 2))]

    y, of_two, first, third = rows(jnp.array([2, 0, 2, -1, 0]), jnp.array([2, 2]))
    assert_close((y[1], y[0]), (first, third), 1e-5)
    assert_close((y[0], y[2]), (*of_two,), 1e-6)
    assert_close(y[3], lora.apply(base, {}, x), 1e-5)
    for one, other in ((0, 2), (1, 4)):
        assert np.abs(y[one] - y[other]).max() > 1e-2


def test_runs_of_rows_have_the_masks_of_a_batch() -> None:
    lora, base, adapter, x = linear("dense", dropout=0.5)
    noisy = jlora.dropout(many.stack([adapter, adapter]), KEY)
    ids = np.array([1, 1, 1, 0, 0, 0])
    routed = many.route(lora.apply)(base, noisy, ids, jnp.concatenate([x, x]))
    expected = [lora.apply(base, many.take(noisy, i), x) for i in (1, 0)]
    assert_close(routed, jnp.concatenate(expected), 1e-5)


def test_low_precision_keeps_the_mean() -> None:
    """1 - p rounds to another number in bfloat16."""
    factors = (Factor(jnp.ones(shape), (RANK,)) for shape in [1, 1])
    delta = Delta(*factors, 1.0, key=Factor(KEY, ()), dropout=0.1)
    x = draw(3, 4096).astype(jnp.bfloat16)
    dropped = np.asarray(delta.drop(x), np.float64)
    kept = dropped != 0
    mean = np.abs(dropped).sum() / np.abs(np.asarray(x, np.float64))[kept].sum()
    assert mean == pytest.approx(1 / 0.9, rel=2e-4)


@pytest.mark.parametrize("dtype", ["int8", "bool", "bfloat16"])
def test_inputs_of_any_dtype(dtype: str) -> None:
    """Entries of integers too are dropped and rescaled in the dtype of the product."""
    apply = lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))  # noqa: E731
    lora, base, adapter = adapt(apply, {"w": draw(4, 64, 5)}, ONE, dropout=0.5)
    noisy, x = jlora.dropout(adapter, KEY), jnp.ones((3, 64))
    expected = lora.apply(base, noisy, x)
    assert_close(lora.apply(base, noisy, x.astype(dtype)), expected, 1e-5)


# -------------------------------------------------------------------------------- keys and trees


def test_raw_and_typed_keys_are_one() -> None:
    """`jax.random.PRNGKey` and `jax.random.key` of a seed give the same keys, of each kind."""
    adapter = model()[2]
    for impl in ("threefry2x32", "rbg"):
        with jax.default_prng_impl(impl):
            typed, old = (
                jlora.dropout(adapter, f(3)) for f in (jax.random.key, jax.random.PRNGKey)
            )
        data = lambda x: x if x.dtype == jnp.float32 else jax.random.key_data(x)  # noqa: E731
        assert raw(jax.tree.map(data, typed)) == raw(jax.tree.map(data, old))


def test_sites_without_dropout_get_no_key() -> None:
    """A rule with `dropout=0`, and leaves trained in full, stay as they are."""
    rules = (jlora.LoRA("w", rank=1, dropout=0.5), jlora.LoRA("v", rank=1), jlora.Full("b"))
    lora = jlora.transform(lambda p, x: x @ p["w"] @ p["v"] + p["b"], *rules)
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4)), "b": jnp.ones(4)}
    _, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
    noisy = jlora.dropout(adapter, KEY)
    assert noisy["b"] is adapter["b"]
    assert noisy["v"] is adapter["v"]
    assert noisy["w"].a is adapter["w"].a
    assert noisy["w"].key.shape == ()
    assert jax.tree.structure(noisy) != jax.tree.structure(adapter)


def test_merge_ignores_keys() -> None:
    """Export after a training step is that of the adapter itself; each layer has a key."""
    _, base, adapter = model()
    noisy = jlora.dropout(adapter, KEY)
    assert (noisy["layers"]["up"].key.shape, noisy["head"].key.shape) == ((3,), ())
    for f in (jlora.merge, jlora.unmerge):
        assert raw(f(base, noisy)) == raw(f(base, adapter))
    assert jlora.count(noisy) == jlora.count(adapter)
    assert jlora.summary(base, noisy) == jlora.summary(base, adapter)


def test_keys_are_not_trained() -> None:
    """Labels call them base; an optimizer keeps nothing for them."""
    _, base, adapter = model()
    noisy = jlora.dropout(adapter, KEY)
    for tree in (noisy, jlora.Params(base, noisy)):
        labels = jlora.labels(tree)
        assert jax.tree.structure(labels) == jax.tree.structure(tree)
        tx = jlora.optimizer(optax.chain(optax.adamw(1e-2), jlora.lora_plus(4)))
        shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, tree)) if x.ndim]
        assert sorted(shapes) == sorted(2 * [x.shape for x in jax.tree.leaves(adapter)])
    site = jlora.labels(noisy)["head"]
    assert (site.a, site.b, site.key) == ("a", "b", "base")


def test_a_row_is_dropped_as_a_whole() -> None:
    """Where the model looks up a single row, and not for a product, its ΔW is one input."""
    f, x = (lambda params, x: jnp.sin(params["w"][3]) + x), draw(0, 4)
    weight = {"w": draw(1, 7, 4)}
    lora, base, adapter = adapt(f, weight, x, dropout=0.75, materialize=True)
    delta = jlora.merge(jax.tree.map(jnp.zeros_like, base), adapter)["w"][3]
    either = [jnp.sin(base["w"][3] + n * delta) + x for n in (0, 4)]
    found = [lora.apply(base, jlora.dropout(adapter, key), x) for key in jax.random.split(KEY, 16)]
    which = [min((0, 1), key=lambda i, y=y: float(jnp.abs(y - either[i]).max())) for y in found]
    assert {*which} == {0, 1}
    for y, i in zip(found, which, strict=True):
        assert_close(y, either[i], 1e-5)


def test_no_dropout_where_the_weight_is_formed() -> None:
    """There W + ΔW has no input to drop: refused by `init`, not silently left out."""
    # One column of W has one entry of B, but as many inputs as W.
    with refused(ValueError, "", "dropout has no input to drop where W"):
        adapt(lambda p, x: x * p["w"][:, 0], {"w": draw(1, 4, 2)}, ONE[:, :4], materialize=True)
