"""The decoder of the examples, small: one function however it is computed; its files and texts.

That Llama's is the function that PyTorch computes is in `test_models_interop.py`.
"""

import functools
from dataclasses import replace
from typing import Any

import decoders
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from cases._case import fill
from models import cache, checkpoint, decoder, experts, gpt, rope

import jlora

IDS = np.random.default_rng(0).integers(2, 61, (3, 9)).astype(np.int32)
LENGTHS = np.array([9, 5, 2])


def slow(value: Any) -> Any:
    """A parameter for the long run."""
    return pytest.param(value, marks=pytest.mark.slow)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Relative to the largest value."""
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


# What has every kind of layer, for every day.
ONE = [name if name == "gemma3" else slow(name) for name in decoders.CONFIGS]


# ---- one function -------------------------------------------------------------------------------


@functools.cache
def adapted(name: str) -> tuple[Any, ...]:
    """A model with all dense layers adapted and random B: lora, base, adapter, apply, logits."""
    lora = jlora.transform(decoder.Decoder(decoders.CONFIGS[name]).apply, jlora.LoRA(rank=2))
    base, adapter = jax.jit(lora.init)(jax.random.key(0), decoders.variables(name), IDS)
    flat, structure = jax.tree.flatten(adapter)
    draws = [0.3 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in flat]
    adapter, apply = jax.tree.unflatten(structure, draws), jax.jit(lora.apply)
    return lora, base, adapter, apply, apply(base, adapter, IDS)


@pytest.mark.parametrize("name", ONE)
def test_adapted_and_scanned_is_merged_and_unscanned(name: str) -> None:
    """Every kernel is adapted, with an A and a B for each layer and each expert."""
    config = decoders.CONFIGS[name]
    lora, base, adapter, _, logits = adapted(name)
    merged = decoders.unstacked(jlora.merge(base, adapter))
    assert_close(jax.jit(decoder.Decoder(config, scan=False).apply)(merged, IDS), logits, 1e-4)
    sites = [site for site in lora.sites(base, IDS) if "kernel" in site.name]
    assert all(site.is_adapted for site in sites)
    assert len(sites) == 7 + bool(config.experts) + (not config.tied)


@pytest.mark.parametrize("side", ["left", slow("right")])
@pytest.mark.parametrize("name", ONE)
def test_with_a_cache_token_by_token(name: str, side: str) -> None:
    """The logits of whole texts, of three lengths, adapted: prompts first, then each token."""
    _, base, adapter, apply, whole = adapted(name)
    first = np.minimum(LENGTHS, 4)  # the tokens of each text that are its prompt
    start = np.arange(4) < first[:, None]
    start = start[:, ::-1] if side == "left" else start
    ids = np.full((3, 4), 7, np.int32)
    ids[start] = np.concatenate([row[:n] for row, n in zip(IDS, first, strict=True)])
    logits, held = apply(base, adapter, ids, start, cache=decoders.CONFIGS[name].cache(3, 9))
    assert held.lengths.tolist() == [4, 4, 2]
    for row, n in enumerate(first):
        assert_close(logits[row][start[row]], whole[row, :n], 1e-4)
    for _ in range(5):
        at = np.asarray(held.lengths)
        logits, held = apply(base, adapter, IDS[np.arange(3), at][:, None], cache=held)
        assert_close(logits[:, 0], whole[np.arange(3), at], 1e-4)
    assert held.lengths.tolist() == [9, 9, 7]


# ---- the parts ----------------------------------------------------------------------------------


def test_no_expert_drops_a_token() -> None:
    """As a loop over tokens has it, also where most of them choose the same experts."""
    config = replace(decoders.CONFIGS["mixtral"], normalized_experts=False)
    layer = experts.Experts(config, jnp.float32, jnp.float32)
    x = np.random.default_rng(0).normal(size=(2, 5, config.dim)).astype(np.float32)
    x[0, 1:] = x[0, 0]
    params = fill(
        jax.eval_shape(lambda: nn.unbox(layer.init(jax.random.key(0), jnp.asarray(x)))), jnp.float32
    )
    router, gate, up, down = (
        np.asarray(params["params"][name]["kernel"]) for name in ("router", "gate", "up", "down")
    )
    expected = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        scores = np.exp(x[at] @ router)
        scores /= scores.sum()
        for i in np.argsort(-scores)[:2]:
            y = x[at] @ gate[i]
            hidden = y / (1 + np.exp(-y)) * (x[at] @ up[i])
            expected[at] += scores[i] * (hidden @ down[i])
    assert_close(jax.jit(layer.apply)(params, x), expected)


def test_scaled_rope() -> None:
    """Linear slows all pairs; Llama 3's the slow ones, by its own formula between."""
    plain = rope.frequencies(64, 5e5)
    assert_close(rope.frequencies(64, 5e5, rope.Linear(8.0)), plain / 8, 1e-6)
    scaled = rope.frequencies(64, 5e5, rope.Llama3(8.0, 1.0, 4.0, 8192))
    length = 2 * np.pi / plain
    fast, slow = length < 8192 / 4, length > 8192
    assert fast.sum() > 3 and slow.sum() > 3 and (~fast & ~slow).sum() > 2
    np.testing.assert_allclose(scaled[fast], plain[fast], rtol=1e-6)
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    smooth = (8192 / length - 1) / 3
    between = (1 - smooth) * plain / 8 + smooth * plain
    np.testing.assert_allclose(*(x[~fast & ~slow] for x in (scaled, between)), rtol=1e-5)


