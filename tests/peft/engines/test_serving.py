"""What engines are given: tensors in memory, and adapters that `check` has looked at.

The rules of the engines are told by damages: each is made to one adapter that all of them take,
with what each engine does with it.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import peft_models as models
import pytest
from messages import check_text, refused
from peft_files import CONFIG, PREFIX, TENSORS, Folder, bounded, config_of, node, normal
from safetensors.numpy import save_file
from small import some

from jlora import peft
from jlora.peft import Name
from tests.cli.test_cli import PLAIN, run
from tests.peft.merge.test_peft_merged import base_of, checkpoint

Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]
# --------------------------------------------------------------------------------- in memory


FIXTURES = ("conv", "dora_scanned", "experts", "gpt2_tied", "modules_to_save", "tokens")


@pytest.mark.parametrize("name", some(models.CASES, *FIXTURES))
def test_tensors_are_those_that_are_saved(name: str, tmp_path: Folder) -> None:
    """Keys, dtypes, shapes and bits of the file; PEFT's own where the configuration is kept."""
    case = models.case(name)
    args = case.base, peft.load(case.folder, case.base, case.names), case.names
    profiles = [{"profile": "vllm"}] if name in PLAIN else []
    config = {"config": config_of(case.folder)}
    for i, options in enumerate(({}, *profiles, config)):
        ours = peft.tensors(*args, **options)
        peft.save(tmp_path / f"{i}", *args, **options)
        files = [tmp_path / f"{i}", *([case.folder] if options is config else [])]
        for saved in (models.read(folder / TENSORS) for folder in files):
            assert saved.keys() == ours.keys()
            for key, x in saved.items():
                assert (ours[key].dtype, ours[key].shape) == (x.dtype, x.shape)
                assert ours[key].tobytes() == x.tobytes()


def test_tensors_copy_what_must_be_moved_alone() -> None:
    """A leaf that lies as in PyTorch is not copied, and the caller's tree is as it was."""
    names = [Name("w", "m", "io"), Name("b", "m", "o", "bias")]
    base = {"w": normal(0, 4, 6), "b": normal(1, 6)}
    adapter = {"w": node(names[0], (4, 6), 2, 1.5), "b": normal(2, 6)}
    before = jax.tree.map(np.array, adapter)
    found = peft.tensors(base, adapter, names)
    assert np.shares_memory(found[f"{PREFIX}m.base_layer.bias"], np.asarray(adapter["b"]))
    assert not np.shares_memory(found[f"{PREFIX}m.lora_A.weight"], np.asarray(adapter["w"].a))
    jax.tree.map(np.testing.assert_array_equal, adapter, before)


# -------------------------------------------------------------------------- what engines take

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "vocab_size": 11,
}


def good() -> tuple[Fields, Tensors]:
    """An adapter of a small Llama, of PEFT, of all of its linear modules."""
    folder = models.FIXTURES / "all_linear"
    fields = config_of(folder)
    lasts = {name.rpartition(".")[2] for name in fields["target_modules"]}
    return fields | {"target_modules": sorted(lasts)}, models.read(folder / TENSORS)


def write(folder: Folder, fields: Fields, tensors: Tensors) -> Folder:
    folder.mkdir()
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(fields))
    return folder


@functools.cache
def llama() -> Tensors:
    return base_of(models.case("all_linear"))


def renamed(tensors: Mapping[str, np.ndarray], old: str, new: str) -> Tensors:
    return {re.sub(old, new, key): x for key, x in tensors.items()}


Change = Callable[[Fields, Tensors], tuple[Fields, Tensors]]


def write_both(
    folder: Folder, change: Change | None = None, base: Any = None
) -> tuple[Folder, Folder]:
    """The good adapter and its base, changed."""
    fields, tensors = good() if change is None else change(*good())
    weights, config = (llama(), LLAMA) if base is None else base(llama(), LLAMA)
    place = write(folder / "adapter", fields, tensors)
    return place, checkpoint(folder / "base", weights, **config)


def of(**new: Any) -> Change:
    """Other fields."""
    return lambda fields, tensors: (fields | new, tensors)


def without(key: str) -> Change:
    """A field less."""
    return lambda fields, tensors: ({k: x for k, x in fields.items() if k != key}, tensors)


