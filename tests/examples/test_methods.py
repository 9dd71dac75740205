"""`examples/methods`: laws of every method over BERT, RoBERTa and GPT-2, and references by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from methods import METHODS, PREFIXES, adapters, prefixes
from models import bert, gpt, llama, parts

import jlora
from jlora import checkpoint

L, D, VOCAB, AFTER = 2, 16, 50, 7
_SIZES = (VOCAB, D, L, 2, 32, 40)
MODELS = {
    "bert": bert.Bert(bert.Config(*_SIZES, 2, 1e-12), classes=2),
    "roberta": bert.Bert(bert.Config(*_SIZES, 1, 1e-5, "roberta", 1, head="cls"), classes=2),
    "gpt": gpt.GPT(gpt.Config(VOCAB, 40, L, D, 2), scan=False),
}
SIZES = {
    "lora": {"rank": 2},
    "lora_all": {"rank": 2},
    "adapter_h": {"bottleneck": 6},
    "adapter_l": {"bottleneck": 3},
    "pre_embed": {"l_p": 3, "l_i": 2, "after": AFTER},
    "pre_layer": {"l_p": 3, "l_i": 2, "after": AFTER},
    "prompt": {"l_p": 4},
}
ADDED = ["adapter_h", "adapter_l", *PREFIXES]
IDS = np.random.default_rng(0).integers(8, VOCAB, (3, 7))
MASK = (np.arange(7) < np.array([7, 5, 3])[:, None]).astype(np.int32)
IDS[:, 1], IDS[MASK == 0] = AFTER, 1  # RoBERTa's padding
ALL = np.ones_like(MASK)

every = pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            pytest.param(kind, name, marks=pytest.mark.slow if (i + j) % 2 else [])
            for j, kind in enumerate(("bert", "gpt"))
            for i, name in enumerate(METHODS)
        ),
        pytest.param("roberta", "adapter_h", marks=pytest.mark.slow),
        ("roberta", "pre_layer"),
    ],
)
# Those that put no tokens into the text, one of them for every day.
CACHED = [
    name if name == "adapter_l" else pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS
    if name not in PREFIXES
]


def marked(*long):
    """Every method, some in the long run: those whose program no other test of the day needs."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in long else n for n in METHODS]


def rules(kind):
    return () if kind == "gpt" else (jlora.Full("pooler|classifier"),)


def build(kind, name, **sizes):
    return METHODS[name](MODELS[kind], *rules(kind), **SIZES.get(name, {}) | sizes)


@functools.cache
def variables(kind):
    """Weights of a size that lets every part count, none of them at a constant."""

    def middle(path, x):
        return np.full(x.shape, "scale" in jax.tree_util.keystr(path), np.float32)

    return jiggle(jax.tree_util.tree_map_with_path(middle, parts.shapes(MODELS[kind])), 0.2)


