"""Checkpoints to others: in 4 and 8 bits, dequantized, and merged onto what is quantized."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from test_base_files import COLUMNS, DENSE, FORMATS, NAMES, ROWS, File, assert_rounded, write
from test_base_files import tensors_of as tensors_in

import jlora
from jlora import peft
from jlora._cli._app import cli
from jlora._rules import compile_pattern
from jlora.peft.formats._rewrite import SKIP

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def floats(tmp_path):
    """A model of two shards, in bfloat16."""
    folder = tmp_path / "base"
    folder.mkdir()
    parts = [
        {"embed.weight": normal(96, 128), "h.0.up.weight": normal(ROWS, COLUMNS, seed=1)},
        {
            "h.1.up.weight": normal(ROWS, COLUMNS, seed=2),
            "norm.weight": normal(ROWS, seed=3),
            "lm_head.weight": normal(96, 128, seed=4),
        },
    ]
    index = {}
    for file, part in zip(FILES, parts, strict=True):
        save_file({k: x.astype(jnp.bfloat16) for k, x in part.items()}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_of(folder):
    return {
        k: x for file in sorted(folder.glob("*.safetensors")) for k, x in load_file(file).items()
    }


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("scheme", [jlora.NF4(), jlora.FP4(), jlora.Int8()], ids=str)
def test_there_and_back(scheme, floats, tmp_path):
    """What is written is what `quantize` gives, and what is read back what that stands for."""
    found = peft.quantize_checkpoint(floats, tmp_path / "small", scheme)
    assert [m.name for m in found] == ["h.0.up.weight", "h.1.up.weight"]
    said = config_of(tmp_path / "small")["quantization_config"]
    assert said["quant_method"] == "bitsandbytes"
    assert set(said["llm_int8_skip_modules"]) == {"embed", "lm_head", "cls", "embed_out"}
    old, expected = tensors_of(floats), {}
    for m in found:
        leaf = jlora.quantize({"w": jnp.asarray(old[m.name]).T}, type(scheme)("w"))["w"]
        expected[m.name] = np.asarray(leaf.array()).T
        assert m.error == pytest.approx(float(leaf.error), rel=1e-5)
        assert m.size == leaf.nbytes
    assert peft.matrices(tmp_path / "small") == [m._replace(error=None) for m in found]
    peft.dequantize_checkpoint(tmp_path / "small", tmp_path / "dense")
    new = tensors_of(tmp_path / "dense")
    assert new.keys() == old.keys()
    for name, x in old.items():
        assert new[name].dtype == x.dtype
        if name in expected:
            assert_rounded(new[name], expected[name])
        else:
            np.testing.assert_array_equal(new[name], x)
    assert config_of(tmp_path / "dense") == config_of(floats)
    for folder in ("small", "dense"):
        index = json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors_of(tmp_path / folder).keys()
        assert (tmp_path / folder / "tokenizer.json").exists()


@pytest.mark.parametrize("format", FORMATS | DENSE)
def test_dequantized(format, tmp_path):
    """Of each format: the weights by its formula, and nothing else that it has."""
    files = {f"h.{i}.up": (FORMATS | DENSE)[format](seed=i) for i in range(2)}
    folder = write(tmp_path / "base", files)
    found = peft.dequantize_checkpoint(folder, tmp_path / "dense")
    new = tensors_of(tmp_path / "dense")
    parameter = "w" if format == "mxfp4" else "weight"
    assert new.keys() == {f"h.{i}.up.{parameter}" for i in range(2)} | {"norm.weight"}
    assert [m.name for m in found] == [f"h.{i}.up.{parameter}" for i in range(2)]
    for name, file in files.items():
        expected = file.matrix.swapaxes(-1, -2) if format == "mxfp4" else file.matrix
        assert_rounded(new[f"{name}.{parameter}"], expected.astype(jnp.bfloat16))
    assert "quantization_config" not in config_of(tmp_path / "dense")


@pytest.mark.parametrize("way", ["dequantize", "export_merged"])
@pytest.mark.parametrize(
    "config",
    [
        lambda q: {"text_config": {"quantization_config": q}},
        lambda q: {"a": {"b": {"quantization_config": q}, "c": 1}, "quantization_config": None},
        lambda q: {"quantization_config": q, "text_config": {"quantization_config": q, "c": 1}},
    ],
)
def test_a_configuration_within_another(config, way, tmp_path):
    """Wherever it says that the weights are quantized, it no longer does."""
    base, adapter, _ = beside(tmp_path, "fp8")
    said = config(config_of(base)["quantization_config"]) | {"model_type": "x"}
    (base / "config.json").write_text(json.dumps(said))
    WAYS[way](base, adapter, tmp_path / "out")
    left = (tmp_path / "out" / "config.json").read_text()
    assert "quantization_config" not in left
    assert left.count('"c": 1') == json.dumps(said).count('"c": 1')
    assert config_of(tmp_path / "out")["model_type"] == "x"
    assert peft.matrices(tmp_path / "out") == []


@pytest.mark.parametrize(
    "name", ["lm_head." * 20_000 + "weight", "x." * 100_000 + "weight", "e" * 200_000, "a.embed"]
)
def test_embeddings_and_heads_are_found_in_linear_time(name):
    found, seconds = compile_pattern(SKIP, ".").search, time.process_time()
    assert (found(name) is not None) == ("head" in name or "embed" in name)
    assert time.process_time() - seconds < 1


MEMORY = """
import re, threading
from pathlib import Path
from jlora import peft

