"""Folders of small checkpoints, as Hugging Face's, for the tests of the examples."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.examples.test_models import Small

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(special: Sequence[str], text: str) -> Tokenizer:
    """Pairs of bytes, as those of RoBERTa, GPT-2 and SmolLM2; at most 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


def write_chat_model(folder: pathlib.Path, config: llama.Config) -> pathlib.Path:
    """A random Llama, with a chat template."""
    folder.mkdir(parents=True)
    small = Small(llama, llama.Llama, config)
    small.write(folder)
    more = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": config.tied}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer of at most 400 tokens, with a chat template."""
    PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "he user"
        ),
        chat_template=CHATML,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def write_conversations(path: pathlib.Path, count: int) -> pathlib.Path:
    """The letter that comes after another, `count` times over."""
    found = [say(f"Next to {c}?", chr(ord(c) + 1)) for c in "abcdefghijklm" * count]
    path.write_text("".join(json.dumps({"messages": x}) + "\n" for x in found))
    return path


def say(*turns: str) -> list[dict[str, str]]:
    """A conversation, the user's turn first."""
    roles = ["user", "assistant"] * len(turns)
    return [{"role": r, "content": text} for r, text in zip(roles, turns, strict=False)]


def run_on_eight_and_on_one(
    run: Callable[[Sequence[str]], Any],
    argv: Sequence[str],
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs `examples/chat.py` on eight devices and on one: the same losses but for rounding."""
    mesh = jax.make_mesh
    eight = run([*argv, f"--out={folder / 'eight'}"])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    alone = lambda shape, *args: mesh(shape, *args, devices=jax.devices()[:1])  # noqa: E731
    monkeypatch.setattr(jax, "make_mesh", alone)
    one = run([*argv, f"--out={folder / 'one'}"])
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-3)
    assert eight.after == pytest.approx(one.after, rel=1e-3)
