"""A model of PyTorch's meta device on a mesh of eight: streamed, constrained, trained."""

import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("torchax")

import torch
from small import KEY, assert_same, randomize
from torch_models import MODELS

import jlora
from jlora import LoRA, peft, sharding

pytestmark = pytest.mark.filterwarnings("default")  # what torchax warns of is its own
LAYERS = r"embed_tokens|layers/\d+(/mlp|/self_attn)?"


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "gemma4"])
def test_streamed_onto_a_mesh(name: str, tmp_path: pathlib.Path) -> None:
    """The model made from shapes computes what the one with values does, on one device."""
    model = MODELS[name].make()
    model.save_pretrained(tmp_path / "base")
    whole, alone = jlora.torch.extract(model)
    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("fsdp", "tensor"))
    rows = NamedSharding(mesh, P("fsdp"))
    with torch.device("meta"):
        shapes, apply = jlora.torch.extract(type(model)(model.config).eval(), {LAYERS: rows})

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P(*[None] * (x.ndim - 2), "tensor", "fsdp") if x.ndim > 1 else P()
        fits = all(n % (mesh.shape[a] if a else 1) == 0 for n, a in zip(x.shape, spec))  # noqa: B905
        place = NamedSharding(mesh, spec if fits else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    like = jax.tree.map(place, shapes)
    ids = np.tile(MODELS[name].arrays["input_ids"], (4, 1))
    lora = jlora.transform(lambda p, x: apply(p, x, use_cache=False).logits, LoRA(rank=2))
    names = jlora.torch.names(lora.sites(shapes, ids), apply)
    base = peft.load_base(tmp_path / "base", names, like=like)
    for x, y, z in zip(*map(jax.tree.leaves, (base, whole, like)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.sharding == z.sharding
    _, adapter = lora.init(KEY, base, ids)
    adapter = jax.device_put(randomize(adapter), sharding.specs(base, adapter))
    inputs = jax.device_put(ids, rows)
    plain = jlora.transform(lambda p, x: alone(p, x, use_cache=False).logits, LoRA(rank=2))
    found, expected = (
        jax.jit(jax.grad(lambda a, b, x, f=f: (f.apply(b, a, x) ** 2).mean()))(*given)
        for f, given in (
            (lora, (adapter, base, inputs)),
            (plain, (jax.device_get(adapter), whole, ids)),
        )
    )
    assert_same(jax.device_get(found), jax.device_get(expected), 1e-3)