def holding(new: Mapping[str, Any] = {}, drop: str = "^$", **fields: Any) -> Change:
    """Other tensors, given by shape; and without those whose keys match."""

    def change(old: Fields, tensors: Tensors) -> tuple[Fields, Tensors]:
        kept = {k: x for k, x in tensors.items() if not re.search(drop, k)}
        return old | fields, kept | {PREFIX + k: np.ones(x, np.float32) for k, x in new.items()}

    return change


def named(old: str, new: str) -> Change:
    """Other keys."""
    return lambda fields, tensors: (fields, renamed(tensors, old, new))


def adding(new: Mapping[str, Any], **fields: Any) -> Any:
    """A base with other weights too, given by shape, and other fields."""
    weights = {f"{k}.weight": np.ones(x, np.float32) for k, x in new.items()}
    return lambda old, config: (old | weights, config | fields)


def pair(module: str, rows: int = 8, columns: int = 8, rank: int = 4) -> dict[str, Any]:
    """Shapes of A and B."""
    return {f"{module}.lora_A.weight": (rank, columns), f"{module}.lora_B.weight": (rows, rank)}


def embedding(module: str, size: int) -> dict[str, Any]:
    """Shapes of A and B of an embedding."""
    return {f"{module}.lora_embedding_A": (4, size), f"{module}.lora_embedding_B": (8, 4)}


LAYER = "model.layers.0"
Q, DOWN, EXPERTS = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.experts"
EACH = {
    f"{EXPERTS}.{i}.{name}_proj": shape
    for i in (0, 1)
    for name, shape in (("gate", (12, 8)), ("up", (12, 8)), ("down", (8, 12)))
}


def experts(gate: tuple[int, int] = (24, 8), down: tuple[int, int] = (8, 12)) -> dict[str, Any]:
    """Shapes of A and B of two experts, B·A of these shapes."""
    return pair(f"{EXPERTS}.base_layer", *gate, rank=8) | pair(EXPERTS, *down, rank=8)


def moe(weights: Tensors, config: Fields) -> tuple[Tensors, Fields]:
    """A base that has experts as one parameter."""
    fused = {"gate_up_proj": (2, 24, 8), "down_proj": (2, 8, 12)}
    new = {f"{EXPERTS}.{n}": np.ones(s, np.float32) for n, s in fused.items()}
    return weights | new, config | {"architectures": ["GptOssForCausalLM"]}


def moe_one_by_one(weights: Tensors, config: Fields) -> tuple[Tensors, Fields]:
    """The same, of a model whose experts vLLM adapts one by one."""
    return moe(weights, config)[0], config | {"architectures": ["Gemma4ForCausalLM"]}


