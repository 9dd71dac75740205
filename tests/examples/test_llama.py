"""SmolLM2's file and tokenizer, `examples/conversations.py` and `examples/chat.py`.

A tiny random model in a GGUF file of its own stands in for SmolLM2 wherever the real weights do
not matter.
"""

import contextlib
import copy
import dataclasses
import io
import json
import re
import shutil

import chat
import conversations
import data
import gguf
import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from cases._case import fill
from conversations import lay
from jax.tree_util import Partial
from models import llama, smollm2
from transformers import AutoTokenizer

import jlora
from jlora import peft

TINY = llama.Config(
    vocab=260, layers=2, dim=32, hidden=48, heads=4, kv_heads=2, rope_base=10_000.0, norm_eps=1e-5
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
    for name, token in (("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(CHATML)
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
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def say(*turns):
    """A conversation, the user's turn first."""
    roles = ["user", "assistant"] * len(turns)
    return [{"role": r, "content": text} for r, text in zip(roles, turns, strict=False)]


def test_only_answers_count(tokenizer):
    """All of them, each with the token that ends it; what follows the last is left out."""
    text = conversations.encode(say("Hi", "Hello there.", "And now?", "Bye", "One more"), tokenizer)
    counted = tokenizer.decode(text.ids[text.counts > 0], skip_special_tokens=False)
    assert counted == "Hello there.<|im_end|>Bye<|im_end|>"
    assert text.messages == say("Hi", "Hello there.", "And now?", "Bye")
    whole = tokenizer.decode(text.ids, skip_special_tokens=False)
    rendered = tokenizer.apply_chat_template(text.messages, tokenize=False)
    assert whole == rendered.removesuffix("\n")


def test_the_loss_sees_exactly_the_logits_before_answer_tokens():
    ids, zeros = np.arange(12, dtype=np.int32).reshape(2, 6), np.zeros((2, 6), np.int32)
    counts = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]], np.float32)

    def loss(logits):
        fn = Partial(lambda logits, *_: logits, logits)
        return conversations.answer_nll(fn, conversations.Rows(ids, zeros, zeros, counts))

    logits = np.random.default_rng(0).standard_normal((2, 5, 12), np.float32)
    (total, count), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = log_p[[0, 0, 1, 1], [1, 2, 3, 4], [2, 3, 10, 11]]
    np.testing.assert_allclose(total, -picked.sum(), rtol=1e-5)
    assert count == 4
    seen = np.abs(slope).sum(-1) > 0
    np.testing.assert_array_equal(seen, counts[:, 1:] > 0)


