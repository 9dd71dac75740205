"""A model of PyTorch's meta device on a mesh of eight: streamed, constrained, trained."""

import functools
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("jlora.torch._apply")

import chat
import torch
from models.tiny import write_tokenizer
from safetensors.numpy import load_file, save_file
from small import KEY, assert_close, randomize
from torch_models import GROUPED, MODELS, NO_CACHE, Model

import jlora
from jlora import LoRA, peft, sharding
from jlora._quantized import is_quantized
from tests.examples.folders import (
    run_on_eight_and_on_one,
    write_conversations,
)

LAYERS = r"embed_tokens|layers/\d+(/mlp|/self_attn)?"


def place(mesh: jax.sharding.Mesh, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    spec = P(*[None] * (x.ndim - 2), "tensor", "fsdp") if x.ndim > 1 else P()
    fits = all(n % (mesh.shape[a] if a else 1) == 0 for n, a in zip(x.shape, spec))  # noqa: B905
    where = NamedSharding(mesh, spec if fits else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


SCAN = {"scan": ["model/layers"], "remat": {r"layers/\d+": None}}


def stream(model: Any, folder: pathlib.Path, ids: np.ndarray, **options: Any) -> tuple[Any, ...]:
    """Loads a folder onto a mesh, for the same model without memory.

    Returns its transform, its base, where it lies, and the ids, whose rows are sharded.
    """
    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("fsdp", "tensor"))
    rows = NamedSharding(mesh, P("fsdp"))
    with torch.device("meta"):
        empty = type(model)(model.config).eval()
    shapes, apply = jlora.torch.extract(empty, {LAYERS: rows}, **options)
    like = jax.tree.map(functools.partial(place, mesh), shapes)
    lora = jlora.transform(lambda p, x: apply(p, x, use_cache=False).logits, LoRA(rank=2))
    names = jlora.torch.names(lora.sites(shapes, ids), apply)
    return lora, peft.load_base(folder, like, names), like, jax.device_put(ids, rows)


@pytest.mark.parametrize(
    ("name", "options"), [("llama", {}), ("llama", SCAN), ("qwen3-moe", {}), ("gemma4", {})]
)
def test_streamed_onto_a_mesh(name: str, options: Any, tmp_path: pathlib.Path) -> None:
    """The model made from shapes computes what the one with values does, on one device."""
    model = MODELS[name].make()
    model.save_pretrained(tmp_path / "base")
    whole, alone = jlora.torch.extract(model, **options)
    ids = np.tile(MODELS[name].arrays["input_ids"], (4, 1))
    lora, base, like, inputs = stream(model, tmp_path / "base", ids, **options)
    for x, y, z in zip(*map(jax.tree.leaves, (base, whole, like)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.sharding == z.sharding
    _, adapter = lora.init(KEY, base, ids)
    adapter = jax.device_put(randomize(adapter), sharding.specs(base, adapter))
    plain = jlora.transform(lambda p, x: alone(p, x, use_cache=False).logits, LoRA(rank=2))
    found, expected = (
        jax.jit(jax.grad(lambda a, b, x, f=f: (f.apply(b, a, x) ** 2).mean()))(*given)
        for f, given in (
            (lora, (adapter, base, inputs)),
            (plain, (jax.device_get(adapter), whole, ids)),
        )
    )
    assert_close(jax.device_get(found), jax.device_get(expected), 1e-3)


def draw_codes(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws a matrix as bitsandbytes stores it: blocks of 64, two codes in a byte."""
    size = math.prod(shape)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [*shape]}
    return {
        key: rng.integers(0, 256, (size // 2, 1), np.uint8),
        f"{key}.absmax": rng.random(size // 64, np.float32),
        f"{key}.quant_map": np.asarray(jlora.NF4.table),
        f"{key}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def test_codes_on_a_mesh(tmp_path: pathlib.Path) -> None:
    """A base in NF4 is streamed as codes, and trains as its values in floats do on one device."""
    sizes = GROUPED | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    model = Model("LlamaForCausalLM", sizes, NO_CACHE).make()
    model.save_pretrained(tmp_path)
    file, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    for seed, key in enumerate([key for key in tensors if "_proj" in key]):
        tensors |= draw_codes(key, tensors.pop(key).shape, np.random.default_rng(seed))
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    ids = np.arange(64).reshape(8, 8)
    lora, base, like, inputs = stream(model, tmp_path, ids)
    codes = [x for x in jax.tree.leaves(base, is_leaf=is_quantized) if is_quantized(x)]
    assert len(codes) == 14
    assert all(len(x.data.sharding.device_set) == 8 for x in codes)
    assert not any(x.data.sharding.is_fully_replicated for x in codes)
    _, adapter = lora.init(KEY, base, ids)
    adapter = randomize(adapter)
    placed = jax.device_put(adapter, sharding.specs(like, adapter))
    loss = jax.grad(lambda a, b, x: (lora.apply(b, a, x) ** 2).mean())
    found = jax.jit(loss)(placed, base, inputs)
    dense = jax.device_get(jlora.dequantize(base))
    assert_close(jax.device_get(found), jax.device_get(loss(adapter, dense, ids)), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--quantize=nf4"]])
def test_chat(more: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples/chat.py` on eight devices learns as on one, and no matrix is whole on a device."""
    row = MODELS["llama"]
    wide = {"vocab_size": 400, "hidden_size": 512, "intermediate_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    row._replace(fields=row.fields | wide | heads).make().save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    data = write_conversations(tmp_path / "data.jsonl", 4)
    sizes = ["--batch=8", "--length=64", "--steps=3", "--held-out=8", *more]
    argv = [f"--base={tmp_path / 'base'}", f"--data={data}", *sizes]
    loaded, load = [], chat.load
    monkeypatch.setattr(chat, "load", lambda *xs: loaded.append(load(*xs)) or loaded[-1])
    run_on_eight_and_on_one(chat.main, argv, tmp_path, monkeypatch)
    places = [x for x in jax.tree.leaves(loaded[0].places) if any(x.spec)]
    assert len(places) == 9
