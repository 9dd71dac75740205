"""`examples/conversations.py`, and `examples/chat.py` on a tiny random model.

SmolLM2 itself, from its GGUF file, is slow.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import shlex
import shutil
import types

import chat
import conversations
import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
import tables
import watch
from cases._case import fill
from conversations import lay
from jax.tree_util import Partial
from models import llama
from models.tiny import CHATML
from peft_files import config_of

import jlora
from jlora import peft
from tests.examples.folders import say, write_chat_model, write_conversations

TINY = llama.Config(vocab=400, layers=2, dim=32, hidden=48, heads=4, kv_heads=2)


BASE = pathlib.Path("out") / "smollm2"  # where `chat.py` looks for its own model


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
    """A tiny model as a folder of Hugging Face, in the place of SmolLM2."""
    here = tmp_path_factory.mktemp("base")
    write_chat_model(here / BASE, dataclasses.replace(TINY, tied=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        yield BASE


# ---- what counts --------------------------------------------------------------------------------


def test_only_answers_count(base):
    """All of them, each with the token that ends it; what follows the last is left out."""
    tokenizer = conversations.load_tokenizer(base)
    turns = "Hi", "Hello  there: naïve 日本 🙂", "And\n\tnow?", "Bye", "One more"
    text = conversations.encode(say(*turns), tokenizer)
    counted = tokenizer.decode(text.ids[text.counts > 0], skip_special_tokens=False)
    assert counted == f"{turns[1]}<|im_end|>Bye<|im_end|>"
    assert text.messages == say(*turns[:4])
    rendered = tokenizer.apply_chat_template(text.messages, tokenize=False)
    whole = tokenizer.decode(text.ids, skip_special_tokens=False)
    assert whole == rendered.removesuffix("\n")


def test_a_line_of_a_file_is_a_conversation(tmp_path):
    """Whatever characters it has; the error says which line is none."""
    path, found = tmp_path / "data.jsonl", [say("A\u2028B\x85", "C"), say("D", "E")]
    lines = [json.dumps({"messages": x}, ensure_ascii=False) + "\n" for x in found]
    path.write_text("".join(lines), encoding="utf-8-sig")
    assert conversations.read_jsonl(path) == found
    for wrong, said in {"[]": "expected", lines[0].replace("assist", "import"): "no"}.items():
        path.write_text("".join([*lines, wrong]), encoding="utf-8")
        with pytest.raises(ValueError, match=f"data.jsonl, line 3: {said} "):
            conversations.read_jsonl(path)


def test_a_template_that_changes_earlier_turns_is_refused(base):
    """As those of models that think: the loss would be of other texts than those that are shown."""
    other = conversations.load_tokenizer(base)
    other.chat_template = CHATML.replace("m['content']", "(m['content'] if loop.last else '…')")
    with pytest.raises(ValueError, match="the chat template writes message 1 otherwise where"):
        conversations.encode(say("Hi", "Hello.", "And now?", "Bye"), other)


def draw_texts(part, *sizes):
    """Draws texts, of which what comes after a part, such as a half, counts."""
    rng = np.random.default_rng(0)
    return [
        conversations.Text([], rng.integers(3, 260, n), np.float32(np.arange(n) > n // part))
        for n in sizes
    ]


def test_packed_is_unpacked():
    """The loss and its gradient in A and B, whatever texts share a row."""
    texts = draw_texts(2, 9, 30, 5, 21, 14, 7)
    packed = conversations.pack(texts, 32)
    assert [len(row) for row in packed] == [3, 1, 2]  # 9 + 5 + 14, 30, 21 + 7
    lora = jlora.transform(llama.Llama(TINY).apply, jlora.LoRA(rank=2))
    tiny = fill(llama.shapes(TINY), jnp.float32, 0.3)
    base, adapter = lora.init(jax.random.key(0), tiny, np.zeros((1, 8), np.int32))
    adapter = fill(adapter, jnp.float32, 0.1)

    def loss(adapter, rows):
        total, count = conversations.answer_nll(Partial(lora.apply, base, adapter), rows)
        return total / count

    both = [lay(packed, 6), lay([[text] for text in texts])]
    assert both[0].ids.shape == (6, 30) and not both[0].segments[3:].any()
    both_of = jax.jit(jax.value_and_grad(loss))
    (one, slope), (other, expected) = (both_of(adapter, x) for x in both)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    laws.assert_close(slope, expected, 1e-3)
    mixed = both[0]._replace(segments=(both[0].segments > 0).astype(np.int32))
    assert abs(both_of(adapter, mixed)[0] - other) > 1e-3


@pytest.mark.slow
def test_a_step_of_parts_is_one_of_all_rows():
    """Also if the parts have few answers, many or none."""
    rows = lay([[text] for text in draw_texts(3, 9, 30, 5, 21)], 6)  # two are empty
    model = llama.Llama(TINY)
    lora, tx = jlora.transform(model.apply, jlora.LoRA(rank=2)), jlora.optimizer(optax.sgd(1.0))
    tiny = fill(llama.shapes(TINY), jnp.float32, 0.3)
    base, adapter = lora.init(jax.random.key(0), tiny, rows.ids[:1])
    state = chat.State(fill(adapter, jnp.float32, 0.1), tx.init(adapter))
    one, six = (chat.make_step(lora.apply, tx, parts)(state, base, rows) for parts in (1, 6))
    np.testing.assert_allclose(one[1], six[1], rtol=1e-5)
    laws.assert_close(one[0].adapter, six[0].adapter, 1e-3)


# ---- chat ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """Arguments of a small run, but for `--out`."""
    path = write_conversations(tmp_path_factory.mktemp("data") / "data.jsonl", 3)
    sizes = "--length 160 --batch 2 --rank 4 --steps 6 --save-every 2 --learning-rate 0.02"
    return [f"--data={path}", "--held-out=8", *sizes.split()]


def copy_to(stopped):
    """Keeps the checkpoints that a run deletes."""
    delete = chat.delete

    def copy_first(folder):
        shutil.copytree(folder, stopped / "checkpoints")
        shutil.copy(folder.with_name("losses.csv"), stopped)
        delete(folder)

    return copy_first


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """What a run returned, where it wrote, what it printed, and a copy of its checkpoints."""
    out, stopped = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("s")
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(chat, "delete", copy_to(stopped))
        return chat.main([*argv, f"--out={out}"]), out, printed.getvalue(), stopped


def test_the_bar_says_what_takes_long(monkeypatch):
    """It stands at no steps while the first one compiles."""
    texts = []

    class Bar(watch.progress):
        def set_postfix_str(self, text, refresh=True):
            texts.append(text.partition(" ")[0])

    monkeypatch.setattr(watch, "progress", Bar)
    watched = types.SimpleNamespace(is_over=lambda done: False, look=lambda *_: None)
    rows = conversations.Rows(*[np.ones((2, 3), int)] * len(conversations.Rows._fields))
    watch.train(None, None, rows, lambda *_: (None, 1.0), np.zeros((3, 1), int), 0, watched)
    assert texts == ["compiling", "loss", "loss", "loss"]


def test_learns_and_writes_what_is_served(argv, whole, base):
    """A run that has finished is left alone."""
    result, folder, printed, _ = whole
    assert len(result.losses) == 6
    assert result.after < result.before
    assert f"supports it: vllm serve {base} --enable-lora" in printed
    assert f"merged: vllm serve {folder / 'merged'}" in printed
    adapted = peft.read(folder / "adapter").leaves
    assert len(adapted) == 7 * TINY.layers and "lm_head" not in adapted
    assert config_of(folder / "adapter")["base_model_name_or_path"] == str(base)
    written = ["adapter", "losses.csv", "losses.png", "merged"]
    assert sorted(x.name for x in folder.iterdir()) == written
    rows = tables.read(folder / "losses.csv")
    assert [row["loss"] for row in rows if row["loss"] != ""] == result.losses
    held_out = [(row["step"], row["held_out"]) for row in rows if row["held_out"] != ""]
    assert held_out == [(0, result.before), (6, result.after)]
    assert {x.name for x in (folder / "merged").iterdir()} == {x.name for x in base.iterdir()}
    before = {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()}
    with pytest.raises(SystemExit):
        chat.main([*argv, f"--out={folder}", "--resume"])
    assert {x: x.read_bytes() for x in folder.rglob("*") if x.is_file()} == before


@pytest.mark.slow
def test_a_stopped_run_goes_on(argv, whole):
    """To the last bit; only when asked to; also if it is saved more often."""
    out = whole[-1]
    shutil.rmtree(out / "checkpoints" / "6")
    stopped = [*argv, f"--out={out}"]
    with pytest.raises(SystemExit):
        chat.main(stopped)
    with pytest.raises(SystemExit, match=r"cannot resume .* rank was 4, is 16"):
        chat.main([*stopped, "--resume", "--rank=16"])
    rest = chat.main([*stopped, "--resume", "--save-every=1"])
    assert rest.losses == whole[0].losses[4:]
    assert rest.after == whole[0].after
    rows = [row["loss"] for row in tables.read(out / "losses.csv") if row["loss"] != ""]
    assert rows == whole[0].losses
    files = [x / "adapter" / "adapter_model.safetensors" for x in (out, whole[1])]
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.slow
def test_the_best_adapter_is_kept(argv, tmp_path, monkeypatch):
    """The run stops when three evaluations were not better; also one that goes on."""
    found, seen = [5.0, 4.0, 3.0, 3.5, 3.2, 3.0, 2.0], {}

    def nll(model_fn, *_):  # by adapter, in the order in which they are first seen
        key = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(model_fn.args[1]))
        return seen.setdefault(key, found[len(seen)])

    monkeypatch.setattr(chat, "mean_nll", nll)
    monkeypatch.setattr(chat, "delete", copy_to(tmp_path / "rest"))
    argv = [*argv, "--steps=8", "--evaluate-every=1", "--patience=3", "--held-out=2"]
    whole = chat.main([*argv, f"--out={tmp_path / 'whole'}"])
    assert (len(whole.losses), whole.step, whole.after) == (6, 3, 3.0)  # the first step's rate is 0
    assert len(whole.answers) == 2  # of conversations that are held out
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "rest" / "checkpoints" / "6")
    monkeypatch.setattr(chat, "mean_nll", nll)
    rest = chat.main([*argv, f"--out={tmp_path / 'rest'}", "--resume"])
    assert (rest.losses, rest.step, rest.after) == (whole.losses[4:], 3, 3.0)
    saved = [tmp_path / x / "adapter" / "adapter_model.safetensors" for x in ("whole", "rest")]
    assert saved[0].read_bytes() == saved[1].read_bytes()


def test_help_has_defaults(capsys):
    """Of each option that has one."""
    with pytest.raises(SystemExit):
        chat.parse(["--help"])
    options = [x.split() for x in re.split(r"^  (?=--)", capsys.readouterr().out, flags=re.M)]
    shown = {words[0]: " ".join(words) for words in options}
    for name, x in vars(chat.parse([])).items():
        if isinstance(x, int | float | str | pathlib.Path) and not isinstance(x, bool):
            assert f"by default {x}" in shown[f"--{name.replace('_', '-')}"]


def test_the_guide_has_flags_that_exist():
    """Each command of README and of the page on chat; its table has every flag with its default."""
    root = pathlib.Path(__file__).parents[2]
    text = (root / "notebooks" / "loops" / "chat.md").read_text("utf-8")
    both = text + (root / "README.md").read_text("utf-8")
    commands = re.findall(r"^ *python examples/chat.py(.*)", both, re.M)
    assert len(commands) > 6 and any(x.startswith(" --base") for x in commands)
    for command in commands:
        chat.parse(shlex.split(command, comments=True))
    rows = re.findall(r"^\| `--([\w-]+)[^|`]*` \| (.*?) \|", text, re.M)
    shown = {name.replace("-", "_"): default for name, default in rows}
    defaults = vars(chat.parse([]))
    assert shown.keys() == defaults.keys()
    numbers = {k: f"{v:g}" for k, v in defaults.items() if type(v) in (int, float)}
    assert {k: shown[k] for k in numbers} == numbers


@pytest.mark.slow
def test_smollm2_learns_to_define(tmp_path, monkeypatch):
    """Its loss at first is that of the guides, which any wrong weight or token would change."""
    monkeypatch.chdir(tmp_path)
    result = chat.main(["--steps=12"])
    assert result.before == pytest.approx(5.140, abs=0.05)
    assert result.after < result.before - 1
