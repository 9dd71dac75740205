"""`examples/chat.py` on models of `transformers`, against PyTorch, PEFT and the merged model."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")
pytest.importorskip("peft")
pytest.importorskip("gguf")

import chat
import conversations
import jax
import peft as hf_peft
import torch
import transformers
from models import causal
from models.tiny import train_tokenizer, write_tokenizer
from torch_models import EXPERTS, GROUPED, MODELS, TEXT, Model

from jlora import peft
from tests.examples.folders import write_conversations

SIZES = {"vocab_size": 400, "max_position_embeddings": 256, "initializer_range": 0.2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 24}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {
    "gemma3": Model("Gemma3ForCausalLM", GROUPED | WINDOWS | {"num_hidden_layers": 4}, {}),
    "mistral": Model("MistralForCausalLM", GROUPED | {"sliding_window": 16}, {}),
    "phi": Model("PhiForCausalLM", TEXT, {}),
    "qwen3-moe": MODELS["qwen3-moe"],
    "qwen2-moe": Model("Qwen2MoeForCausalLM", GROUPED | EXPERTS | SHARED, {}),  # gates of one row
    "qwen3-next": MODELS["qwen3-next"],
    "gpt-oss": MODELS["gpt-oss"],
    "glm": Model("GlmForCausalLM", GROUPED, {}),
    "olmo": Model("Olmo2ForCausalLM", TEXT, {}),
    "granite": Model("GraniteForCausalLM", TEXT | {"logits_scaling": 4.0}, {}),
    "falcon-h1": Model("FalconH1ForCausalLM", GROUPED | MAMBA | {"mamba_chunk_size": 4}, {}),
}
SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
KEYS = "lstrip", "rstrip", "normalized", "single_word"
ADDED = {"special": True} | dict.fromkeys(KEYS, False)
DAILY = "gemma3"  # with windows and a tied head
APART = FAMILIES.keys() - {"gpt-oss", "falcon-h1", "qwen3-next"}  # which take texts in a row


def write(folder: pathlib.Path, name: str) -> Any:
    """The model, which is written too; one with a tokenizer of several files."""
    row = FAMILIES[name]
    model = row._replace(fields=row.fields | SIZES).make()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if name == "granite":
        (folder / "tokenizer.json").unlink()
        train_tokenizer(SPECIAL, "he user").model.save(str(folder))
        added = {str(i): ADDED | {"content": x} for i, x in enumerate(SPECIAL)}
        config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": SPECIAL[2]}
        config["added_tokens_decoder"] = added
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return model


def nll(model: Any, texts: Sequence[conversations.Text]) -> float:
    """PyTorch's negative log-likelihood per token of the answers, of each text alone."""
    sums = np.zeros(2)
    for text in texts:
        ids = torch.tensor(text.ids[None].astype(int))
        with torch.no_grad():
            found = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1].float(), -1)
        each = found[range(len(text.ids) - 1), ids[0, 1:]].numpy()
        sums += -(each * text.counts[1:]).sum(), text.counts[1:].sum()
    return sums[0] / sums[1]


def answer(model: Any, tokenizer: Any, text: conversations.Text) -> str:
    """What PyTorch writes."""
    ask = {"add_generation_prompt": True, "return_dict": False}
    ids = torch.tensor([tokenizer.apply_chat_template(text.messages[:-1], **ask)])
    stop = tokenizer.eos_token_id
    options = {"do_sample": False, "eos_token_id": stop, "pad_token_id": stop}
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=32, **options)
    return tokenizer.decode([x for x in found[0, ids.shape[1] :].tolist() if x != stop])


@pytest.mark.parametrize(
    "name", [x if x == DAILY else pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES]
)
def test_chat(
    name: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses and answers are PyTorch's, of the model, with PEFT's adapter, and merged."""
    base, out = tmp_path / "base", tmp_path / "out"
    model, data = write(base, name), write_conversations(tmp_path / "data.jsonl", 3)
    sizes = "--length 160 --batch 2 --rank 4 --steps 5 --learning-rate 0.02 --held-out 8"
    seen = []
    pick = conversations.lay
    monkeypatch.setattr(chat, "lay", lambda rows, *n: seen.append(rows) or pick(rows, *n))
    result = chat.main([f"--base={base}", f"--data={data}", f"--out={out}", *sizes.split()])
    said = capsys.readouterr().out
    assert (len(seen[1]) < 31) == (name in APART), said
    assert "computes what it does in PyTorch" in said
    held_out = [text for row in seen[0] for text in row]
    assert result.before == pytest.approx(nll(model, held_out), rel=1e-4)
    assert result.after < result.before
    adapted = hf_peft.PeftModel.from_pretrained(model, out / "adapter").eval()
    assert result.after == pytest.approx(nll(adapted, held_out), rel=1e-4)
    tokenizer = conversations.load_tokenizer(base)
    shown = held_out[: len(result.answers)]
    assert result.answers == [answer(adapted, tokenizer, text) for text in shown]
    assert not peft.check(out / "adapter", "vllm", base=base).findings
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    assert result.after == pytest.approx(nll(merged, held_out), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--quantize=nf4", "--accumulate=2 --no-remat"])
def test_other_options(more: str, tmp_path: pathlib.Path) -> None:
    """They learn too; a run that was stopped goes on."""
    base, out = tmp_path / "base", tmp_path / "out"
    write(base, "mistral")
    data = [write_conversations(tmp_path / f"{i}.jsonl", 2) for i in range(2)]
    sizes = "--length 160 --batch 2 --steps 4 --learning-rate 0.02 --held-out 8 --save-every 2"
    argv = [f"--base={base}", "--data", *map(str, data), f"--out={out}", *sizes.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "delete", lambda folder: None)
        result = chat.main([*argv, *more.split()])
    assert result.after < result.before
    for step in (out / "checkpoints").iterdir():
        step.rename(out / "4") if step.name == "4" else None
    rest = chat.main([*argv, *more.split(), "--resume"])
    assert rest.losses == result.losses[2:]
    assert rest.after == result.after


def test_a_class_that_is_not_there(tmp_path: pathlib.Path) -> None:
    transformers.LlamaConfig(architectures=["Other"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json names Other, not of `transformers`"):
        causal.load(tmp_path, jax.make_mesh((1, 1), ("fsdp", "tensor")), "float32", remat=False)
