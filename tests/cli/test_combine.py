"""`jlora combine`: the ΔW of what is written is that of the arithmetic."""

import json
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft_models as models
import pytest
from messages import check_text
from peft_files import CONFIG, ENDS, PREFIX, TENSORS, Files, Folder, config_of, pair, write
from safetensors.numpy import save_file
from small import some

import jlora
from jlora import arithmetic, checkpoint, peft
from tests.cli.test_cli import fails, run
from tests.peft.test_peft_hostile import adapter as plain
from tests.peft.test_peft_hostile import bounded, many

WEIGHTS = (0.7, -0.3)
FULL = ("bias", "bias_all", "conv", "experts", "modules_to_save", "modules_to_save_head")
CASES = [name for name in models.CASES if name not in (*FULL, *models.BEYOND)]


def other(folder: Folder, name: str, **fields: Any) -> Folder:
    """A fixture with other values in A and B, and other fields."""
    shutil.copytree(models.FIXTURES / name, folder, ignore=shutil.ignore_patterns("torch*"))
    tensors = models.read(folder / TENSORS)
    new = {
        key: x if "base_layer" in key else np.sin(3 * x.astype(np.float32) + 1).astype(x.dtype)
        for key, x in tensors.items()
    }
    save_file(new, folder / TENSORS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


def combine(folders: list[Folder], out: Folder, weights: tuple[float, ...] = ()) -> str:
    """From files to a file; what is said of it."""
    each = ",".join(map(str, weights or [1] * len(folders)))
    return run("combine", *folders, out, f"--weights={each}").stdout


def deltas(folder: Folder) -> dict[str, np.ndarray]:
    """ΔW of each module in float64."""
    with jax.enable_x64(True):
        found = peft.read(folder).leaves
    return {name: x.scale * np.float64(x.a) @ np.float64(x.b) for name, x in found.items()}


def check_sum(folders: list[Folder], out: Folder, weights: tuple[float, ...] = WEIGHTS) -> None:
    """To the rounding of float32."""
    each, found = [deltas(folder) for folder in folders], deltas(out)
    assert found.keys() == set().union(*each)
    for module, x in found.items():
        expected = sum(w * d[module] for w, d in zip(weights, each, strict=True) if module in d)
        np.testing.assert_allclose(x, expected, atol=2e-7 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", some(CASES, "bf16", "embeddings", "gpt2_tied", "rslora", "tied"))
def test_the_sum(name: str, tmp_path: Folder) -> None:
    """What is written says of itself what it is.

    rsLoRA, patterns, ties and embeddings too. The fixture's model takes it.
    """
    case, mine = models.case(name), other(tmp_path / "b", name)
    text = combine([case.folder, mine], tmp_path / "c", WEIGHTS)
    check_sum([case.folder, mine], tmp_path / "c")
    peft.load(tmp_path / "c", case.base, case.names)
    fields = config_of(tmp_path / "c")
    assert fields["use_rslora"] is False and "2 adapters by add" in text


# One model, whose modules they select by a pattern, by lists, by layers and by names.
LLAMAS = ("patterns", "excluded", "layers", "all_linear")


@pytest.mark.parametrize("names", some([LLAMAS[:2], LLAMAS[1:3], LLAMAS], LLAMAS[:2]))
def test_different_modules_ranks_and_scales(names: tuple[str, ...], tmp_path: Folder) -> None:
    """Each module is selected that one of them has, and no other; the ranks add up."""
    folders = [other(tmp_path / name, name) for name in names]
    folders[0] = other(tmp_path / "rs", names[0], use_rslora=True)
    weights = (0.5, -2.0, 1.0, 0.25)[: len(names)]
    combine(folders, tmp_path / "out", weights)
    check_sum(folders, tmp_path / "out", weights)
    case = models.case(names[0])
    peft.load(tmp_path / "out", case.base, case.names)


KEPT: dict[str, tuple[list[list[str]], list[dict[str, Any]], dict[str, Any]]] = {
    "layer 0 is a layer": (
        [["m.layers.0.q"], ["m.layers.0.q", "m.layers.1.q"]],
        [{"layers_to_transform": 0}, {}],
        {"target_modules": ["m.layers.0.q", "m.layers.1.q"]},
    ),
    "what all say, and a base": (
        [["m.q"], ["m.q"]],
        [
            {"base_model_name_or_path": None, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
            {"base_model_name_or_path": "it", "lora_dropout": 0.2, "task_type": "CAUSAL_LM"},
        ],
        {"base_model_name_or_path": "it", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"},
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_of_the_configurations(case: str, tmp_path: Folder) -> None:
    modules, given, expected = KEPT[case]
    each = zip("ab", modules, given, strict=True)
    folders = [plain(tmp_path / name, own, **fields) for name, own, fields in each]
    combine(folders, tmp_path / "out")
    found = config_of(tmp_path / "out")
    assert {key: found[key] for key in expected} == expected


def random_adapter(folder: Folder, seed: int, shapes: dict[str, Any], **fields: Any) -> Folder:
    rng = np.random.default_rng(seed)
    return write(
        folder, {k: np.float32(rng.standard_normal(x)) for k, x in shapes.items()}, **fields
    )


def test_one_parameter_of_experts(tmp_path: Folder) -> None:
    """Chosen by its name, as experts are."""
    shapes = {"mlp.experts" + end: x for end, x in zip(ENDS, ((3 * 2, 5), (4, 3 * 2)), strict=True)}
    fields = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    folders = [random_adapter(tmp_path / str(i), i, shapes, **fields) for i in range(2)]
    combine(folders, tmp_path / "out", WEIGHTS)
    *each, found = (
        peft.read(x).leaves["mlp.experts.down_proj"] for x in (*folders, tmp_path / "out")
    )
    expected = sum(w * delta(x) for w, x in zip(WEIGHTS, each, strict=True))
    np.testing.assert_allclose(delta(found), expected, atol=1e-6)


def delta(node: Any) -> np.ndarray:
    """ΔW of a node, by `merge`."""
    shape = jlora._adapters.weight_shape(node)
    return np.asarray(jlora.merge({"w": np.zeros(shape, np.float32)}, {"w": node})["w"])


# ---------------------------------------------------------------------------------- the command


METHODS: dict[str, Any] = {
    "--rank 3": lambda t: arithmetic.truncate(arithmetic.add(t), 3),
    "--weights 2,-1 --method ties": lambda t: arithmetic.ties(t, (2.0, -1.0)),
    "--method ties --density 0.5": lambda t: arithmetic.ties(t, density=0.5),
    "--method dare": lambda t: arithmetic.dare(t, key=jax.random.key(0)),
    "--method dare --density 0.9": lambda t: arithmetic.dare(t, key=jax.random.key(0), density=0.9),
}


@pytest.mark.parametrize("line", some(METHODS, "--method dare --density 0.9"))
def test_methods(line: str, tmp_path: Folder) -> None:
    """Those of `jlora.arithmetic`, whose numbers are in what is written."""
    sizes = zip(ENDS, ((3, 6), (5, 3)), strict=True)
    shapes = {f"{m}.q{end}": shape for end, shape in sizes for m in "ab"}
    folders = [random_adapter(tmp_path / str(i), i, shapes, r=3) for i in range(2)]
    run("combine", *folders, tmp_path / "out", *line.split())
    with jax.enable_x64(True):
        expected = METHODS[line]([peft.read(folder).leaves for folder in folders])
        found = peft.read(tmp_path / "out").leaves
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert found[key].a.shape == x.a.shape
        np.testing.assert_allclose(delta(found[key]), delta(x), atol=1e-6)


def test_what_it_says(tmp_path: Folder) -> None:
    one, two = (plain(tmp_path / x, ["m.q", f"m.{x}"], target_modules=["q", x]) for x in "ab")
    out = tmp_path / "c"
    text = run("combine", one, two, out).stdout
    assert text == f"{out}: 2 adapters by add, 3 sites of rank 1–2, 8 parameters\n"
    args = ("--json", "--rank", "1", "--weights", "1,0.5")
    assert json.loads(run("combine", one, two, tmp_path / "d", *args).stdout) == {
        "adapters": [str(one), str(two)],
        "out": str(tmp_path / "d"),
        "method": "add",
        "weights": [1.0, 0.5],
        "sites": 3,
        "ranks": [1],
        "parameters": 6,
    }


def test_sums_of_16_bits_are_written_in_32(tmp_path: Folder) -> None:
    run("combine", models.FIXTURES / "bf16", other(tmp_path / "b", "bf16"), tmp_path / "c")
    assert {x.dtype for x in models.read(tmp_path / "c" / TENSORS).values()} == {np.dtype("f4")}


# ------------------------------------------------------------------------------------ refused


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("files")
    for name in ("patterns", "modules_to_save", "experts", "tied", "tokens", "dora"):
        Files(root, name)
    for name, key in {  # two weights where the others have one, or another one
        "untied": "lm_head.lora_A.weight",
        "trained": "model.embed_tokens.base_layer.weight",
    }.items():
        copy = Files(root, name, models.case("tied"))
        copy.tensors(lambda tensors, key=PREFIX + key: tensors[key].__imul__(2))
    for name, fields in {
        "x": {"base_model_name_or_path": "one"},
        "y": {"base_model_name_or_path": "two", "revision": "main"},
        "z": {"revision": "other"},
        "norms": {"use_dora": True},
    }.items():
        plain(root / name, ["m.q"], **fields)
    write(root / "wide", pair("m.q", 2, 2, 2), r=2)
    checkpoint.save(root / "orbax", {"head": jnp.ones(3)}, jlora.Full("head"))
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_text("{}")
    return root


# The argument that is named first, as the user wrote it, and command lines.
ERRORS = """
ADAPTERS: x orbax out; x hf out; x nowhere out; x y out; y z out; x modules_to_save out
ADAPTERS: x experts out; x norms out; x dora out; x tokens out; tied untied out; tied trained out
ADAPTERS: x wide out
OUT: x x patterns
--weights: x x out --weights 1; x x out --weights 1,one; x x out --weights 1,nan
--density: x x out --density 0.5
ADAPTERS: x x out --weights 1e39,1
"""
NAMED = {
    line: argument
    for argument, lines in re.findall(r"(\S+): (.+)", ERRORS)
    for line in lines.split("; ")
}


@pytest.mark.parametrize("line", NAMED)
def test_refused(line: str, files: Folder) -> None:
    """By name, and nothing is written."""
    before = sorted(files.rglob("*"))
    names = {"nowhere", "out", *(path.name for path in files.iterdir())}
    args = [str(files / a) if a in names else a for a in line.split()]
    said = fails("combine", *args)
    assert said.startswith(f"jlora: {NAMED[line]}")
    check_text(said)
    assert sorted(files.rglob("*")) == before


def test_usage_errors() -> None:
    for line, words in {
        "a": "Missing argument 'ADAPTERS...'",
        "a b --rank 0": "0 is not in the range x>=1",
        "a b --density 2": "2.0 is not in the range 0<x<=1",
        "a b --method mean": "'mean' is not one of 'add', 'ties', 'dare'",
    }.items():
        assert words in run("combine", *line.split(), code=2).stderr


def test_float64(tmp_path: Folder) -> None:
    folder = write(tmp_path / "a", {key: x.astype(np.float64) for key, x in pair("m.q").items()})
    combine([folder], tmp_path / "out")
    assert {x.dtype for x in models.read(tmp_path / "out" / TENSORS).values()} == {np.dtype("f8")}


# ------------------------------------------------------------------- files that nobody vouches for


def test_many_modules_of_many_scales(tmp_path: Folder) -> None:
    """The patterns that are written are found in bounded time."""
    modules = many(500)
    alphas = {name: 1 + i for i, name in enumerate(modules)}
    targets = [f"q{i}" for i in range(10)]
    folder = plain(tmp_path / "a", modules, alpha_pattern=alphas, target_modules=targets)
    with bounded():
        combine([folder], tmp_path / "out")
    found = peft.read(tmp_path / "out").leaves
    assert [found[name].scale for name in modules] == list(alphas.values())