def anonymous():  # in kB: files that are mapped cost nothing
    return int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not done.wait(0.005):
        seen.append(anonymous())

peft.dequantize_checkpoint("small", "warm")
seen, done = [anonymous()], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
peft.dequantize_checkpoint("large", "out")
done.set()
watcher.join()
print(max(seen) - seen[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_shard_is_never_held_whole(tmp_path):
    """Of matrices that take 128 MB as bfloat16 a few are held at a time."""
    n, count = 1024, 64
    for name, k in (("small", 1), ("large", count)):
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        w, scale = np.ones((n, n), jnp.float8_e4m3fn), np.ones((8, 8), np.float32)
        file = File(config, None, weight=w, weight_scale_inv=scale)
        write(tmp_path / name, {f"h.{i}.up": file for i in range(k)})
    run = [sys.executable, "-c", MEMORY]
    done = subprocess.run(run, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert int(done.stdout) < count * 2 * n * n / 2 / 1024


def adapter_for(floats):
    """An adapter of the two layers, and the tree that it is for."""
    w = np.stack([tensors_of(floats)[f"h.{i}.up.weight"].T for i in range(2)])
    params = {"layers": {"up": {"kernel": jnp.asarray(w)}}}

    def model(p, x):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, p["layers"]["up"]["kernel"])[1]

    lora = jlora.transform(model, jlora.LoRA(rank=4))
    x = jnp.ones((1, COLUMNS), jnp.bfloat16)
    _, adapter = lora.init(jax.random.key(0), params, x)
    return jax.tree.map(lambda v: v + 0.05, adapter), params


def test_merged_onto_quantized(floats, tmp_path, capsys):
    adapter, params = adapter_for(floats)
    peft.quantize_checkpoint(floats, tmp_path / "nf4", jlora.NF4())
    peft.export_merged(tmp_path / "nf4", adapter, tmp_path / "merged", names=NAMES)
    base = jlora.quantize(params, jlora.NF4("kernel"))
    dense = jlora.merge(jlora.dequantize(base), adapter)["layers"]["up"]["kernel"]
    new = tensors_of(tmp_path / "merged")
    for i in range(2):
        assert_rounded(new[f"h.{i}.up.weight"].T, dense[i])
    assert "quantization_config" not in config_of(tmp_path / "merged")
    again = tmp_path / "again"
    peft.export_merged(tmp_path / "nf4", adapter, again, names=NAMES, requantize=True)
    assert [m.name for m in peft.matrices(again)] == ["h.0.up.weight", "h.1.up.weight"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("h.0.up.weight: NF4(block=64, double=True), error 0.0")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "nf4", "merged", "again"}


def beside(folder, format, **more):
    """A quantized module `up`, a float one `q`, and an adapter of `q`; `more` tensors."""
    if format == "bitsandbytes":
        weights = {"up.weight": normal(ROWS, COLUMNS), "q.weight": normal(8, 16)}
        (folder / "float").mkdir()
        save_file(weights, folder / "float" / "model.safetensors")
        scheme = jlora.NF4("up.weight")
        peft.quantize_checkpoint(folder / "float", folder / "base", scheme)
        tensors = load_file(folder / "base" / "model.safetensors")
    else:
        modules = {"up": (FORMATS | DENSE)[format]()}
        tensors = tensors_in(modules)
        write(folder / "base", modules)
    tensors |= {"q.weight": normal(8, 16), **more}
    save_file(tensors, folder / "base" / "model.safetensors")
    params = {"q": {"kernel": jnp.ones((16, 8))}}
    lora = jlora.transform(lambda p, x: x @ p["q"]["kernel"], jlora.LoRA(rank=2))
    _, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 16)))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    peft.save(folder / "a", params, adapter, NAMES)
    return folder / "base", folder / "a", jlora.merge(params, adapter)["q"]["kernel"] - 1


@pytest.mark.parametrize("format", ["bitsandbytes", *FORMATS, *DENSE])
def test_merged_beside_what_is_quantized(format, tmp_path):
    """Codes never come to stand as weights, whatever the adapter is of."""
    base, adapter, change = beside(tmp_path, format)
    peft.export_merged(base, adapter, tmp_path / "merged")
    new = tensors_of(tmp_path / "merged")
    np.testing.assert_allclose(new["q.weight"], normal(8, 16) + change.T, rtol=1e-5, atol=1e-6)
    assert "quantization_config" not in config_of(tmp_path / "merged")
    assert {str(x.dtype) for x in new.values()} <= {"float32", "bfloat16"}
    if format != "bitsandbytes":
        expected = (FORMATS | DENSE)[format]().matrix
        expected = expected.swapaxes(-1, -2) if format == "mxfp4" else expected
        found = new["up.w" if format == "mxfp4" else "up.weight"]
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


