"""Folders of small checkpoints, as Hugging Face's, for the tests of the examples."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from models import llama
from models.tiny import write_tokenizer

from tests.examples.test_models import Small


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
