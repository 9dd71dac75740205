"""The command line on real files: what it prints, what it writes, and how it fails.

Most runs are in this process, through click's runner; those that are about processes are not.
"""

import functools
import json
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import click.testing
import disks
import jax
import jax.numpy as jnp
import laws
import numpy as np
import orbax.checkpoint as ocp
import peft_models as models
import processes
import pytest
from click.shell_completion import ShellComplete
from flax import nnx
from messages import check_text, refused
from peft_files import CONFIG, TENSORS, Folder, assert_equal, assert_same_files, config_of
from safetensors.numpy import save_file
from small import some, without_progress

import jlora
from jlora import checkpoint, peft
from jlora._cli import _app
from jlora._cli._app import cli
from jlora._cli._inputs import attribute
from jlora._tree import adapter_leaves, nest
from tests.peft.merge.test_peft_merged import fixture

SUPPORT = pathlib.Path(__file__).parents[1] / "support"
# Where PEFT stores frozen values beside A and B.
KEEPS = ("tied", "gpt2_tied", "gpt2_untied")


def run(*args: Any, code: int = 0) -> click.testing.Result:
    """A run of `jlora` in this process; without an error nothing is said on stderr."""
    result = click.testing.CliRunner().invoke(cli, [str(x) for x in args])
    assert result.exit_code == code, result.output
    if code < 2:
        assert without_progress(result.stderr) == ""
    return result