def jiggle(tree, by):
    """A tree near by; the noise of a leaf is its own."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(x + by * rng.standard_normal(x.shape), jnp.float32), tree
    )


@functools.cache
def start(kind, name):
    """The method, base and trained as they start."""
    method = build(kind, name)
    return method, *method.init(jax.random.key(2), variables(kind), IDS, MASK)


def moved(kind, name):
    """Base and trained elsewhere."""
    _, base, trained = start(kind, name)
    return base, jiggle(trained, 0.3)


@functools.cache
def compiled(kind, name):
    """(base, trained, ids, mask) to outputs and gradients by what is trained."""
    method, _, _ = start(kind, name)

    def loss(trained, base, ids, mask):
        outputs = method.apply(base, trained, ids, mask)
        return (outputs[0] ** 2).mean(), outputs

    run = jax.jit(jax.grad(loss, has_aux=True))
    return lambda base, trained, ids, mask: run(trained, base, ids, mask)[::-1]


@functools.cache
def plain(kind):
    return jax.jit(MODELS[kind].apply)


# ---- laws ---------------------------------------------------------------------------------------


@every
def test_starts_as_the_model_unless_it_is_a_prefix(kind, name):
    _, base, trained = start(kind, name)
    outputs, _ = compiled(kind, name)(base, trained, IDS, MASK)
    off = np.abs(outputs - plain(kind)(variables(kind), IDS, MASK))[0].max()
    assert off > 1e-2 if name in PREFIXES else off < 1e-5


@every
def test_base_is_the_variables_themselves_and_frozen(kind, name):
    _, base, trained = start(kind, name)
    kept = {k: tree for k, tree in base.items() if k != "added"}
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, kept, variables(kind)))
    mask = jlora.mask(jlora.Params(base, trained))
    assert not any(jax.tree.leaves(mask.base))
    assert all(jax.tree.leaves(mask.adapter))


@every
def test_every_trained_leaf_has_a_gradient(kind, name):
    _, grads = compiled(kind, name)(*moved(kind, name), IDS, MASK)
    paths = jax.tree_util.tree_leaves_with_path(grads)
    assert [jax.tree_util.keystr(p) for p, g in paths if not np.abs(g).max() > 0] == []


@every
def test_what_is_padding_changes_nothing(kind, name):
    other = np.where(MASK > 0, IDS, 20)
    run, (base, trained) = compiled(kind, name), moved(kind, name)
    before, after = (run(base, trained, ids, MASK)[0] for ids in (IDS, other))
    real = MASK > 0 if kind == "gpt" else slice(None)
    np.testing.assert_allclose(before[real], after[real], atol=1e-5)


@pytest.mark.parametrize("name", marked("full", "lora_all", "pre_embed", "prompt", "adapter_h"))
def test_gpt_stays_causal(name):
    other = IDS.copy()
    other[:, 4] = (IDS[:, 4] + 1) % 7 + 20
    run, (base, trained) = compiled("gpt", name), moved("gpt", name)
    before, after = (run(base, trained, ids, ALL)[0] for ids in (IDS, other))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert np.abs(before - after)[:, 4:].max() > 1e-2


@pytest.mark.parametrize("name", marked("lora", "bitfit"))
def test_merges(name):
    base, trained = moved("bert", name)
    params = jlora.merge(base, trained)
    if name in ADDED:
        assert jax.tree.all(jax.tree.map(np.array_equal, params["added"], trained["added"]))
    else:
        expected, _ = compiled("bert", name)(base, trained, IDS, MASK)
        np.testing.assert_allclose(plain("bert")(params, IDS, MASK), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["adapter_l", "pre_layer", "prompt"])
def test_draws_by_the_key(name):
    method, _, trained = start("gpt", name)
    _, again = method.init(jax.random.key(2), variables("gpt"), IDS)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, trained))
    _, other = method.init(jax.random.key(3), variables("gpt"), IDS)
    assert not jax.tree.all(jax.tree.map(np.array_equal, other, trained))


@pytest.mark.parametrize("name", marked("full", "bitfit", "adapter_l", "pre_embed"))
def test_init_and_apply_need_shapes_alone(name):
    model = MODELS["bert"].clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    method = METHODS[name](model, **SIZES.get(name, {}))
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), variables("bert"))
    init = functools.partial(method.init, jax.random.key(0))
    base, trained = jax.eval_shape(lambda v: init(v, IDS, MASK), narrow)
    assert jax.eval_shape(method.apply, base, trained, IDS, MASK).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["adapter_h", pytest.param("pre_layer", marks=pytest.mark.slow)])
def test_same_with_layers_computed_again(name):
    method = METHODS[name](MODELS["gpt"].clone(remat=True), **SIZES[name])
    base, trained = moved("gpt", name)
    got = jax.jit(jax.grad(lambda t: (method.apply(base, t, IDS, MASK)[0] ** 2).mean()))(trained)
    _, expected = compiled("gpt", name)(base, trained, IDS, MASK)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), got, expected)


@pytest.mark.parametrize("name", ["adapter_h", pytest.param("lora", marks=pytest.mark.slow)])
def test_takes_dropout_of_the_model(name):
    method, base, trained = start("gpt", name)
    fn = jax.jit(lambda key: method.apply(base, trained, IDS, MASK, rngs={"dropout": key}))
    assert np.abs(fn(jax.random.key(0)) - fn(jax.random.key(1))).max() > 1e-2


def test_lora_takes_dropout_of_the_adapter():
    method = build("gpt", "lora", dropout=0.5)
    base, trained = method.init(jax.random.key(2), variables("gpt"), IDS)
    trained = jiggle(trained, 0.3)
    fn = jax.jit(lambda key: method.apply(base, jlora.dropout(trained, key), IDS, MASK))
    assert np.abs(fn(jax.random.key(0)) - fn(jax.random.key(1))).max() > 1e-2


def test_saves_and_restores(tmp_path):
    base, trained = moved("bert", "adapter_l")
    used = (jlora.Full("^added"), *rules("bert"))
    checkpoint.save(tmp_path / "adapter", trained, used, step=1, base=base)
    restored = checkpoint.restore(tmp_path / "adapter", like=trained, base=base)
    jax.tree.map(np.testing.assert_array_equal, restored, trained)


# ---- counts -------------------------------------------------------------------------------------


def trained_beside_head(kind, name):
    """Parameters that the method trains besides the head."""
    _, _, trained = start(kind, name)
    params = variables(kind)["params"]
    heads = (params[part] for part in ("pooler", "classifier") if part in params)
    return jlora.count(trained) - sum(map(jlora.count, heads))


@pytest.mark.parametrize("kind", ["bert", "gpt"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter_h", adapters.count(2 * L, 0, D, 6)),
        ("adapter_l", adapters.count(L, L, D, 3)),
        ("pre_embed", prefixes.count(1, D, 3, 2)),
        ("pre_layer", prefixes.count(L, D, 3, 2)),
        ("prompt", prefixes.count(1, D, 4, 0)),
        ("lora", 4 * L * D * 2),
    ],
)
def test_trees_have_as_many_parameters_as_the_formula(kind, name, expected):
    assert trained_beside_head(kind, name) == expected


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_full_bitfit_and_all_linear_have_as_many_as_the_model(kind):
    _, _, everything = start(kind, "full")
    assert jlora.count(everything) == jlora.count(variables(kind)["params"])
    inner = MODELS[kind].config.inner or 4 * D if kind == "gpt" else 32
    biases = 4 * D + inner + D + 2 * D  # q, k, v, o; up; down; two norms
    assert trained_beside_head(kind, "bitfit") == L * biases + D  # and the norm outside the layers
    qkv = D + 3 * D if kind == "gpt" else 3 * 2 * D  # one fused kernel, or three
    assert trained_beside_head(kind, "lora_all") == L * 2 * (qkv + 2 * D + 2 * (D + inner))


@pytest.mark.parametrize(
    ("count", "millions"),
    [
        (adapters.count(24, 24, 1024, 6), 0.37),  # GPT-2 medium, AdapterL
        (adapters.count(24, 24, 1024, 224), 11.09),
        (adapters.count(2 * 96, 0, 12288, 1), 7.1),  # GPT-3, AdapterH
        (adapters.count(2 * 96, 0, 12288, 8), 40.1),
        (adapters.count(2 * 96, 0, 12288, 64), 304.4),
        (prefixes.count(1, 12288, 256, 8), 3.2),  # GPT-3, PreEmbed
    ],
)
def test_formulas_give_what_the_paper_prints(count, millions):
    digits = len(str(millions).partition(".")[2])
    assert round(count / 1e6, digits) == millions


# ---- references by hand -------------------------------------------------------------------------


def test_perceptron():
    rng = np.random.default_rng(0)
    x, down, up = rng.normal(size=(2, 5, 4)), rng.normal(size=(4, 3)), rng.normal(size=(3, 4))
    scale, shift = rng.normal(size=(2, 4))
    p = {"down": {"kernel": down, "bias": np.ones(3)}, "up": {"kernel": up, "bias": np.ones(4)}}
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + adapters.EPSILON)
    for p_, y_ in ((p, x), (p | {"norm": {"scale": scale, "bias": shift}}, y * scale + shift)):
        expected = x + np.maximum(y_ @ down + 1, 0) @ up + 1
        got = adapters.perceptron(jax.tree.map(jnp.float32, p_), jnp.float32(x))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_adapter_h_adds_where_the_projections_add_their_biases(kind):
    _, base, trained = start(kind, "adapter_h")
    params, added = variables(kind)["params"], {}
    stack = params["encoder"] if kind != "gpt" else params
    shifted, prefix = {}, "h" if kind == "gpt" else "layer"
    for i in range(L):
        block, of = stack[f"{prefix}_{i}"], trained["added"][f"layer_{i}"]
        bias = {part: 0.1 * (i + 1) * np.arange(D) * s for part, s in zip(of, (1, -1), strict=True)}
        added[f"layer_{i}"] = {
            part: p | {"up": {"kernel": p["up"]["kernel"], "bias": jnp.float32(bias[part])}}
            for part, p in of.items()
        }
        places = {
            "attention": ("attn", "c_proj") if kind == "gpt" else ("attention", "out"),
            "mlp": ("mlp", "c_proj") if kind == "gpt" else ("down",),
        }
        for part, place in places.items():
            block = plus(block, (*place, "bias"), bias[part])
        shifted[f"{prefix}_{i}"] = block
    shifted = {**stack, **shifted}
    shifted = shifted if kind == "gpt" else {**params, "encoder": shifted}
    got, _ = compiled(kind, "adapter_h")(base, {**trained, "added": added}, IDS, MASK)
    np.testing.assert_allclose(got, plain(kind)({"params": shifted}, IDS, MASK), atol=2e-5)


def plus(tree, path, value):
    """The tree with `value` added to the leaf at `path`."""
    if not path:
        return tree + value
    return {**tree, path[0]: plus(tree[path[0]], path[1:], value)}


def by_hand(kind, trained, between):
    """The model's outputs where `between(i, block, x)` is a layer; `block(x, mask)` is its own."""
    model, params = MODELS[kind], {**variables(kind)["params"], **trained.get("params", {})}
    options = {"config": model.config, "dtype": jnp.float32, "param_dtype": jnp.float32}
    if kind == "gpt":
        layer, layers = gpt.Block(**options), [params[f"h_{i}"] for i in range(L)]
        x = params["wte"]["embedding"][IDS] + params["wpe"]["embedding"][np.arange(7)]
    else:
        layer, layers = bert.Layer(**options), [params["encoder"][f"layer_{i}"] for i in range(L)]
        embeddings = bert.Embeddings(**options)
        x = embeddings.apply({"params": params["embeddings"]}, IDS, np.zeros_like(IDS))
    for i in range(L):

        def block(x, mask, i=i):
            own = {"params": layers[i]}
            if kind == "gpt":  # which has no cache here
                return layer.apply(own, x, None, mask[:, None, None].astype(bool), None)[0]
            return layer.apply(own, x, mask)[0]

        x = between(i, block, x)
    if kind == "gpt":
        x = nn.LayerNorm(1e-5).apply({"params": params["ln_f"]}, x)
        return x @ params["wte"]["embedding"].T
    x = nn.LayerNorm(use_bias=False, use_scale=False).apply({}, bert.pool(x, MASK))
    return x @ params["classifier"]["kernel"] + params["classifier"]["bias"]


