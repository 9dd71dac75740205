"""The guides: every block of Python in them runs as it is written, and does what is said of it.

The blocks of a page run in order and share their names. A block of output right after one is what
it prints, and what it leaves in `losses` has fallen.
"""

import ast
import builtins
import doctest
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import symtable
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import advice
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import processes
import pytest
import tables
import trials
from flax import nnx
from small import set_up

import jlora

Names = dict[str, Any]
GUIDES = pathlib.Path(__file__).parents[1] / "notebooks"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```\n(?:\n```output\n(.*?)^```\n)?", re.M | re.S)
OWN = {"loops/sharding", "loops/cluster"}  # below, and tests/torch/test_torch_cluster.py
# What pages need that has an environment of its own, and warns.
NEEDS = {
    "loops/tunix": ["tunix"],
    "loops/maxtext": ["maxtext"],
    "loops/torch": ["jlora.torch._apply"],
    "loops/head": ["jlora.torch._apply"],
    "loops/image_lora": ["jlora.torch._apply", "diffusers"],
    "loops/vision_language": ["jlora.torch._apply", "peft"],
}


def blocks(page: str) -> list[tuple[str, str | None]]:
    """The code of each block, at the lines where the page has it, and what it prints."""
    text = (GUIDES / f"{page}.md").read_text(encoding="utf-8")
    return [("\n" * text[: m.start(1)].count("\n") + m[1], m[2]) for m in BLOCK.finditer(text)]


PAGES = [p.relative_to(GUIDES).with_suffix("").as_posix() for p in sorted(GUIDES.rglob("*.md"))]
PAGES = [page for page in PAGES if blocks(page)]
LOOPS = [page for page in PAGES if page.startswith("loops/")]
# The others take long to import or to compile.
DAILY = {"concepts", "errors", "migration", "serve", "variants"}
DAILY |= {f"loops/{page}" for page in ("checkpoints", "linen", "mixing", "plain")}


def parameters() -> Iterator[Any]:
    for page in PAGES:
        marks = [] if page in DAILY or page in NEEDS else [pytest.mark.slow]
        marks += [pytest.mark.filterwarnings("ignore")] if page in NEEDS else []
        if page not in OWN:
            yield pytest.param(page, marks=marks)


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    """What a page writes, it writes here; what it sets in the environment is set back."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


def run(page: str, edit: Callable[[str], str] = lambda code: code) -> Names:
    """What the blocks of a page leave behind."""
    names: Names = {"__name__": "guide"}
    for code, _ in blocks(page):
        exec(compile(edit(code), str(GUIDES / f"{page}.md"), "exec"), names)
    return names


def check_learned(losses: list[float]) -> None:
    """They are finite, and the last are well below the first."""
    assert np.isfinite(losses).all()
    assert len(losses) > 1 and losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("page", [*parameters()])
def test_blocks_run_and_print_what_is_shown(page, capsys):
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    names: Names = {"__name__": "guide"}
    for number, (code, shown) in enumerate(blocks(page)):
        losses = names.pop("losses", None)
        exec(compile(code, str(GUIDES / f"{page}.md"), "exec"), names)
        printed = capsys.readouterr().out
        if shown is not None:  # in lines that fit; the line of a reader's own file
            assert re.sub(r"\S+\.md:\d+", "model.py:2", printed).split() == shown.split()
        if "losses" in names:
            check_learned(names["losses"])
        names.setdefault("losses", losses)
        for check in CHECKS.get((page, number), ()):
            check(names)


def test_every_page_has_an_address_of_its_own():
    """A page and a notebook of one name would be written to one place."""
    pages = [p.with_suffix("") for kind in ("*.md", "*.ipynb") for p in GUIDES.rglob(kind)]
    assert len(set(pages)) == len(pages)


HIDDEN = {"jlora.extend.Node", "jlora.types.RankRule", "jlora.many.init"}  # their own arguments


def in_reference() -> dict[str, Any]:
    """The classes and functions of the reference, without those of Keras and PyTorch."""
    pages = "".join(path.read_text() for path in (GUIDES / "reference").glob("*.md"))
    found = set(re.findall(r"auto(?:class|function):: (jlora[\w.]*)\.(\w+)\n", pages))
    assert len(found) > 100
    others = {x for x in found if x[0] in ("jlora.keras", "jlora.torch")}
    return {f"{m}.{n}": getattr(importlib.import_module(m), n) for m, n in found - others}


def test_the_reference_shows_what_to_give():
    """No class or function hides its arguments behind `*args, **kwargs`."""
    for name, thing in in_reference().items():
        if name not in HIDDEN:
            own = inspect.signature(thing) if callable(thing) else ""
            assert not re.search(r"\*args\b|\*\*kwargs\b", str(own)), (name, own)


def test_examples_import_what_they_use():
    """As a reader pastes them; doctests run among the names of the module."""
    for name, thing in in_reference().items():
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
        top = symtable.symtable("".join(x.source for x in examples), name, "exec")
        inner = [x for table in top.get_children() for x in table.get_symbols() if x.is_global()]
        used = {x.get_name() for x in (*top.get_symbols(), *inner) if x.is_referenced()}
        bound = {x.get_name() for x in top.get_symbols() if x.is_assigned() or x.is_imported()}
        assert used <= bound | vars(builtins).keys(), name


def test_code_fits_a_page():
    fence = re.compile(r"^```(?:python|py|bash|yaml)\n(.*?)^```", re.M | re.S)
    for path in [*GUIDES.rglob("*.md"), GUIDES.parent / "README.md"]:
        lines = "".join(fence.findall(path.read_text(encoding="utf-8"))).splitlines()
        assert max(map(len, lines), default=0) <= 72, path


TABLE = tables.read(advice.TABLE)
OTHER_RULES = (
    r"3e-4 and 1e-3|1e-3 and 3e-3|neighbor of the better|two learning rates|a third of it"
    r"|three to five runs"
)


def test_one_rule_for_the_learning_rate():
    """It stands once, and no page has another rule."""
    rule, found = " ".join(advice.RULE.split()), set()
    for path in [*GUIDES.rglob("*.md"), *GUIDES.rglob("*.ipynb"), GUIDES.parent / "README.md"]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        assert not re.search(OTHER_RULES, text), path
        if rule in text:
            found.add(path.relative_to(GUIDES).as_posix())
        if "calculator" in text and path.stem != "variants":
            assert "variants.md#learning-rate" in text, path
    assert found == {"variants.md"}


def test_the_formula_for_the_learning_rate_is_the_one_that_was_fitted():
    """Guides and the calculator have the same numbers."""
    (levels, (p, q)), rate = advice.fit(TABLE), advice.best_rate(TABLE, 1, 1)
    for page in ("variants", "measurements/rates"):
        text = " ".join((GUIDES / f"{page}.md").read_text(encoding="utf-8").split())
        assert f"{rate:.2g} · width^{p:.2f} · batch^{q:.2f}" in text
        off = max(abs(np.log10(10**level / rate)) for level in levels.values())
        assert f"factor of {10**off:.1f}" in text.replace("[", "")


def test_the_table_leads_to_every_loop():
    text = (GUIDES / "loops" / "index.md").read_text(encoding="utf-8")
    pages = {path.stem for path in (GUIDES / "loops").glob("*.md")} - {"index"}
    assert set(re.findall(r"\]\((\w+)\.md\)", text)) == pages


# ---------------------------------------------------------------------- what the pages say of them

CHECKS: dict[tuple[str, int], list[Callable[[Names], None]]] = {}


def of(page: str, number: int = 0) -> Callable[[Callable[[Names], None]], Callable[[Names], None]]:
    """Registers what must hold after a block of a page of loops."""

    def register(check: Callable[[Names], None]) -> Callable[[Names], None]:
        assert (f"loops/{page}", number) in {(p, i) for p in LOOPS for i in range(len(blocks(p)))}
        CHECKS.setdefault((f"loops/{page}", number), []).append(check)
        return check

    return register


def close(a: Any, b: Any, atol: float = 1e-4) -> None:
    """Two trees are equal but for rounding."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 0, atol), a, b)


@of("privacy", 1)
def _privacy(names: Names) -> None:
    """The noise is new at each step; the norm is that of clipped gradients, and of noise."""
    grads = jax.vmap(jax.grad(names["loss_fn"]), (None, None, 0, 0))
    each = grads(names["adapter"], names["base"], names["x"], names["y"])
    first, state = names["private"].update(each, names["private"].init(names["adapter"]))
    second, _ = names["private"].update(each, state)
    noise = optax.tree.norm(jax.tree.map(jnp.subtract, first, second)) / 2**0.5
    expected = 0.5 / len(names["x"]) * jlora.count(first) ** 0.5
    assert abs(noise - expected) < 0.1 * expected
    assert optax.tree.norm(first) < 1 + 2 * expected


@of("rates", 2)
def _rates(names: Names) -> None:
    """The seeds differ; the best mean is inside, and the adapter is its first seed's."""
    held_out, best = names["held_out"], names["best"]
    assert 0 < best < 6 and held_out[best] < 0.5 * held_out[0] and names["state"].running.all()
    test = names["x"][512:], names["y"][512:]
    loss = names["loss_fn"](names["adapter"], names["base"], *test)
    assert loss == pytest.approx(float(names["by_seed"][best, 0]), rel=1e-5)
    assert len(set(names["by_seed"][best].tolist())) == 3
    assert names["start"] == pytest.approx(trials.to_rate(advice.start(TABLE, width=64, batch=16)))


@of("data", 1)
def _data(names: Names) -> None:
    """Every tenth loss is in both logs."""
    [file] = pathlib.Path(names["folder"]).glob("events*")
    assert file.stat().st_size > 200
    assert list(pathlib.Path(names["folder"], "wandb").glob("offline-run-*/*.wandb"))


@of("whole", 3)
def _whole(names: Names) -> None:
    """It stopped three evaluations after the best adapter, which it kept; the log has all."""
    best, lowest, at = (names["rest"][x] for x in ("best", "lowest", "at"))
    total, count = names["nll"](best, names["base"], *names["held_out"])
    assert total / count == pytest.approx(float(lowest), rel=1e-5)
    log = pathlib.Path(names["folder"] + ".csv").read_text()
    steps = [int(line.split(",")[0]) for line in log.splitlines()]
    assert steps == [*range(10, len(names["losses"]) + 1, 10)]
    assert len(names["losses"]) == at + 30 < 500


WRITERS = {"jlora.merge", "checkpoint.save", "checkpoint.export", "peft.save", "peft.save_base"}
WRITERS |= {"peft.write", "peft.export_merged", "adapted.merge"}


def test_the_table_of_files_has_every_way_to_write():
    """Before all else on the page; each is a function or a command."""
    text = (GUIDES / "files_and_serving.md").read_text(encoding="utf-8")
    table = text.split("\n\n")[1]
    calls = set(re.findall(r"`([\w.]+)(?:\(.*?\))?`", table)) - {"jlora.nnx", "jlora.keras"}
    assert calls == WRITERS
    for call in WRITERS - {"adapted.merge"}:
        module, name = call.rsplit(".", 1)
        found = jlora if module == "jlora" else importlib.import_module(f"jlora.{module}")
        assert callable(getattr(found, name)), call
    commands = set(re.findall(r"`jlora (\w+)`", table))
    assert commands == {"convert", "merge"}
    for command in commands:
        assert processes.run("-m", "jlora", command, "--help").returncode == 0


MOST = 1500, 26_000  # words of a page, and of all


def test_guides_end():
    """Advice has so many words at most. What was measured is in pages of its own."""
    pages = [path for path in GUIDES.rglob("*.md") if path.parent.name != "measurements"]
    words = {path: len(path.read_text(encoding="utf-8").split()) for path in pages}
    assert max(words.values()) <= MOST[0], max(words, key=lambda path: words[path])
    assert sum(n for x, n in words.items() if x.parent.name != "reference") <= MOST[1]


def test_every_page_has_a_way_in():
    """The page above links to it, as only the site shows the tree."""
    tree = re.search(r"^TREE = (\{.*?^\})", (GUIDES / "conf.py").read_text(), re.M | re.S)
    for above, groups in ast.literal_eval(tree[1]).items():
        links = re.findall(r"\]\(([^)#:]+)\.(?:md|ipynb)", (GUIDES / f"{above}.md").read_text())
        linked = {os.path.normpath(os.path.join(os.path.dirname(above), x)) for x in links}
        below = set(" ".join(groups.values()).split()) - {"genindex"}  # which Sphinx makes
        assert below <= linked, (above, below - linked)


# What readers call it, and the page that answers, so that the search of the site finds it.
WORDS = {
    "peft": """get_peft_model LoraConfig target_modules exclude_modules modules_to_save task_type
        print_trainable_parameters merge_and_unload unmerge disable_adapter add_adapter TIES DARE
        set_adapter add_weighted_adapter rank_pattern use_dora use_rslora init_lora_weights
        save_pretrained trainable_token_indices prepare_model_for_kbit_training device_map
        BitsAndBytesConfig gradient_checkpointing_enable gradient_accumulation_steps from_pretrained
        Trainer SFTTrainer TRL max_seq_length multi-GPU""",
    "start": "jax[cuda12] jax[tpu] git+https",
    "rules": "target_modules exclude_modules head",
    "versions": "Windows Mac",
    "costs": "tokens/s profile",
    "quantized": "QLoRA bitsandbytes GPTQ AWQ GGUF FP8",
    "free": "Colab Kaggle T4 QLoRA",
    "loops/home": "QLoRA offload checkpointing bf16 fp16 autocast",
    "loops/chat": """QLoRA multi-GPU FSDP Packing train_on_inputs ShareGPT Alpaca truncated resume
        length tokenizer template Evaluation""",
    "loops/sharding": """multi-GPU FSDP parallel pipeline jax.distributed multi-host ring context
        DCN""",
    "loops/whole": """accumulation resumes evaluates MultiSteps lm-eval-harness best weight
        Statistics preemption deterministic validation early""",
    "loops/data": "load_dataset streaming grain tf.data Prefetch wandb TensorBoard MLflow",
    "loops/cluster": "Dockerfile xpk KubeRay",
    "loops/dpo": "DPO ORPO KTO PPO",
    "loops/grpo": "GRPO",
    "loops/head": "classifier reward SEQ_CLS pad_token_id",
    "loops/torch": "Generate from_pretrained autocast",
    "loops/vision_language": "VLM",
    "loops/other": "Whisper",
    "loops/image_lora": "SDXL Flux ComfyUI",
    "loops/mixing": "ties dare",
    "pods": "SLURM GKE JobSet TPU spot",
    "serve": "vLLM swap SGLang sglang-jax llama.cpp GGUF Ollama Studio hub card",
}


@pytest.mark.parametrize("page", WORDS)
def test_the_readers_words_are_on_the_page_that_answers(page):
    [path] = GUIDES.glob(f"{page}.*")
    text = path.read_text(encoding="utf-8")
    assert [word for word in WORDS[page].split() if word not in text] == []


@of("linen")
def _linen(names: Names) -> None:
    merged = jlora.merge(names["base"], names["state"].params)
    before = names["model"].init(names["key"], names["x"])
    close(names["variables"], before, 0)
    kernel, old = (x["params"]["layers_0"]["kernel"] for x in (merged, before))
    assert jnp.abs(kernel - old).max() > 0.01


@of("whole", 6)
def _statistics(names: Names) -> None:
    """The best loss comes back, also from files. The last statistics would spoil it."""
    x, y, best = names["x"][32:], names["y"][32:], min(names["scores"])
    names["again"].eval()
    for model in (names["adapted"], names["again"]):
        assert float(names["loss_of"](model, x, y)) == best != names["scores"][-1]


@of("nnx", 1)
def _nnx(names: Names) -> None:
    model, adapted, merged = names["model"], names["adapted"], names["merged"]
    assert adapted.base is model and type(merged) is type(model) and merged is not model
    close(merged(names["x"]), adapted(names["x"]))
    assert jnp.abs(merged(names["x"]) - model(names["x"])).max() > 0.01


@of("keras")
def _keras(names: Names) -> None:
    assert names["merged"] is names["model"] is names["adapted"].base
    assert ((names["model"](names["x"]) - names["x"][:, :4]) ** 2).mean() < names["losses"][0]
    with pytest.raises(RuntimeError, match="was merged"):
        names["adapted"](names["x"])


@of("home", 3)
def _home(names: Names) -> None:
    """The base stays where it was put, and what is trained is on the device."""
    _, base, adapter = set_up(names["model"], jlora.LoRA(rank=8), names["params"], names["x"])
    kinds = [{x.sharding.memory_kind for x in jax.tree.leaves(t)} for t in (base, adapter)]
    assert kinds == [{"pinned_host"}, {jax.devices()[0].default_memory().kind}]
    assert kinds[0] != kinds[1]


@of("export", 2)
def _export(names: Names) -> None:
    """A file with the backward pass has the gradients of the adapted model."""
    written = jax.export.export(jax.jit(names["adapted"]))(names["arrays"], names["x"])
    read = jax.export.deserialize(written.serialize(vjp_order=1))
    x = jnp.linspace(-1, 1, 24).reshape(3, 8)
    found, expected = (
        jax.grad(lambda arrays, f=f: (f(arrays, x) ** 2).sum())(names["arrays"])
        for f in (read.call, names["adapted"])
    )
    close(found, expected)
    assert all(jnp.abs(g).max() > 0 for g in found)


@of("home", 2)
def _precision(names: Names) -> None:
    lora, base, adapter = (names[x] for x in ("lora", "base", "adapter"))
    x = names["half"](names["x"])
    assert {w.dtype for w in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert {a.dtype for a in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    loss = lambda a: (lora.apply(base, a, x) ** 2).mean(dtype=jnp.float32)  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss))(adapter))
    products = re.findall(r"(\w+)\[[\d,]+\] = dot_general", text)
    assert len(products) > 6 and set(products) == {"bf16"}


@of("dpo", 1)
def _dpo(names: Names) -> None:
    assert names["losses"][0] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference alike


@of("grpo", 2)
def _grpo(names: Names) -> None:
    rewards = names["rewards"]
    assert np.mean(rewards[-5:]) > 0.3 > 5 * np.mean(rewards[:5])
    base, prompts, key = names["base"], names["prompts"], jax.random.key(99)
    before, after = (names["rollout"](x, base, prompts, key) for x in ({}, names["adapter"]))
    assert (after == 7).mean() > 5 * (before == 7).mean()


@of("maxtext", 3)
def _maxtext(names: Names) -> None:
    """A and B are labeled like W, a new trainer goes on, and PEFT's files come back."""
    adapted, folder = names["adapted"], names["folder"]
    query = adapted.lora["decoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert query.a.out_sharding == ("layers", "embed_attn", None)
    assert query.b.out_sharding == ("layers", None, "q_heads", "kv")
    axes = nnx.logical_axis_rules(names["config"].logical_axis_rules)
    with jax.set_mesh(names["mesh"]), axes:
        rule, call, rngs = names["rule"], names["call"], nnx.Rngs(1)
        other = jlora.nnx.adapt(adapted.base, rule, rngs=rngs, example=call)
        again = names["train_sft"].MaxTextPeftTrainer(other, optax.adamw(1e-2), names["plan"])
    assert again.train_steps == 20
    close(nnx.state(other, nnx.LoRAParam), nnx.state(adapted, nnx.LoRAParam), 0)
    again.close()
    rows = names["tables"].maxtext.LLAMA
    loaded = names["peft"].load(folder + "/peft", nnx.state(adapted.base, nnx.Param), rows)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapted.adapter)


@of("maxtext", 5)
def _maxtext_pre_training(names: Names) -> None:
    """The step trains the adapter alone, once in two batches, by the schedule."""
    adapted, losses = names["adapted"], names["losses"]
    assert float(names["found"]) == pytest.approx(losses[-1], rel=0.1)
    assert losses[0] == losses[1] and losses[2] == losses[3]
    kept = jax.tree.leaves(names["best"])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(adapted.adapter), kept)
    axes = nnx.logical_axis_rules(names["config"].logical_axis_rules)
    with jax.set_mesh(names["mesh"]), axes:
        before = names["from_config"](names["config"], mesh=names["mesh"], rngs=nnx.Rngs(0))
    weights = (nnx.state(x, nnx.Param) for x in (adapted.base, before))
    jax.tree.map(np.testing.assert_array_equal, *weights)


@of("tunix", 4)
def _tunix_stops(names: Names) -> None:
    """Where the loss on other data grows; the steps are updates of two batches."""
    trainer, history = names["trainer"], names["patience"].history
    assert 4 <= trainer.train_steps < 40 and trainer.iter_steps == 2 * trainer.train_steps
    assert min(history[-2:]) > min(history)
    inputs = trainer.gen_model_input_fn(names["other"])
    best = jax.tree.leaves(trainer.eval_loss_fn(names["adapted"], **inputs))[0]
    assert best == pytest.approx(min(history), rel=1e-4)
    found = [x for x in jax.tree.leaves(nnx.state(trainer.optimizer)) if x.dtype == jnp.int32]
    assert trainer.train_steps in [int(x) for x in found if x.ndim == 0]
    text = str(jax.make_jaxpr(lambda ids: trainer.model(ids, *names["call"][1:])[0])(names["ids"]))
    assert "remat" in text or "checkpoint" in text


@of("tunix", 8)
def _tunix_grpo(names: Names) -> None:
    """The policy learns, and actor, rollouts and reference hold one copy of the base."""
    cluster, rewards = names["cluster"], names["rewards"]
    assert rewards[0] < 0.1 and rewards[-1] > 0.8
    roles = cluster.actor_trainer.model, cluster.rollout.model(), names["reference"]
    held = [
        {x.addressable_data(0).unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(m.base))}
        for m in roles
    ]
    assert held[0] == held[1] == held[2]


@of("tunix", 1)
def _tunix(names: Names) -> None:
    """Metrics are there, the adapter alone is saved, and a new trainer goes on from it."""
    trainer, adapted = names["trainer"], names["adapted"]
    before = names["Llama3"](adapted.base.config, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(adapted.base), nnx.state(before))
    close(adapted(*names["call"])[0], adapted.merge()(*names["call"])[0], 1e-3)

    rule, rngs = jlora.LoRA(rank=8), nnx.Rngs(1)
    other = jlora.nnx.adapt(before, rule, rngs=rngs, example=names["call"])
    again = names["PeftTrainer"](other, optax.adamw(1e-2), names["plan"])
    assert again.train_steps == 30
    close(nnx.state(other, nnx.LoRAParam), nnx.state(adapted, nnx.LoRAParam), 0)
    moments, restored = (nnx.state(x.optimizer, nnx.optimizer.OptState) for x in (trainer, again))
    close(moments, restored, 0)
    with ocp.PyTreeCheckpointer() as orbax:
        saved = orbax.metadata(pathlib.Path(names["folder"], "30", "model_params")).item_metadata
    assert list(saved.tree) == ["lora"]
    again.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page, steps", [("loops/whole", 501), ("loops/data", 61)])
def test_a_loop_goes_on(page, steps, tmp_path, monkeypatch):
    """To the losses of a run that was not stopped, bit for bit."""
    for module in NEEDS.get(page, ()):
        pytest.importorskip(module)
    whole = run(page)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path / "stopped"))

    def stop(code: str) -> str:
        early = code.replace(f"last + 1, {steps})", "last + 1, 26)")
        return early.replace('folder + "-', 'folder + "-stopped-')

    first = run(page, stop)
    second = run(page)
    assert len(first["losses"]) == 25 and second["last"] == 20
    assert first["losses"] == whole["losses"][:25]
    assert second["losses"] == whole["losses"][20:]
    for name in {"adapter", "rest"} & whole.keys():
        jax.tree.map(np.testing.assert_array_equal, second[name], whole[name])


# ------------------------------------------------------------------------ in processes of their own

REPORT = """
import json
tree = jax.tree.map(lambda x: str(x.sharding.spec), (adapter, state))
print(json.dumps([losses, jax.tree.leaves(tree), jax.device_count()]))
"""


def start(*numbers: int, **environment: str) -> subprocess.Popen[str]:
    """A process that runs blocks of the page on devices and prints what came of it."""
    page = blocks("loops/sharding")
    code = "".join(page[number][0] for number in numbers) + REPORT
    return processes.start("-W", "error", "-c", code, env=environment, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> tuple[list[float], list[str], int]:
    """Losses, how the leaves of adapter and state lie, and the number of devices."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    losses, specs, devices = json.loads(out.splitlines()[-1])
    check_learned(losses)
    return losses, specs, devices


@pytest.mark.slow
def test_sharding():
    _, specs, devices = finish(start(0, 1))
    assert devices == 8
    of_adapter = ["P('tensor',)", "P(None, 'fsdp')", "P('fsdp',)", "P(None, 'tensor')"]
    specs = [spec.replace(", None)", ",)") for spec in specs]  # which is the same
    assert specs == [*of_adapter, "P()", *of_adapter, *of_adapter]  # a count, and two moments


def job(count: int) -> list[tuple[list[float], list[str], int]]:
    """What came of the page on many hosts, in each of some processes."""
    where = f"localhost:{processes.free_port()}"
    started = [start(2, 1, JOB=f"{where} {count} {i}") for i in range(count)]
    return [finish(process) for process in started]


@pytest.mark.slow
def test_hosts():
    """Two processes have the losses of one."""
    [(alone, whole, _)] = job(1)
    assert len(whole) == 7
    (first, specs, devices), (second, _, _) = job(2)
    assert devices == 2
    assert "P('fsdp', None)" in specs
    assert first == second
    np.testing.assert_allclose(first, alone, 0, 1e-6)