def fails(*args: Any) -> str:
    """The one line of a run that must fail."""
    result = run(*args, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("jlora: ")
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


def table(name: str) -> str:
    """`--names` of a case."""
    if name == "experts":
        return f"{SUPPORT / 'peft_models.py'}:EXPERTS"
    names = models.case(name).names
    return next((key for key, rows in peft.TABLES.items() if rows == names), "models.llama:NAMES")


Stored = tuple[Folder, models.Case, Any]  # an Orbax checkpoint, its case and its adapter


@pytest.fixture(scope="module")
def orbax(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """A case of the fixtures as an Orbax checkpoint, with the adapter."""

    @functools.cache
    def store(name: str) -> Stored:
        case, folder = models.case(name), tmp_path_factory.mktemp(name) / "o"
        adapter = peft.load(case.folder, case.base, case.names)
        checkpoint.save(folder, adapter, (), step=7, base=case.base)
        return folder, case, adapter

    return store


def nodes(adapter: Any) -> dict[str, Any]:
    """The leaves of an adapter by their joined paths."""
    return {"/".join(path): x for path, x in adapter_leaves(adapter).items()}


def site(a: Any, b: Any) -> jlora.types.LowRank:
    """A dense site of scale 1."""
    return jlora.types.LowRank(a, b, 1.0, jlora.types.Layout((), (0,), (1,)))


# -------------------------------------------------------------------------------------- inspect


DENSE = ("dora_conv", "tied")  # daily


def by_formula(name: str) -> dict[str, np.ndarray]:
    """ΔW of every module of a fixture, by PEFT's formula in float64, without jlora's reader."""
    folder = models.FIXTURES / name
    tensors = models.read(folder / TENSORS)
    found = {}
    for key, a in tensors.items():
        module, _, end = key.removeprefix("base_model.model.").partition(".lora_")
        if end not in ("A.weight", "embedding_A") or "base_layer" in module:
            continue
        b = tensors[key.replace("_A", "_B")].astype(np.float64)
        found[module] = b.reshape(len(b), -1) @ a.astype(np.float64).reshape(len(a), -1)
    return found


@pytest.mark.parametrize("name", some([n for n in models.CASES if n != "experts"], *DENSE))
def test_inspect_peft(name: str) -> None:
    """The spectrum of each module is that of ΔW formed densely; the sizes are those of `load`."""
    found = json.loads(run("inspect", models.FIXTURES / name, "--json").stdout)
    dense = by_formula(name)
    tied = {"tied": {"lm_head"}, "gpt2_tied": {"lm_head"}}.get(name, set())
    assert {site["name"] for site in found["sites"]} == dense.keys() - tied
    for site in found["sites"]:
        [matrix] = site["matrices"]
        values = np.linalg.svd(site["scale"] * dense[site["name"]], compute_uv=False)
        np.testing.assert_allclose(matrix["spectrum"], values[: site["rank"]], rtol=1e-9)
    case = models.case(name)
    adapter = peft.load(case.folder, case.base, case.names)
    assert found["parameters"] == jlora.count(adapter)
    assert found["bytes"] == sum(x.nbytes for x in jax.tree.leaves(adapter))
    kinds = jlora.types.LowRank | jlora.types.Decomposed
    scales = {x.scale for x in nodes(adapter).values() if isinstance(x, kinds)}
    assert {site["scale"] for site in found["sites"]} == scales
    method = "DoRA" if name.startswith("dora") else "LoRA"
    assert {site["method"] for site in found["sites"]} == {method}
    text = run("inspect", models.FIXTURES / name).stdout
    assert ("DoRA: ΔW is s·A·B" in text) == (method == "DoRA")


INSPECTED = {"path", "format", "base_model", "parameters", "bytes", "sites", "full", "rows"}
SITE = {
    "name", "method", "shape", "inputs", "outputs", "rank", "scale", "dropout", "dtype",
    "parameters", "matrices",
}  # fmt: skip
BESIDE = {
    "modules_to_save": (
        "full",
        [("classifier.bias", [3], 3), ("classifier.weight", [3, 8], 24)],
        "in full .*\nclassifier.bias +3 +float32\n",
        "2 leaves in full; ",
    ),
    "tokens_by_name": (
        "rows",
        [
            ("embeddings.token_type_embeddings", [1, 8], 8),
            ("embeddings.word_embeddings", [2, 8], 16),
        ],
        r"rows of .*\nembeddings.token_type_embeddings +1×8 +float32\n",
        "0 leaves in full, rows of 2; ",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_inspect_of_what_is_beside_a_and_b(name: str) -> None:
    """Leaves in full and rows by module; in JSON, what programs may rely on."""
    kind, leaves, lines, end = BESIDE[name]
    found = json.loads(run("inspect", models.FIXTURES / name, "--json").stdout)
    assert found.keys() == INSPECTED
    assert all(site.keys() == SITE for site in found["sites"])
    matrix = {"indices", "norm", "spectrum", "stable_rank", "effective_rank"}
    assert all(x.keys() == matrix for site in found["sites"] for x in site["matrices"])
    assert found[kind] == [
        {"name": name, "shape": shape, "dtype": "float32", "parameters": count}
        for name, shape, count in leaves
    ]
    text = run("inspect", models.FIXTURES / name).stdout
    assert re.search(lines, text) and end in text


def norms(x: jlora.types.LowRank) -> np.ndarray:
    """Of each ΔW of a stack, formed densely."""
    return np.linalg.norm(x.scale * np.matmul(np.float64(x.a), np.float64(x.b)), axis=(1, 2))


def test_inspect_orbax(orbax: Any) -> None:
    """Of stacked layers: one row by default, one a layer with --all, all of them in JSON."""
    folder, _, adapter = orbax("scanned")
    found = json.loads(run("inspect", folder, "--json").stdout)
    sites = {site["name"]: site for site in found["sites"]}
    leaves = nodes(adapter)
    assert sites.keys() == leaves.keys()
    for name, x in leaves.items():
        actual = [m["norm"] for m in sites[name]["matrices"]]
        np.testing.assert_allclose(actual, norms(x), rtol=1e-9)
    assert (found["step"], found["format"]) == (7, "orbax")
    assert found["versions"]["jax"] == jax.__version__

    short, long = run("inspect", folder).stdout, run("inspect", folder, "--all").stdout
    assert "params/layers/mlp/down/kernel (2×)" in short and "kernel[1]" not in short
    assert "params/layers/mlp/down/kernel[1]" in long and "(2×)" not in long
    assert short.splitlines()[-1].startswith("orbax adapter: 7 sites of 14 matrices, 0 leaves")
    assert short.splitlines()[-1].endswith("; step 7")


@pytest.mark.parametrize(("a", "value", "text"), [(np.nan, None, "nan"), (0, 0, " 0 ")])
def test_inspect_of_what_is_not_finite_or_zero(
    a: float, value: Any, text: str, tmp_path: Folder
) -> None:
    """A broken run can be looked at, and one not yet begun; JSON stays JSON."""
    checkpoint.save(tmp_path / "a", {"w": site(jnp.full((4, 2), a), jnp.ones((2, 3)))}, ())
    found = run("inspect", tmp_path / "a", "--json").stdout
    [matrix] = json.loads(found)["sites"][0]["matrices"]
    numbers = dict.fromkeys(("norm", "stable_rank", "effective_rank"), value)
    assert matrix == {"indices": [], "spectrum": [value] * 2} | numbers and "NaN" not in found
    assert text in run("inspect", tmp_path / "a").stdout


def test_many_shapes_need_no_programs(caplog: Any) -> None:
    """A file may have a shape and a scale for each of thousands of modules."""
    jax.clear_caches()
    with jax.log_compiles():
        run("inspect", models.FIXTURES / "patterns")
        run("diff", *(models.FIXTURES / x for x in ("patterns", "excluded")), code=1)
    assert not [x for x in caplog.records if "Compiling" in x.getMessage()]


# ----------------------------------------------------------------------------------------- diff


def changed(tmp_path: Folder, stored: Stored, change: Any) -> tuple[Folder, Folder]:
    """Two Orbax adapters: a case, and what `change` makes of its leaves."""
    other = change(nodes(stored[2]))
    checkpoint.save(tmp_path / "b", nest({tuple(k.split("/")): x for k, x in other.items()}), ())
    return stored[0], tmp_path / "b"


def put(**fields: Any) -> Any:
    """Replaces fields of a node."""
    return lambda x: x._replace(**fields)


def scaled(x: Any) -> Any:
    """B three times as large."""
    return x._replace(b=3 * x.b)


def padded(x: Any) -> Any:
    """A rank above its own: the same ΔW."""
    pad = lambda y, axis: jnp.pad(y, [(0, 2 * (d == axis)) for d in range(3)])  # noqa: E731
    return x._replace(a=pad(x.a, 2), b=pad(x.b, 1))


UP = "params/layers/mlp/up/kernel"
LEAVES = {
    "scanned": UP,
    "dora": "model/layers/0/mlp/down_proj/kernel",
    "tokens": "params/embed/embedding",
    "modules_to_save": "classifier/kernel",
}
# A case, what becomes of one leaf, how much ΔW changes relative to A's, and words.
CHANGES = {
    "scale": ("scanned", put(scale=4.0), 1.0, ["scale 2.0 → 4.0"]),
    "dropout": ("scanned", put(dropout=0.5), 0.0, ["dropout 0.0 → 0.5"]),
    "frozen": ("scanned", put(frozen=("a",)), 0.0, ["frozen () → ('a',)"]),
    "residual": ("scanned", put(residual=True), None, ["residual False → True"]),
    "values": ("scanned", scaled, 2.0, ["B"]),
    "rank": ("scanned", padded, 0.0, ["rank 2 → 4", "A", "B"]),
    "full": ("scanned", lambda x: jnp.ones(3), None, ["low rank → in full"]),
    "shape": (
        *("scanned", put(b=jnp.ones((2, 2, 13))), None),
        ["weight (2, 8, 12) → (2, 8, 13)", "B"],
    ),
    "m of DoRA": ("dora", lambda x: x._replace(m=-x.m), None, ["m"]),
    "B of DoRA": ("dora", scaled, None, ["B"]),
    "method": ("dora", lambda x: site(x.a, x.b), None, ["DoRA → low rank"]),
    "values of rows": ("tokens", lambda x: x._replace(v=-x.v), 2.0, ["values"]),
    "rows": ("tokens", put(rows=(1, 2, 3)), None, ["rows"]),
    "values in full": ("modules_to_save", jnp.negative, 2.0, ["values"]),
}


@pytest.mark.parametrize("name", some(CHANGES, "dropout", "rank", "residual", *[*CHANGES][8:]))
def test_diff_of_one_site(name: str, tmp_path: Folder, orbax: Any) -> None:
    """Exit code 1, and what differs; what cannot be compared is said."""
    case, change, relative, words = CHANGES[name]
    path = LEAVES[case]
    pair = changed(tmp_path, orbax(case), lambda x: x | {path: change(x[path])})
    found = json.loads(run("diff", *pair, "--json", code=1).stdout)
    [found_site] = [x for x in found["sites"] if not x["equal"]]
    assert (found_site["name"], found_site["changes"]) == (path, words)
    expected = relative if relative is None else pytest.approx(relative, rel=1e-6, abs=1e-12)
    assert found_site["relative"] == expected
    assert found.keys() == {"a", "b", "equal", "tolerance", "only_a", "only_b", "sites"}
    lines = run("diff", *pair, code=1).stdout.splitlines()
    assert lines[0].split() == ["site", "relative", "differs"]
    value = "-" if relative is None else f"{found_site['relative']:.3g}"
    assert lines[1].split()[:2] == [path, value] and lines[1].endswith("; ".join(words))
    count = len(found["sites"])
    assert lines[-1] == f"{count - 1} of {count} common sites are equal"


def test_diff_of_sites_of_one_only(tmp_path: Folder, orbax: Any) -> None:
    """They are listed, and make the two different."""
    a, b = changed(tmp_path, orbax("scanned"), lambda x: {k: x[k] for k in x if k != UP})
    found = json.loads(run("diff", a, b, "--json", code=1).stdout)
    assert (found["only_a"], found["only_b"]) == ([UP], [])
    assert f"only in {a}: {UP}" in run("diff", b, a, code=1).stdout


def test_diff_within_a_tolerance(tmp_path: Folder, orbax: Any) -> None:
    """ΔW decides then, not rank and scale; and the other way round where it is exceeded."""
    a, b = changed(tmp_path, orbax("scanned"), lambda x: x | {UP: scaled(padded(x[UP]))})
    run("diff", a, b, "--tolerance", 2.1)
    run("diff", a, b, "--tolerance", 1.9, code=1)
    check_text(fails("diff", a, b, "--tolerance", -1))


# -------------------------------------------------------------------------------------- convert


DAILY = ("experts", "tied", "tokens")


@pytest.mark.parametrize("name", some(models.CASES, *DAILY))
def test_convert_there_and_back(name: str, tmp_path: Folder) -> None:
    """PEFT to Orbax to PEFT: equal for `diff`, bit for bit, and with --config the same files."""
    case, theirs, orbax = models.case(name), models.case(name).folder, tmp_path / "o"
    adapter = peft.load(theirs, case.base, case.names)
    checkpoint.export(tmp_path / "base", case.base)
    names = ("--names", table(name))
    text = run("convert", theirs, orbax, "--base", tmp_path / "base", *names, "--json").stdout
    count = {"leaves": len(nodes(adapter)), "parameters": jlora.count(adapter)}
    ends = {"in": str(theirs), "out": str(orbax), "from": "peft", "to": "orbax"}
    assert json.loads(text) == ends | count
    assert_equal(checkpoint.restore(orbax), adapter)
    assert checkpoint.read(orbax).base == checkpoint.fingerprint(case.base)
    for pair in ((orbax, theirs), (theirs, orbax)):
        found = json.loads(run("diff", *pair, *names, "--json").stdout)
        assert found["equal"] and {site["relative"] for site in found["sites"]} == {0}

    base = ("--base", tmp_path / "base") if name in KEEPS else ()
    run("convert", orbax, tmp_path / "p", *names, *base)
    text = run("diff", theirs, tmp_path / "p").stdout
    assert re.fullmatch(r"(\d+) of \1 common sites are equal\n", text)
    before, after = (models.read(f / TENSORS) for f in (theirs, tmp_path / "p"))
    kept = {key for key in before if key.endswith(".base_layer.weight")}
    assert before.keys() - kept <= after.keys() <= before.keys()
    assert all(x.tobytes() == before[key].tobytes() for key, x in after.items())

    run("convert", orbax, tmp_path / "q", *names, "--config", theirs, *base)
    assert_same_files(tmp_path / "q", theirs)


PLAIN = ("qv", "all_linear", "patterns", "rslora", "embeddings", "tied", "gpt2", "gpt2_tied")


@pytest.mark.parametrize(
    ("source", "name"), [("peft", "gpt2_tied"), ("peft", "patterns"), ("orbax", "patterns")]
)
def test_convert_for_vllm(source: str, name: str, tmp_path: Folder, orbax: Any) -> None:
    """Uniform rank, scales in B: the files that `save` writes with the base, and the same ΔW."""
    folder, case, adapter = orbax(name)
    args = (folder, "--names", "llama") if source == "orbax" else (case.folder,)
    ours, theirs = tmp_path / "v", tmp_path / "w"
    text = run("convert", args[0], ours, *args[1:], "--profile", "vllm").stdout
    config = config_of(case.folder) if source == "peft" else None
    peft.save(theirs, case.base, adapter, case.names, profile="vllm", config=config)
    assert_same_files(ours, theirs)
    run("diff", case.folder, ours, "--tolerance", 1e-6)
    if name == "patterns":
        about = f"6 leaves of {jlora.count(adapter)} parameters as peft"
        assert text == f"{ours}: {about}, for vLLM with --max-lora-rank 8 or more\n"
        run("diff", case.folder, ours, code=1)


# ---------------------------------------------------------------------------------------- merge


def numpy_tree(folder: Folder) -> Any:
    """The parameters of an Orbax checkpoint."""
    with jax.enable_x64(True), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute())


@pytest.mark.parametrize(("kind", "name"), [("peft", "modules_to_save"), ("orbax", "dora")])
def test_merge_into_orbax(kind: str, name: str, tmp_path: Folder, orbax: Any) -> None:
    """Base in Orbax: the tree of `jlora.merge`, in the structure of the base."""
    folder, case, adapter = orbax(name)
    checkpoint.export(tmp_path / "base", case.base)
    args = (folder,) if kind == "orbax" else (case.folder, "--names", table(name))
    text = run("merge", tmp_path / "base", args[0], tmp_path / "m", *args[1:]).stdout
    assert text == f"{tmp_path / 'm'}: {tmp_path / 'base'} with {args[0]} merged, as orbax\n"
    merged = numpy_tree(tmp_path / "m")
    expected = jax.tree.map(np.asarray, jlora.merge(case.base, adapter))
    laws.assert_close(merged, expected, 1e-6)


ONES = {"w": site(jnp.ones((4, 1)), jnp.ones((1, 3)))}


def merged(folder: Folder, adapter: Any, known: Any = None) -> Folder:
    """What the command makes of a base in Orbax and an adapter, saved with the base or without."""
    checkpoint.save(folder / "a", adapter, (), base=known)
    run("merge", folder / "base", folder / "a", folder / "m")
    return folder / "m"


def test_merge_of_nnx(tmp_path: Folder) -> None:
    """Its variables keep their form in Orbax."""
    base = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    checkpoint.export(tmp_path / "base", base)
    found = numpy_tree(merged(tmp_path, {"kernel": ONES["w"]}, base))
    assert found.keys() == {"kernel", "bias"}
    np.testing.assert_array_equal(found["kernel"]["value"], base["kernel"].get_value() + 1)
    assert checkpoint.read(tmp_path / "a").base == checkpoint.fingerprint(base)


def test_merge_of_numbers(tmp_path: Folder) -> None:
    """Integers of 64 bits and Python's keep their values."""
    numbers = {"w": np.zeros((4, 3)), "id": np.array([2**40]), "k": 2**40}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", numbers)
    found = numpy_tree(merged(tmp_path, ONES))
    assert found["w"].dtype == np.float64 and np.all(np.asarray(found["w"]) == 1)
    assert int(found["id"][0]) == int(found["k"]) == 2**40


@pytest.mark.parametrize("is_known", [True, False])
def test_random_keys_stay_keys(is_known: bool, tmp_path: Folder) -> None:
    """Orbax has them as integers until they are read."""
    base = {
        "w": jnp.zeros((4, 3)),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
        "words": jnp.arange(5, dtype=jnp.uint32),
    }
    checkpoint.export(tmp_path / "base", base)
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
        found = checkpointer.restore(merged(tmp_path, ONES, base if is_known else None), like)
    laws.assert_close(found, base | {"w": jnp.ones((4, 3))}, 0.0)
    rows = tmp_path / "rows.py"
    rows.write_text('from jlora.peft import Name\nROWS = [Name("w", "w", "io")]\n')
    names, given = ("--names", f"{rows}:ROWS"), "a" if is_known else "base"
    known = ("--base", tmp_path / "base")
    run("convert", tmp_path / "a", tmp_path / "peft", *names, *(() if is_known else known))
    run("convert", tmp_path / "peft", tmp_path / "o", "--base", tmp_path / given, *names)
    assert checkpoint.read(tmp_path / "o").base == checkpoint.fingerprint(base)


def huggingface(folder: Folder, name: str) -> tuple[Folder, dict[str, np.ndarray]]:
    """A case's model as a Hugging Face checkpoint, and what PyTorch merged it to."""
    case, base = fixture(name, folder)
    for left_out in ("pytorch_model.bin", CONFIG):  # an adapter, as training scripts leave it
        (base / left_out).write_bytes(b"{}")
    return base, case.merged()


@pytest.mark.parametrize(("kind", "name"), [("peft", "tokens"), ("orbax", "scanned")])
def test_merge_into_hugging_face(kind: str, name: str, tmp_path: Folder, orbax: Any) -> None:
    """What PyTorch merged, from either format of the adapter; other files are copied or named."""
    base, merged = huggingface(tmp_path, name)
    folder, case, _ = orbax(name)
    args = (folder, "--names", table(name)) if kind == "orbax" else (case.folder,)
    text = run("merge", base, args[0], tmp_path / "m", *args[1:], "--json").stdout
    assert json.loads(text) == {
        "base": str(base),
        "adapter": str(args[0]),
        "out": str(tmp_path / "m"),
        "format": "huggingface",
        "left_out": [CONFIG, "pytorch_model.bin"],
    }
    found = models.read(tmp_path / "m" / "model.safetensors")
    assert found.keys() == merged.keys()
    for key, x in merged.items():
        np.testing.assert_allclose(found[key], x, rtol=0, atol=1e-6 * np.abs(x).max())
    text = run("merge", base, args[0], tmp_path / "n", *args[1:]).stdout
    assert text.endswith(f" merged, as huggingface; not copied: {CONFIG}, pytorch_model.bin\n")


# --------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, orbax: Any) -> Folder:
    """Folders for the table of errors."""
    root = tmp_path_factory.mktemp("files")
    folder, case, adapter = orbax("all_linear")
    shutil.copytree(folder, root / "o")
    checkpoint.save(root / "unknown", adapter, ())
    checkpoint.export(root / "base", case.base)
    checkpoint.export(root / "small", {"w": jnp.ones(3)})
    shutil.copytree(case.folder, root / "p", ignore=shutil.ignore_patterns("torch*", "model*"))
    shutil.copytree(root / "p", root / "deep")
    (root / "deep" / CONFIG).write_text('{"a":' + 9**5 * "[" + 9**5 * "]" + "}")
    for name in ("steps/12", "lost"):
        shutil.copytree(root / "o", root / name)
    shutil.rmtree(root / "lost" / "adapter" / "d")
    shutil.rmtree(shutil.copytree(root / "base", root / "gone") / "d")
    (root / "empty").mkdir()
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_text("{}")
    (root / "rows.py").write_text(
        "from jlora.peft import Name\nROWS = 3\nOTHER = [Name('x', 'y', 'io')]\n"
    )
    write_models(root)
    (root / "raises.py").write_text("1 / 0\n")
    return root


def write_models(root: Folder) -> None:
    """Models of Hugging Face with a fault each."""
    dense = {f"h.{i}.q.weight": np.ones((64, 64), np.float32) for i in range(2)}
    codes: dict[str, np.ndarray] = {}
    for i in range(3):
        codes |= {f"h.{i}.q.qweight": np.zeros((6, 64), np.int32)}
        codes |= {f"h.{i}.q.qzeros": np.zeros((1, 6), np.int32)}
        codes |= {f"h.{i}.q.scales": np.ones((1, 64), np.float16)}
    gptq = {"quant_method": "gptq", "bits": 3, "group_size": 64}
    for name, tensors, config in (
        ("model", dense, {}),
        ("linked", dense, {}),
        ("bits3", codes, {"quantization_config": gptq}),
    ):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "linked" / "notes").symlink_to(root / "rows.py")


# The argument that is named, as the user wrote it, and command lines.
ERRORS = """
DIR: inspect nowhere; inspect empty; inspect hf; inspect base; inspect steps; inspect deep
DIR: inspect lost; inspect bits3; check deep --for vllm; check hf --for vllm
DIR: check o --for vllm
--for: check p --for tgi
A: diff unknown p --names llama; diff lost o; diff p o --names rows.py:OTHER
B: diff p nowhere; diff p deep
IN: convert hf x; convert unknown x --names llama; convert lost x --names llama
IN: convert o x --names rows.py:OTHER; convert deep x --profile vllm
--profile: convert p x --profile vllm --dialect kohya
--prefix: convert p x --dialect peft --prefix unet; convert o x --names llama --prefix unet
IN: convert p x --names rows.py:OTHER --base base; convert p x --names llama --base small
OUT: convert o p --names llama; merge base o p; merge base o /
--names: diff p o; convert o x; merge base p x; convert p x --profile vllm --names llama
--names: convert o x --names bort; convert o x --names nomodule:X; convert o x --names vit:
--names: convert o x --names rows.py:MISSING; convert o x --names rows.py:ROWS
--names: convert o x --names raises.py:X
--base: convert p x --names llama; convert p x --names llama --base hf
--config: convert p x --names llama --base base --config p
--config: convert o x --names llama --config deep
BASE: merge p o x; merge small o x; merge linked p x; merge bits3 p x
BASE: merge gone o x
ADAPTER: merge small unknown x; merge model o x --names rows.py:OTHER; merge model p x
ADAPTER: merge base deep x --names llama
--follow-links: merge base p x --follow-links
"""
NAMED = {
    line: argument
    for argument, lines in re.findall(r"(\S+): (.+)", ERRORS)
    for line in lines.split("; ")
}


def present(folder: Folder) -> list[Folder]:
    """All that is there but the compiled modules of tables."""
    return sorted(p for p in folder.rglob("*") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("line", NAMED)
def test_errors(line: str, files: Folder) -> None:
    """Exit code 2, one line on stderr that says what and where; nothing is written."""
    before = present(files)
    words = ("nowhere", "x", *(path.name for path in files.iterdir()))
    command, *args = line.split()
    full = [str(files / a) if a.split(":")[0] in words else a for a in args]
    said = fails(command, *full)
    assert re.match(rf"jlora: {NAMED[line]}\b", said)
    check_text(said)
    assert present(files) == before


JOB = """
import sys

class C:
    pass

def job():
    return sys.modules[C.__module__].C is C

def __getattr__(name):
    if name == "LAZY":
        return 7
    raise AttributeError(name)
"""


def test_a_file_is_a_module(tmp_path: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has is found in it later; attributes may be made when they are asked for."""
    (tmp_path / "job_of_mine.py").write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)
    for source in (str(tmp_path / "job_of_mine.py"), "job_of_mine"):
        assert attribute(f"{source}:job", "JOB")()
        assert attribute(f"{source}:LAZY", "JOB") == 7
        with refused(ValueError, "", "has no MISSING"):
            attribute(f"{source}:MISSING", "JOB")


def test_shells_complete_folders() -> None:
    """As paths, which the shell knows."""
    complete = ShellComplete(cli, {}, "jlora", "_JLORA_COMPLETE")
    for args in (["check"], ["check", "p", "--base"]):
        found = complete.get_completions(args, "x")
        assert [x.type for x in found] == ["file"]


def test_debug_shows_the_traceback(files: Folder) -> None:
    """With the same exit code."""
    result = run("inspect", files / "deep", "--debug", code=2)
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert "is nested too deeply" in result.stderr.splitlines()[-1]


def test_long_lists_are_cut(files: Folder) -> None:
    """A line stays one that can be read."""
    line = fails("merge", files / "small", files / "o", files / "x")
    assert line.endswith("; … and 12 more lines, which --debug shows") and len(line) < 2000


def test_help() -> None:
    """It names the commands, the exit codes, and every table that ships."""
    text = " ".join(run("--help").stdout.split())
    assert "Exit codes: 0 done, equal, or it fits; 1 the adapters differ, it does not" in text
    assert all(name in text for name in ("inspect", "merge", "convert", "diff"))
    # A line may end within a name, at its hyphen.
    text = "".join(run("merge", "--help").stdout.split())
    assert all(f"{table}," in text.partition("PyTorch'smodules:")[2] for table in peft.TABLES)
    assert run("--version").stdout.startswith("jlora, version ")


# ------------------------------------------------------------------------------------ processes


# What it wrote is not put in its place, so that it is not done before it is interrupted.
HELD = """
import os, pathlib, time
from jlora._cli import main
def wait(stage, final):
    pathlib.Path(stage, "whole").touch()
    time.sleep(300)
os.rename = wait
main()
"""


@pytest.mark.slow
def test_a_process(files: Folder) -> None:
    """An error is one line on stderr: what Orbax's threads find closed is not printed beside it."""
    script = str(pathlib.Path(sys.executable).with_name("jlora"))
    command = [script, "inspect", str(files / "lost")]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)


def test_the_module_is_the_command(
    files: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m jlora`: answers on stdout, no progress bar in a pipe."""
    args = ["diff", str(files / "p"), str(models.FIXTURES / "patterns")]
    monkeypatch.setattr(sys, "argv", ["jlora", *args])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jlora", run_name="__main__")
    assert ended.value.code == 1
    assert capsys.readouterr() == (run(*args, code=1).stdout, "")


def test_standard_output_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `jlora inspect DIR >&-` does it: an answer would be lost without a word."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "argv", ["jlora", "inspect", str(models.FIXTURES / "patterns")])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit) as ended:
        _app.main()
    assert (ended.value.code, "is closed" in capsys.readouterr().err) == (2, True)


def test_what_python_cannot_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """That alone is left out."""
    printed: list[Any] = []
    monkeypatch.setattr(sys, "__unraisablehook__", printed.append)
    errors = [RuntimeError("Event loop is closed"), RuntimeError("another"), ValueError("third")]
    found = [types.SimpleNamespace(exc_value=e) for e in errors]
    for x in found:
        _app._report_unraisable(x)
    assert printed == found[1:]


# The commands that write, with OUT as `x`.
WRITERS = (
    "merge model p x",
    "merge codes p x",
    "merge base o x",
    "convert o x --names llama",
    "convert p x --names llama --base base",
    "convert p x --profile vllm",
)


def test_a_full_disk_names_out(files: Folder, tmp_path: Folder) -> None:
    """In one line, and nothing is left of it but what Orbax removes when it writes there again."""
    folders = {name: files / name for name in ("p", "o", "base")} | written_models(tmp_path)
    (tmp_path / "disk").mkdir()
    folders["x"] = out = tmp_path / "disk" / "x"
    for line in WRITERS:
        with disks.full():
            said = fails(*(folders.get(word, word) for word in line.split()))
        assert re.match(rf"jlora: OUT: could not write (the checkpoint )?{out}: ", said)
        assert "File too large. No" in said
        assert [x.name for x in out.parent.iterdir() if ".orbax-" not in x.name] == []


def written_models(root: Folder) -> dict[str, Folder]:
    """Models that the adapter of `files` is for: in floats, and in codes."""
    case = models.case("all_linear")
    peft.save_base(root / "model", case.base, case.names)
    (root / "codes").mkdir()
    tensors = peft.to_tensors(case.base, case.names)
    codes = {key: x.astype(jnp.float8_e4m3fn) for key, x in tensors.items() if x.ndim == 2}
    scales = {f"{key}_scale_inv": np.ones(1, np.float32) for key in codes}
    save_file(tensors | codes | scales, root / "codes" / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8"}}
    (root / "codes" / "config.json").write_text(json.dumps(config))
    return {name: root / name for name in ("model", "codes")}


# Interrupts itself where a module is imported.
AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from jlora.__main__ import main
main()
"""


@pytest.mark.parametrize("module", some(["jlora._cli", "click", "jlora._cli._merge"], "click"))
def test_interrupt_at_the_start(module: str) -> None:
    """Nothing but the same line: no traceback of an import."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = processes.run("-c", AT_IMPORT, "inspect", module)
    signal.signal(signal.SIGINT, before)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "jlora: interrupted; nothing is half written.\n"


@pytest.mark.slow
def test_interrupt(files: Folder, tmp_path: Folder) -> None:
    """Ctrl-C before the folder has its name: exit code 130, one line, and nothing is left."""
    out = tmp_path / "out"
    out.mkdir()
    folder = written_models(tmp_path)["model"]
    args = "-c", HELD, "merge", folder, files / "o", out / "m", "--names", "llama"
    # A shell that runs the tests in its background has them, and so the process, ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = processes.start(*args, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 300
    while not list(out.rglob("whole")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (130, "")
    assert without_progress(stderr) == "jlora: interrupted; nothing is half written.\n"
    assert not list(out.iterdir())
