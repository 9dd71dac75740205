"""SmolLM2's file, its tokenizer and chats, and `examples/finetune_lm.py`.

A tiny random model in a GGUF file of its own stands in for SmolLM2 wherever the real weights do
not matter.
"""

import dataclasses
import json

import data
import finetune_lm
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases._case import fill
from jax.tree_util import Partial
from models import llama, smollm2

from jlora import checkpoint, peft

TINY = llama.Config(
    vocab=260, layers=2, dim=32, hidden=48, heads=4, kv_heads=2, rope_base=10_000.0, norm_eps=1e-5
)


@pytest.fixture(scope="module")
def tiny():
    """The variables of a random model of the sizes `TINY`."""
    return fill(llama.shapes(TINY), jnp.float32, 0.3)


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    """A file of the tiny model."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", TINY, tiny)


@pytest.fixture(scope="module", params=["bytes", pytest.param("smollm2", marks=pytest.mark.slow)])
def tokenizer(request, file):
    """That of a file without its weights: of bytes, and in the long run SmolLM2's."""
    path = file if request.param == "bytes" else data.smollm2()
    return smollm2._tokenizer(gguf.GGUFReader(path))


def write_gguf(path, config, variables, tensors=None, **fields):
    """Writes a model with a byte tokenizer; `tensors` and `fields` replace entries, None drops."""
    entries = peft.to_tensors(variables, smollm2.NAMES)
    for name, weight in entries.items():
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
        if heads:  # as llama.cpp's converter does: two halves of a head to pairs
            halves = weight.reshape(heads, 2, config.head_dim // 2, -1)
            entries[name] = halves.swapaxes(1, 2).reshape(weight.shape)
    entries |= tensors or {}

    # The 256 bytes as the printable characters that byte-level BPE writes for them.
    letters = [c for c in map(chr, range(256)) if c.isprintable() and c not in " \xa0\xad"]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he"]
    writer = gguf.GGUFWriter(path, fields.get("architecture", "llama"))
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(fields.get("rope_dimensions", config.head_dim))
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if "rope_scaling" in fields:
        writer.add_rope_scaling_type(fields["rope_scaling"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_token_merges(["h e"])
    for name, weight in entries.items():
        if weight is not None:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --------------------------------------------------------------------------- GGUF


def test_gguf_gives_back_what_was_written(tiny, file):
    config, variables, _ = smollm2.load(file)
    assert config == dataclasses.replace(TINY, norm_eps=config.norm_eps)
    assert config.norm_eps == np.float32(TINY.norm_eps)
    jax.tree.map(np.testing.assert_array_equal, variables, tiny)


def test_gguf_lists_every_tensor_that_does_not_fit(tiny, tmp_path):
    wrong = {
        "blk.1.attn_k.weight": None,
        "blk.0.ffn_up.weight": np.zeros((32, 48), np.float32),
        "token_embd.weight": np.zeros((259, 32), np.float32),
        "output.weight": np.zeros((260, 32), np.float32),
    }
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tiny, tensors=wrong)
    with pytest.raises(ValueError, match="does not fit `like`") as error:
        smollm2.load(path)
    assert str(error.value).splitlines()[1:] == [
        "  token_embd.weight: expected shape (260, 32), got (259, 32)",
        "  blk.1.attn_k.weight: missing",
        "  blk.0.ffn_up.weight: expected shape (48, 32), got (32, 48)",
        "  output.weight: unexpected",
    ]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"pre": "llama-bpe"}, r"`tokenizer.ggml.pre`: expected 'smollm', got 'llama-bpe'"),
        ({"rope_scaling": gguf.RopeScalingType.YARN}, r"rope scaling is not implemented"),
    ],
)
def test_gguf_of_another_kind_is_refused(tiny, tmp_path, field, message):
    path = write_gguf(tmp_path / "tiny.gguf", TINY, tiny, **field)
    with pytest.raises(ValueError, match=message):
        smollm2.load(path)


# --------------------------------------------------------------------------- text


def test_tokenizer_round_trip(tokenizer):
    text = "<|im_start|>user  def f(x):\n\treturn x**2  # naïve café 日本 🙂<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


# --------------------------------------------------------------------------- fine-tuning


def test_only_answers_count(tokenizer):
    pairs = [finetune_lm.Pair("Hi", "Hello there."), finetune_lm.Pair("And now?", "Bye")]
    rows = finetune_lm.encode(pairs, tokenizer, 256)
    for pair, ids, counts in zip(pairs, *rows, strict=True):
        answer = [*tokenizer.encode(pair.answer).ids, smollm2.STOP]
        assert ids[counts > 0].tolist() == answer
        start = counts.argmax()
        assert tokenizer.decode(ids[:start], skip_special_tokens=False) == smollm2.chat(pair.prompt)
        assert not counts[start + len(answer) :].any()


def test_the_loss_sees_exactly_the_logits_before_answer_tokens():
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    counts = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], np.float32)

    def loss(logits):
        fn = Partial(lambda logits, _: logits, logits)
        return finetune_lm.answer_nll(fn, finetune_lm.Rows(ids, counts))

    logits = np.random.default_rng(0).standard_normal((2, 5, 12), np.float32)
    (total, count), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = log_p[[0, 0, 1, 1], [1, 2, 3, 4], [2, 3, 10, 11]]
    np.testing.assert_allclose(total, -picked.sum(), rtol=1e-5)
    assert count == 4
    seen = np.abs(slope).sum(-1) > 0
    np.testing.assert_array_equal(seen, counts[:, 1:] > 0)


def test_pairs_that_are_too_long_are_left_out(tokenizer):
    pairs = [finetune_lm.Pair("Hi", "Hello."), finetune_lm.Pair("Hi", "Hello. " * 200)]
    assert len(finetune_lm.encode(pairs, tokenizer, 256).ids) == 1
    with pytest.raises(ValueError, match="none of 1 pairs fits in `length` = 256 tokens"):
        finetune_lm.encode(pairs[1:], tokenizer, 256)


def test_read_jsonl_names_the_line_that_is_wrong(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r'line 2: expected .*, got {"prompt": "a"}'):
        finetune_lm.read_jsonl(path)


def test_learns_and_saves(file, tmp_path):
    pairs = [{"prompt": f"Next to {c}?", "answer": chr(ord(c) + 1)} for c in "abcdefghijklm" * 3]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    paths = {"gguf": file, "data": tmp_path / "data.jsonl", "out": tmp_path / "out"}
    argv = [f"--{name}={path}" for name, path in paths.items()]
    result = finetune_lm.main([*argv, "--length=200", "--batch=4", "--rank=4", "--steps=6"])
    assert len(result.losses) == 6
    assert result.after < result.before
    assert checkpoint.read(tmp_path / "out" / "adapter").step == 6


@pytest.mark.slow
def test_smollm2_learns_to_define(tmp_path):
    result = finetune_lm.main(["--out", str(tmp_path / "out"), "--steps=12"])
    assert result.before == pytest.approx(5.145, abs=0.05)  # as the guides say
    assert result.after < result.before - 1