METHODS = ("bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "fbgemm", "mxfp4")
LEFT = {
    "codes": {"more.codes": np.ones((8, 8), np.int8)},
    "a byte each": {"more.weights": np.ones((8, 8), np.uint8)},
    "words": {"more.weight_words": np.ones((8, 8), np.int32)},
    "long": {"more.long": np.ones((8, 8), np.int64)},
    "scales": {"more.weight_scale": np.ones((8, 1), np.float32)},
}
WAYS = {
    "export_merged": lambda base, adapter, out: peft.export_merged(base, adapter, out),
    "dequantize": lambda base, adapter, out: peft.dequantize_checkpoint(base, out),
    "merge": lambda base, adapter, out: CliRunner().invoke(
        cli, ["merge", str(base), str(adapter), str(out)], catch_exceptions=False
    ),
    "load_base": lambda base, adapter, out: peft.load_base(
        base, NAMES, like={"q": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_unread_is_refused(method, left, way, tmp_path):
    base, adapter, _ = beside(tmp_path, method, **LEFT[left])
    [(name, x)] = LEFT[left].items()
    try:
        said = WAYS[way](base, adapter, tmp_path / "out").output
    except ValueError as e:
        said = str(e)
    if way == "load_base":
        assert f"{name}: unexpected" in said
    else:
        kind = {"int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64"}.get(
            x.dtype.name, "F32"
        )
        assert "but these tensors were not read. Give the checkpoint" in said
        assert f"1 problems: {name}: {kind} {x.shape}" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", METHODS)
def test_buffers_are_kept(format, tmp_path):
    """Numbers that are no codes; what is left out beside them is said."""
    mask = np.tril(np.ones((1, 1, 4, 4), np.uint8))
    more = {"embed.position_ids": np.arange(8)[None], "attn.bias": mask}
    base, adapter, _ = beside(tmp_path, format, **more)
    (base / "old.bin").write_bytes(b"")
    assert peft.export_merged(base, adapter, tmp_path / "out") == ["old.bin"]
    for name, x in more.items():
        np.testing.assert_array_equal(tensors_of(tmp_path / "out")[name], x)


@pytest.mark.parametrize("requantize", [False, True])
def test_a_configuration_without_codes(requantize, tmp_path):
    base, adapter, _ = beside(tmp_path, "bitsandbytes")
    save_file({"q.weight": normal(8, 16)}, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"quantized by 'bitsandbytes', as .* but no weight of it"):
        peft.export_merged(base, adapter, tmp_path / "out", requantize=requantize)


def test_command_line(floats, tmp_path):
    run = CliRunner().invoke
    done = run(cli, ["quantize", str(floats), str(tmp_path / "nf4")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "h.0.up.weight  64×128  NF4(block=64, double=True)  4.1" in done.output
    assert done.output.endswith("nf4: 2 matrices, 8.3 KiB\n")
    shown = run(cli, ["inspect", str(tmp_path / "nf4"), "--json"], catch_exceptions=False)
    rows = json.loads(shown.output)["tensors"]
    assert [row["name"] for row in rows] == ["h.0.up.weight", "h.1.up.weight"]
    assert rows[0]["shape"] == [ROWS, COLUMNS]
    assert rows[0]["error"] is None
    twice = run(cli, ["quantize", str(tmp_path / "nf4"), str(tmp_path / "twice")])
    assert twice.exit_code == 2
    assert "is quantized already, by 'bitsandbytes'. Give the one that it was" in twice.output


ERRORS = [
    (
        lambda base, out: peft.quantize_checkpoint(base, out, jlora.Int4()),
        "`scheme` must be of bitsandbytes: NF4(), FP4() or Int8(); got "
        "Int4(pattern=None, group=128).",
    ),
    (
        lambda base, out: peft.quantize_checkpoint(base, out, jlora.NF4(), skip=".*"),
        "`src_dir`: 1 problems:\n  no matrix is left to quantize, with `skip` '.*'",
    ),
    (
        lambda base, out: peft.dequantize_checkpoint(base, out),
        "`src_dir`: {base} is not quantized; use it as it is.",
    ),
    (
        lambda base, out: peft.export_merged(base, "a", out, requantize=True),
        "`requantize` needs a quantized checkpoint; `src_dir`, {base}, is in floats.",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message, floats, tmp_path):
    with pytest.raises(ValueError) as e:
        call(floats, tmp_path / "out")
    assert str(e.value) == message.format(base=floats)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_weights_that_lie_turned(floats, tmp_path):
    (floats / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"weights of gpt2 lie as .inputs, outputs., which bitsan"):
        peft.quantize_checkpoint(floats, tmp_path / "out", jlora.NF4())


def test_values_that_are_not_finite(floats, tmp_path):
    tensors = load_file(floats / FILES[0])
    tensors["h.0.up.weight"][0, 0] = np.inf
    save_file(tensors, floats / FILES[0])
    with pytest.raises(ValueError, match=r"h\.0\.up\.weight: has values that are not finite"):
        peft.quantize_checkpoint(floats, tmp_path / "out", jlora.NF4())
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
