"""Caches of `transformers` in and out of `apply`, and `examples/generation.py`.

The tokens are those of PyTorch's own `generate`.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")
pytest.importorskip("peft")

import peft as hf_peft
import torch
import transformers
from generation import generate, make_cache
from small import set_up_noisy
from torch_models import GROUPED, MODELS, TEXT, Model

import jlora
from jlora import LoRA, peft
from jlora._tree import leaves_by_path

MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
SMALL = {"vocab_size": 71, "hidden_size": 32, "n_layer": 2, "n_head": 4}
NAMES = "llama", "gemma3", "qwen3-moe", "gpt2", "mamba2"
ROWS = {name: MODELS[name] for name in NAMES} | {
    "phi": Model("PhiForCausalLM", TEXT, {}),
    "bloom": Model("BloomForCausalLM", SMALL, {}),
    "falcon-h1": Model("FalconH1ForCausalLM", GROUPED | MAMBA | {"mamba_chunk_size": 4}, {}),
}
WINDOW = {"gemma3": {"sliding_window": 4}}
NEW = 9
IDS = np.random.default_rng(0).integers(4, 71, (3, 6))
MASK = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
STOP = [2, 3]
NEVER = [99]


def make(name: str) -> Any:
    """A model whose logits differ."""
    row = ROWS[name]
    model = row._replace(fields=row.fields | WINDOW.get(name, {})).make()
    with torch.no_grad():
        for x in model.parameters():
            x *= 3 if x.ndim > 1 else 1
    return model


def theirs(model: Any, stop: list[int]) -> np.ndarray:
    """PyTorch's tokens, after a stop -1."""
    ids, mask = torch.tensor(IDS * MASK), torch.tensor(MASK)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **options)[:, IDS.shape[1] :].numpy()
    return cut(np.pad(found, ((0, 0), (0, NEW - found.shape[1]))), stop)


def ours(call: Callable[..., Any], model: Any, stop: list[int], **options: Any) -> jax.Array:
    """The tokens of `generate`."""
    return generate(call, model, IDS * MASK, MASK, new_tokens=NEW, stop=stop, **options)


def cut(tokens: Any, stop: list[int]) -> np.ndarray:
    is_stop = np.isin(tokens, stop)
    return np.where(is_stop.cumsum(1) - is_stop > 0, -1, tokens)


def without_cache(apply: Any) -> Any:
    return functools.partial(apply, use_cache=False)


@pytest.mark.parametrize("name", ROWS)
def test_tokens_of_an_adapted_model(name: str) -> None:
    """Prompts padded on the left, of which one ends early; PyTorch has the merged model."""
    model = make(name)
    params, apply = jlora.torch.extract(model)
    pattern = "in_proj/weight" if name == "mamba2" else jlora.torch.all_linear(apply)
    _, base, adapter = set_up_noisy(without_cache(apply), LoRA(pattern, rank=2), params, IDS)
    plain = theirs(model, NEVER)
    merged = leaves_by_path(jlora.merge(base, adapter))
    tensors = {".".join(path): torch.tensor(np.asarray(x)) for path, x in merged}
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys
    stop = [int(theirs(model, NEVER)[1, 3])]
    expected = theirs(model, stop)
    own = jlora.transform(apply).apply
    run = jax.jit(lambda *params: ours(functools.partial(own, *params), model, stop))
    np.testing.assert_array_equal(cut(run(base, adapter), stop), expected)
    assert (expected == -1).any() and (expected != plain).any(1).all()


def test_tokens_that_are_not_compiled() -> None:
    model = make("llama")
    params, apply = jlora.torch.extract(model)
    found = ours(functools.partial(apply, params), model, STOP)
    np.testing.assert_array_equal(cut(found, STOP), theirs(model, STOP))


def test_tokens_without_a_cache(tmp_path: pathlib.Path) -> None:
    """Of layers in a scan, with an adapter of PEFT's."""
    config = hf_peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = hf_peft.get_peft_model(make("llama"), config).eval()
    model.save_pretrained(tmp_path)
    plain = make("llama")
    params, apply = jlora.torch.extract(plain, scan=["model/layers"])
    sites = jlora.transform(without_cache(apply)).sites(params, IDS)
    adapter = peft.load(tmp_path, params, jlora.torch.names(sites, apply))
    call = functools.partial(jlora.transform(apply).apply, params, adapter)
    found = jax.jit(lambda: ours(call, plain, STOP, is_cached=False))()
    np.testing.assert_array_equal(cut(found, STOP), theirs(model, STOP))


def test_tokens_that_are_drawn() -> None:
    """As often as the softmax says; at a low temperature the most likely."""
    model = make("llama")
    params, apply = jlora.torch.extract(model)
    ids = np.tile(IDS[2:], (1000, 1))
    options = {"new_tokens": 1, "stop": STOP, "is_cached": False, "key": jax.random.key(1)}
    draw = lambda t: generate(  # noqa: E731
        functools.partial(apply, params), model, ids, np.ones_like(ids), temperature=t, **options
    )
    logits = apply(params, ids[:1], use_cache=False).logits[0, -1]
    expected = jax.nn.softmax(logits / 2)
    counts = np.bincount(np.ravel(draw(2.0)), minlength=71)
    assert (np.abs(counts / 1000 - expected) < 4 * np.sqrt(expected / 1000) + 1e-3).all()
    assert (draw(1e-3) == logits.argmax()).all()


@pytest.mark.parametrize("kind", [transformers.DynamicCache, transformers.StaticCache])
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1"])
def test_caches(name: str, kind: Any) -> None:
    """They go in and out of a compiled function; the logits and what is kept are PyTorch's."""
    model = make(name)
    params, apply = jlora.torch.extract(model)
    run = jax.jit(functools.partial(apply, params, use_cache=True))
    options = {} if kind is transformers.DynamicCache else {"max_cache_len": 12}
    own, other = (kind(config=model.config, **options) for _ in range(2))
    for part in (IDS[:, :5], IDS[:, 5:], IDS[:, :1]):
        out = run(part, cache=own)
        with torch.no_grad():
            expected = model(torch.tensor(part), cache=other, use_cache=True)
        own, other = out.cache, expected.cache
        assert type(own) is kind
        found = jax.tree.leaves((out.logits, own))
        known = jax.tree.leaves((expected.logits.numpy(), other))
        for x, y in zip(found, known, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


def test_a_cache_of_an_encoder_and_a_decoder() -> None:
    params, apply = jlora.torch.extract(MODELS["t5"].make())
    run = jax.jit(functools.partial(apply, params), static_argnames="use_cache")
    out = run(IDS[:, :4], decoder_input_ids=IDS[:, :3], use_cache=True)
    given = {"encoder_outputs": (out.encoder_last_hidden_state,), "cache": out.cache}
    found = run(decoder_input_ids=IDS[:, 3:4], use_cache=True, **given)
    whole = run(IDS[:, :4], decoder_input_ids=IDS[:, :4], use_cache=False)
    np.testing.assert_allclose(found.logits[:, 0], whole.logits[:, 3], atol=1e-4)


def test_a_cache_that_no_scan_holds() -> None:
    config = transformers.LlamaConfig(**GROUPED, sliding_window=4)
    config.layer_types = ["hybrid_sliding"] * 2
    with pytest.raises(ValueError, match="counts tokens in Python: give is_cached=False"):
        make_cache(config, 8)
