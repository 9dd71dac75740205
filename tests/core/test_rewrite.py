"""Quantized checkpoints to others: dequantized, and merged into floats."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from peft_files import measure
from safetensors.numpy import load_file, save_file
from small import some

import jlora
from jlora import peft
from jlora.peft.formats._dequantize import matrices
from tests.cli.test_cli import fails, run
from tests.peft.formats.test_base_files import (
    COLUMNS,
    DENSE,
    FORMATS,
    NAMES,
    ROWS,
    File,
    assert_rounded,
    like,
    write,
)
from tests.peft.formats.test_base_files import tensors_of as tensors_in
from tests.peft.merge.test_peft_merged import read as tensors_of


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_shards(tmp_path):
    """Each file has its own tensors, and the index says so."""
    files = {f"h.{i}.up": FORMATS["nf4"](seed=i) for i in range(2)}
    folder = write(tmp_path / "base", files)
    tensors, places = load_file(folder / "model.safetensors"), dict[str, str]()
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").write_text("{}")
    for i, first in enumerate(("h.0", "h.1", "norm")):
        own = {name: x for name, x in tensors.items() if name.startswith(first)}
        save_file(own, folder / f"{i}.safetensors")
        places |= dict.fromkeys(own, f"{i}.safetensors")
    index = "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": places}))
    peft.dequantize_checkpoint(folder, tmp_path / "dense")
    expected = {f"h.{i}.up.weight": f"{i}.safetensors" for i in range(2)}
    said = json.loads((tmp_path / "dense" / index).read_text())
    assert said["weight_map"] == expected | {"norm.weight": "2.safetensors"}
    assert said["metadata"]["total_size"] == 2 * 2 * ROWS * COLUMNS + 4 * ROWS
    for name, file in said["weight_map"].items():
        assert list(load_file(tmp_path / "dense" / file)) == [name]
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    with refused(FileExistsError, "out"):
        peft.dequantize_checkpoint(folder, out=tmp_path / "dense")


def test_merged_onto_quantized(tmp_path):
    """What is merged into floats is what is merged into the loaded codes."""
    folder = write(tmp_path / "base", {f"h.{i}.up": FORMATS["nf4"](seed=i) for i in range(2)})
    base = peft.load_base(folder, like(jnp.bfloat16), NAMES)
    lora = jlora.transform(lambda p, x: x @ p["layers"]["up"]["kernel"], jlora.LoRA("up", rank=4))
    _, adapter = lora.init(jax.random.key(0), base, jnp.ones((2, 1, COLUMNS), jnp.bfloat16))
    adapter = jax.tree.map(lambda v: v + 0.05, adapter)
    peft.export_merged(folder, adapter, tmp_path / "merged", names=NAMES)
    dense = jlora.merge(jlora.dequantize(base), adapter)["layers"]["up"]["kernel"]
    for i, name in enumerate(("h.0.up.weight", "h.1.up.weight")):
        assert_rounded(tensors_of(tmp_path / "merged")[name].T, dense[i])
    assert {p.name for p in tmp_path.iterdir()} == {"base", "merged"}


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
    assert matrices(tmp_path / "out") == []


@pytest.mark.slow
def test_a_shard_is_never_held_whole(tmp_path):
    """Of matrices that take 64 MB as bfloat16 a few are held, beside the 32 MB that are mapped."""
    n, count = 512, 128
    for name, k in (("small", 1), (".", count)):
        config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        w, scale = np.ones((n, n), jnp.float8_e4m3fn), np.ones((4, 4), np.float32)
        file = File(config, None, weight=w, weight_scale_inv=scale)
        write(tmp_path / name / "base", {f"h.{i}.up": file for i in range(k)})
    _, memory = measure(tmp_path, tmp_path / "small")
    assert memory < count * 2 * n * n


def beside(folder, format, **more):
    """A quantized module `up`, a float one `q`, and an adapter of `q`; `more` tensors."""
    modules = {"up": (FORMATS | DENSE)[format]()}
    write(folder / "base", modules)
    tensors = tensors_in(modules) | {"q.weight": normal(8, 16), **more}
    save_file(tensors, folder / "base" / "model.safetensors")
    params = {"q": {"kernel": jnp.ones((16, 8))}}
    lora = jlora.transform(lambda p, x: x @ p["q"]["kernel"], jlora.LoRA(rank=2))
    _, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 16)))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    peft.save(folder / "a", params, adapter, NAMES)
    return folder / "base", folder / "a", jlora.merge(params, adapter)["q"]["kernel"] - 1


BUFFERS = {
    "embed.position_ids": np.arange(8)[None],
    "attn.bias": np.tril(np.ones((1, 1, 4, 4), np.uint8)),
}


@pytest.mark.parametrize("format", some([*FORMATS, *DENSE], "nf4", "gptq", "mxfp4"))
def test_merged_beside_what_is_quantized(format, tmp_path):
    """Codes never come to stand as weights, whatever the adapter is of.

    Numbers that are no codes are kept, and what is left out beside them is said.
    """
    base, adapter, change = beside(tmp_path, format, **BUFFERS)
    (base / "old.bin").write_bytes(b"")
    assert peft.export_merged(base, adapter, tmp_path / "merged") == ["old.bin"]
    new = tensors_of(tmp_path / "merged")
    for name, x in BUFFERS.items():
        np.testing.assert_array_equal(new.pop(name), x)
    np.testing.assert_allclose(new["q.weight"], normal(8, 16) + change.T, rtol=1e-5, atol=1e-6)
    assert "quantization_config" not in config_of(tmp_path / "merged")
    assert {str(x.dtype) for x in new.values()} <= {"float32", "bfloat16"}
    expected = (FORMATS | DENSE)[format]().matrix
    expected = expected.swapaxes(-1, -2) if format == "mxfp4" else expected
    found = new["up.w" if format == "mxfp4" else "up.weight"]
    assert_rounded(found, expected.astype(jnp.bfloat16))


LEFT = {
    "more.codes": ("I8", np.ones((8, 8), np.int8)),
    "more.weights": ("U8", np.ones((8, 8), np.uint8)),
    "more.weight_words": ("I32", np.ones((8, 8), np.int32)),
    "more.long": ("I64", np.ones((8, 8), np.int64)),
    "more.weight_scale": ("F32", np.ones((8, 1), np.float32)),
    "SCB": ("U8", np.ones(8, np.uint8)),  # no maxima of rows
    "x.SCB.quant_state.bitsandbytes__zz": ("U8", np.ones(8, np.uint8)),
}
WAYS = {
    "export_merged": peft.export_merged,
    "dequantize": lambda base, adapter, out: peft.dequantize_checkpoint(base, out),
    "merge": lambda *folders: fails("merge", *folders),
    "load_base": lambda base, adapter, out: peft.load_base(
        base, {"q": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}, NAMES
    ),
}


METHODS = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm", "mxfp4", "bitsandbytes, 8 bits")
UNREAD = [
    *(("nf4", name, "dequantize") for name in LEFT),
    *((method, "more.codes", "dequantize") for method in METHODS),
    *(("nf4", "more.codes", way) for way in WAYS),
]


@pytest.mark.parametrize(("method", "name", "way"), UNREAD)
def test_what_is_left_unread_is_refused(method, name, way, tmp_path):
    dtype, x = LEFT[name]
    base, adapter, _ = beside(tmp_path, method, **{name: x})
    try:
        said = WAYS[way](base, adapter, tmp_path / "out")
    except ValueError as e:
        said = str(e)
    if way == "load_base":
        assert f"{name}: unexpected" in said
    else:
        assert "but these tensors are not in that format. Give the original" in said
        assert f"1 problem: {name}: {dtype} {x.shape}" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


def test_a_configuration_without_codes(tmp_path):
    base, adapter, _ = beside(tmp_path, "nf4")
    save_file({"q.weight": normal(8, 16)}, base / "model.safetensors")
    with refused(ValueError, "", "quantized by 'bitsandbytes', but no weight is"):
        peft.export_merged(base, adapter, tmp_path / "out")


def test_a_checkpoint_in_floats(tmp_path):
    base, _, _ = beside(tmp_path, "nf4")
    (base / "config.json").write_text("{}")
    assert matrices(base) == []
    with pytest.raises(ValueError, match=rf"`path`: {base} is not quantized. Use it directly\."):
        peft.dequantize_checkpoint(base, tmp_path / "out")


def test_command_line(tmp_path):
    folder = write(tmp_path / "base", {f"h.{i}.up": FORMATS["nf4"](seed=i) for i in range(2)})
    shown = run("inspect", folder).stdout
    assert "h.0.up.weight  64×128  NF4(block=64, double=True)  4.1" in shown
    assert shown.endswith("base: 2 matrices, 8.3 KiB\n")
    rows = json.loads(run("inspect", folder, "--json").stdout)["tensors"]
    assert [row["name"] for row in rows] == ["h.0.up.weight", "h.1.up.weight"]
    assert rows[0]["shape"] == [ROWS, COLUMNS]