@pytest.mark.parametrize("name", CACHED)
def test_gpt_with_a_cache(name):
    """Texts are written as the method changes the model."""
    method, base, trained = start("gpt", name)[0], *moved("gpt", name)
    apply = jax.jit(method.apply)
    logits, cache = apply(base, trained, IDS[:, :4], cache=MODELS["gpt"].config.cache(3, 7))
    again, _ = apply(base, trained, IDS[:, 4:], cache=cache)
    whole = compiled("gpt", name)(base, trained, IDS, ALL)[0]
    np.testing.assert_allclose(np.concatenate([logits, again], 1), whole, atol=3e-5)


def check_by_hand(kind, name, between):
    """`between(i, block, x, added)` has the added parameters of its layer too."""
    base, trained = moved(kind, name)
    added = trained["added"]
    rest = {k: tree for k, tree in trained.items() if k != "added"}

    @jax.jit
    def expected(rest, added):
        return by_hand(kind, rest, lambda i, *args: between(*args, added[f"layer_{i}"]))

    got, _ = compiled(kind, name)(base, trained, IDS, MASK)
    np.testing.assert_allclose(got, expected(rest, added), atol=3e-5)


def test_adapter_l_norm_in_bfloat16():
    """Computed in float32: of features with a mean, the square of the mean would drown the rest."""
    x = 3 + 0.3 * jax.random.normal(jax.random.key(0), (4, 64))
    names = {"kernel": jnp.eye(64), "bias": jnp.full(64, 9.0)}  # so that relu cuts nothing
    p = {"norm": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}, "down": names, "up": names}
    small = x.astype(jnp.bfloat16)
    perceptron = jax.jit(adapters.perceptron)
    actual = perceptron(p, small).astype(jnp.float32)
    expected = perceptron(p, small.astype(jnp.float32))
    np.testing.assert_allclose(actual, expected, atol=0.15)  # of 20


