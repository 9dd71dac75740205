"""The models of the examples against `transformers` on PyTorch, through files of the real classes.

Needs the extra `interop`.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models import beam, bert, deberta, gpt, llama  # noqa: E402
from small import some  # noqa: E402

IDS = np.random.default_rng(0).integers(2, 61, (3, 12))
MASK = (np.arange(12) < np.array([[12], [7], [1]])).astype(np.int64)
TYPES = np.random.default_rng(1).integers(0, 2, IDS.shape)
# Larger than their initial draw, so that every part of the model shows in the logits.
ENCODER = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
ENCODER |= {"intermediate_size": 24, "max_position_embeddings": 20, "type_vocab_size": 2}
ENCODER |= {"initializer_range": 0.3, "num_labels": 3}
GPT2 = {"vocab_size": 61, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 4}
GPT2 |= {"initializer_range": 0.3}
LLAMA = {**ENCODER, "num_key_value_heads": 2, "rope_theta": 500.0}
XXL = {**ENCODER, "type_vocab_size": 0, "relative_attention": True, "pos_att_type": "p2c|c2p"}
XXL |= {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
XXL |= {"position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu"}
# transformers ties the wrong matrix to the embedding if it is left to tie.
NEW_HEAD = {**XXL, "legacy": False, "tie_word_embeddings": False}


class Case(NamedTuple):
    """A class of `transformers`, its config, and our model of it."""

    cls: str
    config: dict[str, Any]
    module: Any
    make: Callable[..., Any]
    classes: tuple[int, ...] = ()
    types: bool = False


def encoders(name: str, config: dict[str, Any], module: Any, make: Any) -> dict[str, Case]:
    """Without a head, with one for words and with one for classes."""
    cases = {
        "": Case(f"{name}Model", config, module, make),
        "_lm": Case(f"{name}ForMaskedLM", config, module, make),
        "_cls": Case(f"{name}ForSequenceClassification", config, module, make, (3,)),
    }
    types = config["type_vocab_size"] > 0
    return {name + suffix: case._replace(types=types) for suffix, case in cases.items()}


def decoder(cls: str = "Llama", **config: Any) -> Case:
    """A small Llama, or one of its kin, with more heads of queries than of keys."""
    config = {**LLAMA, "max_position_embeddings": 64, **config}
    return Case(f"{cls}ForCausalLM", config, llama, llama.Llama)


# Of the two pairs of a head, one turns more often than 4 times in 64 tokens, one is between.
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.2, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}


DECODERS = {
    "llama": decoder(tie_word_embeddings=True),
    "llama_untied": decoder(),
    "llama_heads": decoder(head_dim=6),
    "llama_scaled": decoder(rope_scaling=SCALED),
    "qwen2": decoder("Qwen2", use_sliding_window=False),
    "qwen3": decoder("Qwen3", head_dim=6, tie_word_embeddings=True),
}
CASES = {
    "gpt2": Case("GPT2LMHeadModel", GPT2, gpt, gpt.GPT),
    "gpt2_inner": Case("GPT2LMHeadModel", {**GPT2, "n_inner": 24}, gpt, gpt.GPT),
    **DECODERS,
    **encoders("Bert", ENCODER, bert, bert.Bert),
    "bert_pretraining": Case("BertForPreTraining", ENCODER, bert, bert.Bert, types=True),
    **encoders("Roberta", {**ENCODER, "pad_token_id": 1}, bert, bert.Bert),
    **encoders("DebertaV2", XXL, deberta, deberta.Deberta),
    "deberta_new_head": Case("DebertaV2ForMaskedLM", NEW_HEAD, deberta, deberta.Deberta),
}


def torch_model(case: Case, folder: pathlib.Path) -> Any:
    """A random model of the real class, saved and loaded again."""
    torch.manual_seed(0)
    cls = getattr(transformers, case.cls)
    model = cls(cls.config_class(**case.config))
    with torch.no_grad():
        for x in model.parameters():  # biases are zero and scales one by default
            if x.ndim == 1:
                x += 0.2 * torch.randn_like(x)
    model.save_pretrained(folder)
    return cls.from_pretrained(folder).eval()


@pytest.mark.parametrize("scan", some([True, False], True))
@pytest.mark.parametrize("name", CASES)
def test_logits_and_files(name: str, scan: bool, tmp_path: pathlib.Path) -> None:
    """The same to 1e-4 where there are tokens, and byte for byte the same file."""
    case, padding = CASES[name], CASES[name].config.get("pad_token_id", 0)
    given = {"input_ids": np.where(MASK, IDS, padding), "attention_mask": MASK}
    given |= {"token_type_ids": TYPES} if case.types else {}
    model = torch_model(case, tmp_path)
    config, variables = case.module.load(tmp_path, scan=scan)
    ours = case.make(config, *case.classes, scan=scan)
    actual = np.asarray(jax.jit(ours.apply)(variables, *given.values()))
    with torch.no_grad():  # hidden states or logits
        outputs = model(**{name: torch.tensor(x) for name, x in given.items()})
    expected = next(iter(outputs.values())).numpy()
    if not case.classes:
        actual, expected = actual[MASK > 0], expected[MASK > 0]
    assert actual.shape == expected.shape and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
    case.module.save(tmp_path / "ours", variables, config)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", some(DECODERS, "llama_scaled", "qwen3"))
def test_generation(name: str, tmp_path: pathlib.Path) -> None:
    """Greedy, from prompts of three lengths, until a token that ends it."""
    case, stop, limit = CASES[name], 5, 12
    model = torch_model(case, tmp_path)
    config, variables = case.module.load(tmp_path)
    logits_fn = jax.tree_util.Partial(case.make(config).apply, variables)
    prompts = [row[:n].tolist() for row, n in zip(IDS, (12, 7, 1), strict=True)]
    answers = beam.greedy(logits_fn, prompts, config.cache, stop, limit)
    left = np.array([[0] * (12 - len(prompt)) + prompt for prompt in prompts])
    expected = model.generate(
        torch.tensor(left),
        attention_mask=torch.tensor(MASK[:, ::-1].copy()),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )[:, 12:].tolist()
    assert len({token for row in expected for token in row}) > 3
    for answer, ids in zip(answers, expected, strict=True):
        assert answer == (ids[: ids.index(stop)] if stop in ids else ids)


def test_shards_and_the_model_without_a_head(tmp_path: pathlib.Path) -> None:
    """Several files are read as one; `GPT2Model`'s names lack their first part."""
    for cls in ("GPT2LMHeadModel", "GPT2Model"):
        model = torch_model(CASES["gpt2"]._replace(cls=cls), tmp_path / cls)
        model.save_pretrained(tmp_path / cls / "shards", max_shard_size="8KB")
        assert len(list((tmp_path / cls / "shards").glob("*.safetensors"))) > 2
        config, variables = gpt.load(tmp_path / cls / "shards")
        assert config.bare == (cls == "GPT2Model")
        gpt.save(tmp_path / cls / "ours", variables, config)
        expected = (tmp_path / cls / "model.safetensors").read_bytes()
        assert (tmp_path / cls / "ours").read_bytes() == expected