# ---- config.json --------------------------------------------------------------------------------

REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)


def test_what_config_json_leaves_out() -> None:
    """Means what `transformers` takes it for; version 5 writes the angles elsewhere."""
    theirs = transformers.LlamaConfig().to_dict()
    config = checkpoint.read_config(theirs)
    alone = checkpoint.read_config({"model_type": "llama", **{k: theirs[k] for k in REQUIRED}})
    assert replace(alone, head_size=config.head_size) == config  # which the class derives
    scaling = {"rope_type": "llama3", **rope.Llama3(8.0, 1.0, 4.0, 32)._asdict()}
    old = checkpoint.read_config({**theirs, "rope_theta": 500.0, "rope_scaling": scaling})
    del theirs["rope_theta"], theirs["rope_scaling"]
    theirs["rope_parameters"] = {**scaling, "rope_theta": 500.0}
    assert checkpoint.read_config(theirs) == old
    assert old.rope_scaling == rope.Llama3(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"model_type": "gpt2"}, "expected model_type 'llama', got 'gpt2'"),
        ({"hidden_act": "relu"}, "expected hidden_act 'silu' or .*, got 'relu'"),
        ({"sliding_window": 4}, "expected sliding_window None, got 4"),
        ({"rope_scaling": {"factor": 8.0}}, "expected rope_type 'default' or .* got ''"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' lacks factor"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_what_is_not_computed_is_refused(own: dict[str, Any], message: str) -> None:
    """By the name of the field."""
    with pytest.raises(ValueError, match=f"`config.json`:? {message}"):
        checkpoint.read_config({**transformers.LlamaConfig().to_dict(), **own})


# ---- the cache ----------------------------------------------------------------------------------


def test_places_in_a_cache() -> None:
    """Padding takes no slot; what has none is not written, and its logits are NaN."""
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
    held = cache.empty(1, 3, 3, 1, 2)
    place = held.place(mask.shape, mask)
    assert np.where(mask, place.slots, -1).tolist() == [
        [0, 1, 2, 3],
        [0, 1, -1, -1],
        [-1] * 3 + [0],
    ]
    assert (place.slots[mask == 0] == 3).all()
    seen = place.seen[:, 0].sum(-1)  # a token sees itself and those before it
    assert seen[0].tolist() == [1, 2, 3, 3] and seen[1, :2].tolist() == [1, 2] and seen[2, 3] == 1
    full = np.isnan(place.checked(jnp.zeros((3, 4, 5))))
    assert full.all(-1).tolist() == [[False] * 3 + [True], [False] * 4, [False] * 4]
    new = jnp.arange(24.0).reshape(3, 4, 1, 2)
    written = cache.write(held.keys[0], new, place.slots)[..., 0, 0]
    assert written.tolist() == [[0, 2, 4], [8, 10, 0], [22, 0, 0]]

    held = held._replace(keys=written[None, ..., None, None], lengths=place.lengths)
    rows = held.rows(np.array([2, 0, 2, 1]))  # beams go on from others
    assert rows.keys[0, :, :, 0, 0].tolist() == [[22, 0, 0], [0, 2, 4], [22, 0, 0], [8, 10, 0]]
    assert rows.values.shape == (1, 4, 3, 1, 2) and rows.lengths.tolist() == [1, 4, 1, 2]
    after = held.place((3, 1), None)
    assert after.positions[:, 0].tolist() == [4, 2, 1] and after.lengths.tolist() == [5, 3, 2]
    full = np.isnan(after.checked(jnp.zeros((3, 1, 5))))
    assert full.any(-1)[:, 0].tolist() == [True, False, False]


@pytest.mark.parametrize("scan", [True, slow(False)])
def test_gpt_with_a_cache(scan: bool) -> None:
    """As without; and not beyond its positions."""
    config = gpt.Config(61, 12, 2, 16, 4, 24)
    model = gpt.GPT(config, scan=scan)
    variables = fill(gpt.shapes(config, scan), jnp.float32, 0.3)
    apply = jax.jit(model.apply)
    whole = apply(variables, IDS)
    mask = np.arange(4) < np.array([[4], [2], [3]])
    logits, held = apply(variables, IDS[:, :4], mask, cache=config.cache(3, 12))
    assert_close(logits[mask], whole[:, :4][mask])
    for _ in range(4):
        at = np.asarray(held.lengths)
        logits, held = apply(variables, IDS[np.arange(3), at][:, None], cache=held)
        assert_close(logits[:, 0], whole[np.arange(3), at])
    with pytest.raises(ValueError, match="`slots`: expected at most 12, the positions of the"):
        config.cache(3, 13)


def test_positions_and_a_cache() -> None:
    """Two sources of one fact."""
    config = decoders.CONFIGS["llama"]
    apply = functools.partial(
        decoder.Decoder(config).apply, positions=IDS, cache=config.cache(3, 9)
    )
    with pytest.raises(ValueError, match="`positions`: expected none with a cache"):
        jax.eval_shape(apply, checkpoint.shapes(config), IDS)