@pytest.mark.parametrize("kind", [pytest.param("bert", marks=pytest.mark.slow), "gpt"])
def test_adapter_l_follows_each_layer(kind):
    def between(block, x, added):
        return adapters.perceptron(added["layer"], block(x, MASK))

    check_by_hand(kind, "adapter_l", between)


def test_pre_layer_replaces_the_inputs_of_each_layer_of_bert():
    def between(block, x, added):
        vectors = jnp.broadcast_to(added, (3, 5, D))
        mask = np.concatenate([ALL[:, :5], MASK], 1)
        return block(jnp.concatenate([vectors, x], 1), mask)[:, 5:]

    check_by_hand("bert", "pre_layer", between)


def test_pre_layer_replaces_the_inputs_of_each_layer_of_gpt():
    def between(block, x, added):  # the infix follows the second token of every row
        vectors = jnp.broadcast_to(added, (3, 5, D))
        x = jnp.concatenate([vectors[:, :3], x[:, :2], vectors[:, 3:], x[:, 2:]], 1)
        mask = np.concatenate([ALL[:, :5], MASK], 1)  # all are tokens up to the infix
        y = block(x, mask)
        return jnp.concatenate([y[:, 3:5], y[:, 7:]], 1)

    check_by_hand("gpt", "pre_layer", between)