VLLM, TPU = ENGINES = ("vllm", "tpu-inference")
# A change of the adapter, and what engines find: their first letters, `!` for what they refuse or
# `~` for what they drop silently, and `what`.
ADAPTERS: dict[str, tuple[Any, ...]] = {
    "none": (of(),),
    "no alpha": (without("lora_alpha"), "vt! lora_alpha"),
    "no kind": (without("peft_type"),),
    "another kind": (of(peft_type="LOHA"), "vt~ peft_type"),
    "a rank in words": (of(r="4"), "vt! r"),
    "a bad pattern": (of(rank_pattern={"(": 3}), "vt! rank_pattern"),
    "a bad choice": (of(target_modules="("), "vt! target_modules"),
    "DoRA": (
        holding({f"{Q}.lora_magnitude_vector": (8,)}, use_dora=True),
        "vt! use_dora; vt! .*magnitude_vector"
    ),
    "biases": (
        holding({f"{Q}.base_layer.bias": (8,)}, bias="lora_only"),
        "vt! bias; vt! .*base_layer.bias"
    ),
    "bias of B": (
        holding({f"{Q}.lora_B.bias": (8,)}, lora_bias=True),
        "vt! lora_bias; vt! .*q_proj.lora_B.bias"
    ),
    "aLoRA": (
        of(alora_invocation_tokens=[1]), "vt! alora_invocation_tokens"
    ),
    "a later feature": (of(zora_config=[1]), "vt~ zora_config"),
    "of training": (of(velora_config={"a": 1}),),
    "PiSSA": (of(init_lora_weights="pissa"), "vt! init_lora_weights"),
    "EVA": (of(init_lora_weights="eva", eva_config={"rho": 2.0}),),
    "rsLoRA": (of(use_rslora=True),),
    "ranks": (of(rank_pattern={"nothing": 4}),),
    "alphas": (of(alpha_pattern={"q_proj": 2}),),
    "another rank": (
        holding(pair(Q, rank=3)), f"vt~ .*{Q}.lora_A.* and 1 more"
    ),
    "heads of none": (
        holding({"score.weight": (3, 8)}, modules_to_save=["score"]),
        "vt! modules_to_save score"
    ),
    "norms": (
        holding({"model.norm.weight": (8,)}, modules_to_save=["norm"]),
        "vt! modules_to_save norm; vt! .*model.norm.weight"
    ),
    "a pattern of targets": (of(target_modules=".*_proj"),),
    "a word for all": (of(target_modules="all-linear"),),
    "other names": (
        lambda f, t: (
            f | {"target_modules": [*f["target_modules"], "query"]},
            renamed(t, "q_proj", "query"),
        ),
        f"vt! {LAYER}.self_attn.query and 1 more"
    ),
    "another prefix": (
        named(r"model\.layers", "decoder.layers"), "vt~ decoder.layers.0.mlp.down_proj and 13 more"
    ),
    "a prefix less": (
        named(r"\.model\.layers", ".layers"), "vt~ layers.0.mlp.down_proj and 13 more"
    ),
    "too many layers": (
        holding(
            pair("model.layers.2.self_attn.q_proj") | pair("model.layers.2.self_attn.v_proj", 4)
        ),
        "vt~ model.layers.2.self_attn.q_proj and 1 more"
    ),
    "smaller sizes": (holding({f"{Q}.lora_A.weight": (4, 6)}), f"vt~ {Q}"),
    "larger sizes": (holding({f"{Q}.lora_A.weight": (4, 9)}), f"vt! {Q}"),
    "a lone A": (holding(drop=r"0\.self_attn\.q_proj\.lora_B"), f"vt! .*{Q}.lora_A.weight"),
    "nothing": (holding(drop="."), "vt! adapter_model.safetensors"),
    "q alone": (holding(drop=r"\.[vk]_proj\."),),
    "no k": (holding(drop=r"\.k_proj\."),),
    "up alone": (holding(drop=r"\.gate_proj\."),),
    "embeddings": (
        holding(
            embedding("model.embed_tokens", 11)
            | {"model.embed_tokens.base_layer.weight": (11, 8)}
            | pair("lm_head", 11),
            target_modules=["q_proj", "gate_proj", "down_proj", "model.embed_tokens"],
        ),
        "t~ lm_head and 1 more"
    ),
    "a longer vocabulary": (
        holding(
            embedding("model.embed_tokens", 13),
            target_modules=[*good()[0]["target_modules"], "embed_tokens"],
        ),
        "vt! model.embed_tokens; t~ model.embed_tokens"
    ),
    "a convolution": (
        holding({f"{DOWN}.lora_A.weight": (4, 12, 1), f"{DOWN}.lora_B.weight": (8, 4, 1)}),
        f"vt! .*{DOWN}.lora_A.weight and 1 more"
    ),
}  # fmt: skip
# A change of the adapter and one of its base, and what engines find.
BASES: dict[str, tuple[Any, ...]] = {
    "no rank": (
        lambda f, t: ({k: x for k, x in f.items() if k != "r"}, {k: np.ones((8, 8)) for k in t}),
        lambda w, c: ({k: np.ones((8, 8)) for k in w}, c), "vt! r"
    ),
    "heads": (
        holding({"score.weight": (3, 8)}, modules_to_save=["classifier", "score"]),
        adding({}, architectures=["LlamaForSequenceClassification"])
    ),
    "a model within another": (
        of(),
        lambda w, c: (
            renamed(w, "^model", "model.language_model"),
            {"architectures": c["architectures"], "text_config": c},
        ),
        "vt~ .* and 13 more"
    ),
    "both within another": (
        named(r"model\.model\.", "model.model.language_model."),
        lambda w, c: (
            renamed(w, "^model", "language_model.model"),
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": c},
        )
    ),
    "parts that the model has fused": (
        holding(pair(f"{LAYER}.mlp.gate_up_proj", 24, 8)),
        adding({f"{LAYER}.mlp.gate_up_proj": (24, 8)}, architectures=["Glm4ForCausalLM"]),
        f"vt! {LAYER}.mlp.gate_up_proj"
    ),
    "what is fused in the model too": (
        holding(pair(f"{LAYER}.mlp.gate_up_proj", 24, 8)),
        adding({f"{LAYER}.mlp.gate_up_proj": (24, 8)}, architectures=["Phi3ForCausalLM"])
    ),
    "the adapter within another": (
        named(r"model\.layers", "model.language_model.layers"), adding({}),
        "vt~ model.language_model.layers.0.mlp.down_proj and 13 more"
    ),
    "the adapter within another, for Gemma 4": (
        named(r"model\.layers", "model.language_model.layers"),
        adding({}, architectures=["Gemma4ForCausalLM"])
    ),
    "a model that takes none": (
        of(), adding({}, architectures=["GPT2LMHeadModel"]), "vt! GPT2LMHeadModel"
    ),
    "a model whose embeddings stay": (
        holding(
            embedding("model.embed_tokens", 11),
            target_modules=[*good()[0]["target_modules"], "embed_tokens"],
        ),
        adding({}, architectures=["Qwen2ForCausalLM"]),
        "vt! model.embed_tokens; t~ model.embed_tokens"
    ),
    "a base without its head": (of(), lambda w, c: (renamed(w, r"^model\.", ""), c),),
    "a tower": (
        holding(pair("visual.blocks.0.q_proj")),
        adding({"visual.blocks.0.q_proj": (8, 8)}, vision_config={"hidden_size": 4}),
        "vt~ visual.blocks.0.q_proj"
    ),
    "positions": (
        holding(embedding("model.positions", 5)),
        adding({"model.positions": (5, 8)}), "vt! model.positions"
    ),
    "experts": (
        holding(experts(), target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        moe, f"t! {EXPERTS}"
    ),
    "experts of the other orientation": (
        holding(experts((8, 24), (12, 8))),
        moe, f"vt! {EXPERTS}; t! {EXPERTS}"
    ),
    "one of two": (
        holding(pair(EXPERTS, 24, 8, rank=8)),
        moe, f"vt! {EXPERTS}; t! {EXPERTS}"
    ),
    "experts one by one in the base": (
        holding(experts()),
        adding(EACH), f"vt! {EXPERTS}; t! {EXPERTS}"
    ),
    "experts together, for vLLM one by one": (
        holding(experts()), moe_one_by_one, f"vt! {EXPERTS}; t! {EXPERTS}"
    ),
    "experts one by one, in the base together": (
        holding({key: x for m, shape in EACH.items() for key, x in pair(m, *shape).items()}),
        moe_one_by_one, f"t! {EXPERTS}.0.down_proj and 5 more"
    ),
    "experts one by one": (
        holding({key: x for m, shape in EACH.items() for key, x in pair(m, *shape).items()}),
        adding(EACH), f"t! {EXPERTS}.0.down_proj and 5 more"
    ),
    "experts one by one in the adapter": (
        holding(pair(f"{EXPERTS}.0.down_proj", 8, 12)),
        moe, f"vt! {EXPERTS}.0.down_proj; t! {EXPERTS}.0.down_proj"
    ),
}  # fmt: skip
DAMAGES = {name: (change, None, *lines) for name, (change, *lines) in ADAPTERS.items()} | BASES


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages(damage: str, tmp_path: Folder) -> None:
    """Each is found by each engine as it should be, and nothing else is."""
    change, base, *lines = DAMAGES[damage]
    expected = re.findall(r"(\w+)([!~]) ([^;]+)", "; ".join(lines))
    folders = write_both(tmp_path, change, base)
    for engine in ENGINES:
        found = peft.check(folders[0], engine, base=folders[1]).findings
        own = [rest for letters, *rest in expected if engine[0] in letters]
        for kind, what in own:
            fits = [x for x in found if re.fullmatch(what, x.what) and x.silent == (kind == "~")]
            assert len(fits) == own.count([kind, what]), (engine, what, found)
        assert len(found) == len(own), (engine, found)
        check_text("\n".join([f"{engine}:", *map(str, found)]))
        for x in found:
            kind = "dropped silently" if x.silent else "refused"
            assert str(x) == f"{kind}: {x.what}: {x.why}. {x.remedy}."
            assert x.remedy[0].isupper()


@pytest.mark.parametrize("engine", ENGINES)
def test_what_older_versions_drop(engine: str, tmp_path: Folder) -> None:
    """It is no finding: the exit code is that of the version that was asked for."""
    patterns = {"rank_pattern": {"nothing": 4}, "alpha_pattern": {"q_proj": 2}}
    place, _ = write_both(tmp_path, of(**patterns))
    text = run("check", place, "--for", engine).stdout
    notes = peft.check(place, engine).notes
    assert [x.split()[0] for x in notes] == [*patterns]
    check_text("\n".join(notes))
    assert text.splitlines()[1:] == [f"note: {x}" for x in notes]
    assert " supports it: " in text


def test_a_base_with_experts(tmp_path: Folder) -> None:
    """On TPUs, the engine starts with an option only."""
    place, base = write_both(tmp_path, of(), moe)
    assert not peft.check(place, "vllm", base=base).notes
    [note] = peft.check(place, TPU, base=base).notes
    check_text(note)


def test_a_model_that_vllm_has_not(tmp_path: Folder) -> None:
    """It may run it by transformers, which adapts the embedding but not the head."""
    change = holding(embedding("model.embed_tokens", 11) | pair("lm_head", 11))
    place, base = write_both(tmp_path, change, adding({}, architectures=["OurForCausalLM"]))
    found = peft.check(place, "vllm", base=base)
    assert [(x.what, x.silent) for x in found.findings] == [("lm_head", False)]
    check_text(str(found))


def test_an_adapter_that_is_taken(tmp_path: Folder) -> None:
    """The answer says how to start the engine, on one line."""
    place = write(tmp_path / "it's", *good())
    base = checkpoint(tmp_path / "base", llama(), **LLAMA)
    answer = peft.check(place, "vllm", base=base)
    assert answer.compared and not answer.findings
    check_text(str(answer))
    assert str(answer).endswith(f"""--max-lora-rank 16 --lora-modules NAME='{tmp_path}/it'"'"'s'""")
    check_text(str(peft.check(place, "tpu-inference", max_lora_rank=64)))


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_heads_without_a_base(task: str | None, tmp_path: Folder) -> None:
    """Whether it is a classifier is in the adapter's configuration."""
    change = holding({"score.weight": (3, 8)}, modules_to_save=["score"], task_type=task)
    place = write(tmp_path / "a", *change(*good()))
    found = peft.check(place, "vllm").findings
    assert [x.what for x in found] == ([] if task else ["modules_to_save score"])


RANKS = {  # an engine, the rank of A and B, the option: the largest rank that the server has
    (VLLM, 16, None): None,
    (VLLM, 17, None): 16,
    (TPU, 17, None): 16,
    (VLLM, 17, 32): None,
    (VLLM, 9, 8): 8,
    (VLLM, 513, None): 512,
}


@pytest.mark.parametrize(("engine", "rank", "option"), RANKS)
def test_ranks(engine: str, rank: int, option: int | None, tmp_path: Folder) -> None:
    """The largest rank is that of the server, and of those that it has."""
    shapes = pair("model.q_proj", rank=rank) | pair("model.v_proj", rank=rank)
    place = write(tmp_path / "a", *holding(shapes, drop=".", r=rank)(*good()))
    found = [x for x in peft.check(place, engine, max_lora_rank=option).findings if x.what == "r"]
    most = RANKS[engine, rank, option]
    assert len(found) == (most is not None)
    for x in found:
        assert not x.silent and x.why.startswith(f"{rank} is above ") and str(most) in x.why
        check_text(str(x))


def test_the_largest_of_many_ranks(tmp_path: Folder) -> None:
    """Those of patterns count."""
    place, _ = write_both(tmp_path, of(rank_pattern={"nothing": 65}))
    [found] = peft.check(place, "vllm").findings
    assert "Start the server with --max-lora-rank 128" in str(found)


def test_arguments(tmp_path: Folder) -> None:
    """Engines and ranks that there are not."""
    place = models.FIXTURES / "all_linear"
    with refused(ValueError, "engine", "got 'tgi'.", "vllm, tpu-inference"):
        peft.check(place, "tgi")
    with refused(ValueError, "max_lora_rank", "got 9.", "(1, 8, "):
        peft.check(place, "vllm", max_lora_rank=9)
    with refused(FileNotFoundError, "base", tmp_path / "nowhere", "there is no folder"):
        peft.check(place, "vllm", base=tmp_path / "nowhere")
    with refused(ValueError, "base", place.parent, "has neither model.safetensors nor"):
        peft.check(place, "vllm", base=place.parent)


# --------------------------------------------------------------------------------- remedies


# What is for vLLM is taken by it but for embeddings by other names than it knows.
UNKNOWN = {
    "embeddings": "embeddings.position_embeddings and 1 more",
    "gpt2_tied": "transformer.wpe",
}
HELPED = ("patterns", "rslora", "scanned")


@pytest.mark.parametrize("name", some([*PLAIN, "scanned"], *UNKNOWN, *HELPED))
def test_the_profile_helps(name: str, tmp_path: Folder) -> None:
    """One rank and the scales in B: nothing is left of what that is said to help against."""
    folder, out = models.FIXTURES / name, tmp_path / "out"
    peft.write(out, peft.read(folder), "vllm")
    for engine in ENGINES:
        after = peft.check(out, engine).findings
        assert not any("--profile vllm" in x.remedy for x in after)
        found = [x.what for x in after if "base_layer" not in x.what and "TPUs" not in x.why]
        assert found == ([UNKNOWN[name]] if name in UNKNOWN else [])


def test_what_jlora_saves_is_taken_by_all(tmp_path: Folder) -> None:
    """Of a model by its table, against the base that `save_base` writes."""
    case = models.case("scanned")
    adapter = peft.load(case.folder, case.base, case.names)
    peft.save(tmp_path / "a", case.base, adapter, case.names, profile="vllm")
    peft.save_base(tmp_path / "base", case.base, case.names, config=LLAMA)
    for engine in ENGINES:
        assert peft.check(tmp_path / "a", engine, base=tmp_path / "base").findings == []


# ------------------------------------------------------------------------- the command line


def test_command(tmp_path: Folder) -> None:
    """Exit code 0 and one line, or 1 and a line for each finding."""
    place, base = write_both(tmp_path)
    for engine in ENGINES:
        text = run("check", place, "--for", engine, "--base", base).stdout
        assert text.count("\n") == 1 and " supports it: " in text
    bad = write(tmp_path / "b", *of(zora_config=[1], use_dora=True)(*good()))
    lines = run("check", bad, "--for", "vllm", "--base", base, code=1).stdout.splitlines()
    found = [line.split(": ")[:3] for line in lines]
    title = peft.check(bad, "vllm").engine
    assert found == [[title, "refused", "use_dora"], [title, "dropped silently", "zora_config"]]
    run("check", place, "--for", "vllm", "--max-lora-rank", 1, code=1)


def test_command_in_json(tmp_path: Folder) -> None:
    """All of it for programs."""
    place = write(tmp_path / "a", *of(use_dora=True)(*good()))
    found = json.loads(run("check", place, "--for", "vllm", "--json", code=1).stdout)
    answer = peft.check(place, "vllm")
    start = "vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules NAME="
    assert found == {
        "path": str(place),
        "engine": "vLLM 0.32.0",
        "findings": [x._asdict() for x in answer.findings],
        "start": f"{start}{place}",
        "compared": False,
        "notes": [],
    }
    assert found["findings"][0].keys() == {"what", "why", "remedy", "silent"}


# ----------------------------------------------------------------------- files from strangers


def test_many_names(tmp_path: Folder) -> None:
    """None of the modules is as in the base: a few lines, after bounded work."""
    parts = [f"layers.{i}.mlp.{n}_proj" for i in range(1_000) for n in ("gate", "up")]
    shapes = {k: s for part in parts for k, s in pair(f"a.{part}", 1, 1, 1).items()}
    patterns = {rf"layers\.{i}\.mlp\.gate_proj": 2 for i in range(1_000)}
    change = holding(shapes, drop=".", r=1, rank_pattern=patterns)
    place = write(tmp_path / "a", *change(*good()))
    weights = {f"b.{part}.weight": np.ones((1, 1), np.float32) for part in parts}
    base = checkpoint(tmp_path / "base", weights, **LLAMA)
    for engine in ENGINES:
        with bounded(3):
            answer = peft.check(place, engine, base=base)
        assert 1 <= len(answer.findings) < 9
        assert len(str(answer)) < 4000


ODD = [None, True, -1, 2**70, "x" * 10_000, [], ["a"], {"a": []}, [[]]]


@pytest.mark.parametrize("key", [*LLAMA, "text_config", "tie_word_embeddings"])
def test_odd_bases(key: str, tmp_path: Folder) -> None:
    """A configuration that is not what it should be says nothing, or little."""
    place = write(tmp_path / "a", *good())
    base = tmp_path / "base"
    for value in ODD:
        checkpoint(base, llama(), **LLAMA | {key: value})
        for engine in ENGINES:
            assert len(peft.check(place, engine, base=base).findings) < 3