def draw_texts(sizes):
    rng = np.random.default_rng(0)
    counts = [(np.arange(n) > n // 2).astype(np.float32) for n in sizes]
    return [conversations.Text([], rng.integers(3, 260, len(c)), c) for c in counts]


def test_packed_is_unpacked(tiny):
    """The loss and its gradient in A and B, whatever texts share a row."""
    texts = draw_texts([9, 30, 5, 21, 14, 7])
    packed = conversations.pack(texts, 32)
    assert [len(row) for row in packed] == [3, 1, 2]  # 9 + 5 + 14, 30, 21 + 7
    assert max(sum(len(text.ids) for text in row) for row in packed) <= 32
    assert sorted(len(text.ids) for row in packed for text in row) == [5, 7, 9, 14, 21, 30]
    lora = jlora.transform(llama.Llama(TINY).apply, jlora.LoRA(rank=2))
    base, adapter = lora.init(jax.random.key(0), tiny, np.zeros((1, 8), np.int32))
    adapter = fill(adapter, jnp.float32, 0.1)

    def loss(adapter, rows):
        total, count = conversations.answer_nll(Partial(lora.apply, base, adapter), rows)
        return total / count

    both = [lay(packed, 4), lay([[text] for text in texts])]
    assert both[0].ids.shape == (4, 30) and not both[0].segments[3].any()
    both_of = jax.jit(jax.value_and_grad(loss))
    (one, slope), (other, expected) = (both_of(adapter, x) for x in both)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    laws.assert_close(slope, expected, 1e-3)
    mixed = both[0]._replace(segments=(both[0].segments > 0).astype(np.int32))
    assert abs(both_of(adapter, mixed)[0] - other) > 1e-3


# --------------------------------------------------------------------------- chat


@pytest.fixture(scope="module")
def base(file, tmp_path_factory):
    """The tiny model as a folder of Hugging Face."""
    return smollm2.write(file, tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def argv(base, tmp_path_factory):
    """Arguments of a small run, but for `--out`."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    found = [say(f"Next to {c}?", chr(ord(c) + 1)) for c in "abcdefghijklm" * 3]
    path.write_text("".join(json.dumps({"messages": x}) + "\n" for x in found))
    sizes = "--length 160 --batch 2 --rank 4 --steps 6 --save-every 2 --learning-rate 0.02"
    return [f"--base={base}", f"--data={path}", "--held-out=8", *sizes.split()]


def test_folder_is_what_was_in_the_file(base, tiny):
    config, variables = llama.load(base)
    assert dataclasses.replace(config, head_size=None, norm_eps=1e-5) == TINY
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    jax.tree.map(np.testing.assert_array_equal, variables, rounded)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert set(tokenizer("Hi")) == {"input_ids", "attention_mask"}  # what a Llama takes
    assert (
        tokenizer.apply_chat_template(say("Hi"), tokenize=False)
        == "<|im_start|>user\nHi<|im_end|>\n"
    )


NOT_IN_4 = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}
CONFIGS = {  # of the same tokenizer, as versions of `transformers` write them
    "4": {},
    "5": NOT_IN_4 | {"extra_special_tokens": ["<|im_start|>"]},
    "before 4.57": {
        "tokenizer_class": "GPT2Tokenizer",
        "chat_template": CHATML,
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    },
}


@pytest.mark.parametrize("version", CONFIGS)
def test_a_tokenizer_of_any_version_of_transformers(version, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    file, expected = folder / "tokenizer_config.json", AutoTokenizer.from_pretrained(base)
    config = json.loads(file.read_text()) | CONFIGS[version]
    file.write_text(json.dumps(config))
    if "chat_template" in config:
        (folder / "chat_template.jinja").unlink()
    found, texts = conversations.load_tokenizer(folder), say("Hé 12", "Hello.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "all_special_tokens"):
        assert getattr(found, name) == getattr(expected, name)
    for given in ({"tokenize": False}, {"return_dict": False}, {"add_generation_prompt": True}):
        one, other = (x.apply_chat_template(texts, **given) for x in (found, expected))
        assert one == other
    assert found.decode(found("Hé 12 , no")["input_ids"]) == "Hé 12 , no"
    jax.tree.map(
        np.testing.assert_array_equal,
        conversations.encode(texts, found)[1:],
        conversations.encode(texts, expected)[1:],
    )


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """What a run returned, where it wrote, what it printed, and a copy of its checkpoints."""
    out, printed, speeds = tmp_path_factory.mktemp("out"), io.StringIO(), []
    stopped, mean_nll = tmp_path_factory.mktemp("stopped"), chat.mean_nll

    class Bar(chat.progress):
        """Keeps what it is to show."""

        def set_postfix_str(self, text, refresh):
            speeds.append(text)

    def measure(*args):
        """Once before training, and once after it, when the checkpoints are still there."""
        if (out / "checkpoints").exists():
            shutil.copytree(out / "checkpoints", stopped / "checkpoints")
        return mean_nll(*args)

    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "progress", Bar)
        patch.setattr(chat, "mean_nll", measure)
        result = chat.main([*argv, f"--out={out}"])
    return result, out, printed.getvalue(), speeds, stopped


def test_learns_and_writes_what_is_served(whole, base):
    result, folder, printed, speeds, _ = whole
    assert len(result.losses) == 6
    assert result.after < result.before
    assert f"vLLM 0.33.0 supports it: vllm serve {base} --enable-lora" in printed
    assert f"merged: vllm serve {folder / 'merged'}" in printed
    assert printed.count("  before: ") == printed.count("  after:  ") == chat.SHOWN
    assert "4 more steps take" in printed
    assert len(speeds) == 5 and all(re.fullmatch(r"loss \d+\.\d+, \d+ tokens/s", x) for x in speeds)
    assert peft.read_config(folder / "adapter")["base_model_name_or_path"] == str(base)
    assert sorted(x.name for x in folder.iterdir()) == ["adapter", "merged"]
    assert {x.name for x in (folder / "merged").iterdir()} == {x.name for x in base.iterdir()}


@pytest.mark.slow
def test_on_4_bits(argv, whole, tmp_path, capsys):
    """NF4 of the weights, and bfloat16."""
    result = chat.main([*argv, "--quantize=nf4", "--dtype=bfloat16", f"--out={tmp_path}"])
    assert result.before != whole[0].before
    assert result.after < result.before


def test_a_stopped_run_goes_on(argv, whole, monkeypatch):
    """To the last bit; only when asked to, and only as it began."""
    out = whole[-1]
    shutil.rmtree(out / "checkpoints" / "6")
    stopped = [*argv, f"--out={out}"]
    with pytest.raises(SystemExit):
        chat.main(stopped)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"cannot resume from .*: seed was 0, is 1"),
    ):
        patch.setattr(chat, "mean_nll", lambda *_: 0.0)
        patch.setattr(chat.beam, "greedy", lambda *_: [])
        chat.main([*stopped, "--resume", "--seed=1"])
    rest = chat.main([*stopped, "--resume"])
    assert rest.losses == whole[0].losses[4:]
    assert rest.after == whole[0].after
    files = [x / "adapter" / "adapter_model.safetensors" for x in (out, whole[1])]
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("more", [[], ["--rank=2"], ["--steps=9"]], ids=str)
def test_a_finished_run_is_left_alone(more, argv, whole, capsys):
    _, out, *_ = whole
    before = {x: x.read_bytes() for x in out.rglob("*") if x.is_file()}
    with pytest.raises(SystemExit):
        chat.main([*argv, f"--out={out}", "--resume", *more])
    assert (
        f"{out} has a run that has finished: nothing is left to resume" in capsys.readouterr().err
    )
    assert {x: x.read_bytes() for x in out.rglob("*") if x.is_file()} == before


@pytest.mark.parametrize("option", ["steps", "batch", "rank", "held-out"])
def test_numbers_are_at_least_one(option, capsys):
    with pytest.raises(SystemExit):
        chat.main([f"--{option}=0"])
    assert f"argument --{option}: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_learns_to_define(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = chat.main(["--steps=12"])
    assert result.before == pytest.approx(5.140, abs=0.05)  # as the guides say
    assert result.after < result.before - 1


def write(folder, **files):
    """A folder with these files, as text or as JSON."""
    folder.mkdir(exist_ok=True)
    for name, x in files.items():
        (folder / name.replace("_json", ".json")).write_text(
            x if isinstance(x, str) else json.dumps(x)
        )
    return folder


SIZES = {name: 4 for ours, name in llama.FIELDS.items() if ours in smollm2.WRITTEN}
LINE = json.dumps({"messages": say("Hi", "Hello.")})
MISTAKES = {
    "data.jsonl: 0 of 0 conversations have at most 160 tokens; expected more than 8": {"data": ""},
    r"0 of 9 .* tokens; expected more than 8. The longest has \d+: allow for more": {
        "data": f"{LINE}\n" * 9,
        "length": 8,
    },
    r'data.jsonl, line 2: expected {"messages": .*}, got {"prompt": "a"}': {
        "data": f'{LINE}\n{{"prompt": "a"}}'
    },
    r'data.jsonl, line 2: no message after the first is "assistant"\'s': {
        "data": f"{LINE}\n" + json.dumps({"messages": say("Hi")})
    },
    "config.json` is not there: give the folder of a checkpoint": {"base": {}},
    r"expected model_type 'llama' or 'qwen2' or 'qwen3', got 'gemma3'": {
        "base": {"config_json": {"model_type": "gemma3"}}
    },
    r"`.*config.json` lacks hidden_size, .*vocab_size": {
        "base": {"config_json": {"model_type": "llama"}}
    },
    r"base has neither model.safetensors nor .*index.json. Put the checkpoint there": {
        "base": {"config_json": {"model_type": "llama", **SIZES}}
    },
    "--batch 3 and hidden_size 32 must be multiples of the 2 devices": {"batch": 3},
    "base lacks tokenizer.json, a chat template or an eos_token": {"template": ""},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_said_before_anything_is_compiled(message, argv, base, tmp_path, monkeypatch):
    given, more = MISTAKES[message], [f"--out={tmp_path / 'out'}"]
    if "data" in given:
        (tmp_path / "data.jsonl").write_text(given["data"])
        more.append(f"--data={tmp_path / 'data.jsonl'}")
    if "base" in given:
        more.append(f"--base={write(tmp_path / 'base', **given['base'])}")
    if "template" in given:
        shutil.copytree(base, tmp_path / "base")
        (tmp_path / "base" / "chat_template.jinja").unlink()
        more.append(f"--base={tmp_path / 'base'}")
    if "batch" in given:
        monkeypatch.setattr(jax, "device_count", lambda: 2)
    more += [f"--{name}={given[name]}" for name in ("length", "batch") if name in given]
    monkeypatch.setattr(chat, "run", None)
    with pytest.raises(SystemExit, match=message):
        chat.main([*argv, *more])


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    """As those of models that think: the loss would be of other texts than those that are shown."""
    other = copy.copy(tokenizer)
    other.chat_template = CHATML.replace("m['content']", "(m['content'] if loop.last else '…')")
    assert conversations.encode(say("Hi", "Hello."), tokenizer).counts.any()
    with pytest.raises(
        ValueError, match="the chat template writes message 1 otherwise where others"
    ):
        conversations.encode(say("Hi", "Hello.", "And now?", "Bye"), other)