def test_pre_embed_is_more_words_in_the_vocabulary_of_gpt():
    ends = (2, 4, 7)  # after which token of each row the infix is
    ids = IDS.copy()
    ids[:, 1] = 9
    for row, end in enumerate(ends[:2]):
        ids[row, end - 1] = AFTER
    base, trained = moved("gpt", "pre_embed")
    vectors, params = trained["added"]["layer_0"], variables("gpt")["params"]
    words = vectors - params["wpe"]["embedding"][0]
    table = jnp.concatenate([params["wte"]["embedding"], words])
    places, longer, positions = [], [], []
    for row, end in enumerate(ends):
        tokens = [*range(VOCAB, VOCAB + 3), *ids[row, :end], VOCAB + 3, VOCAB + 4, *ids[row, end:]]
        longer.append(tokens)
        places.append([*range(3, 3 + end), *range(5 + end, 12)])
        at = np.zeros(12, int)
        at[places[-1]] = range(7)
        positions.append(at)
    model = MODELS["gpt"].clone(config=gpt.Config(VOCAB + 5, 40, L, D, 2))
    more = {"params": {**params, "wte": {"embedding": table}}}
    logits = jax.jit(model.apply)(more, np.array(longer), None, np.array(positions))[..., :VOCAB]
    expected = np.take_along_axis(np.asarray(logits), np.array(places)[..., None], 1)
    got, _ = compiled("gpt", "pre_embed")(base, trained, ids, ALL)
    np.testing.assert_allclose(got, expected, atol=3e-5)


def test_infix_is_seen_by_what_follows_it_alone():
    run, (base, trained) = compiled("gpt", "pre_embed"), moved("gpt", "pre_embed")
    other = {"added": {"layer_0": trained["added"]["layer_0"].at[3:].multiply(-1)}}
    after, before = (run(base, t, IDS, ALL)[0] for t in (other, trained))
    off = np.abs(after - before).max(-1)  # (B, L)
    assert off[:, :2].max() < 1e-5
    assert off[:, 2:].min() > 1e-3


def test_prompt_starts_as_words():
    method = build("gpt", "prompt", tokens=(5, 6, 7, 8))
    _, trained = method.init(jax.random.key(0), variables("gpt"), IDS)
    params = variables("gpt")["params"]
    expected = params["wte"]["embedding"][5:9] + params["wpe"]["embedding"][:4]
    np.testing.assert_allclose(trained["added"]["layer_0"], expected, atol=1e-6)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADDED)
def test_refuses_scanned_layers_and_other_models(name):
    with pytest.raises(ValueError, match=r"got scan=True\. Load the variables and build the model"):
        METHODS[name](gpt.GPT(gpt.Config()))
    other = llama.Llama(llama.SIZES["smollm2-135m"])
    with pytest.raises(TypeError, match=r"must be a bert\.Bert or gpt\.GPT; got a Decoder"):
        METHODS[name](other)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pre_embed", {"l_p": 0}, "one of them at least 1; got 0 and 0"),
        ("pre_layer", {"l_p": -1, "l_i": 2}, "one of them at least 1; got -1 and 2"),
        ("pre_embed", {"l_i": 2}, "`after` must be the token id that the `l_i` = 2 infix tokens"),
        ("prompt", {"tokens": (1, 2)}, "`tokens` must be `l_p` = 20 token ids; got 2"),
    ],
)
def test_refuses_sizes_that_would_do_nothing(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        METHODS[name](MODELS["gpt"], **options)
