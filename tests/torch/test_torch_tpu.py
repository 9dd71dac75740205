"""A Llama in PyTorch, compiled for a TPU slice that is not there, beside the same one in Flax."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from collectives import collectives, summary
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.bench import tpu

pytest.importorskip("libtpu")
pytest.importorskip("jlora.torch._apply")

import flax.linen as nn
import torch
import transformers
from models import llama
from models.parts import RULES, shardings

import jlora
from jlora import LoRA, sharding
from jlora._compat import HURRIED

# What torchax warns of is its own.
SMALL = llama.Config(2048, 2, 1024, 2816, 8, 4, tied=False)
LARGE = llama.SIZES["llama3-8b"]
ACTIVATIONS = r"embed_tokens|layers/\d+(/mlp|/self_attn)?"


class Cost(NamedTuple):
    """What a step moves and holds, and how long its program is before it is compiled."""

    size: float
    memory: int
    collectives: dict[str, tuple[int, int]]
    lines: int


def cost(
    f: Callable[..., Any], base: Any, shape: tuple[int, int], pattern: str, around: Any
) -> Cost:
    """Compiles the gradient of a language model's loss, with LoRA on all projections."""
    mesh = jax.tree.leaves(base)[0].sharding.mesh
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    lora = jlora.transform(f, LoRA(pattern, rank=16, dtype=jnp.bfloat16))
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (base, ids))
    _, adapter = jax.eval_shape(lora.init, jax.random.key(0), *plain)
    specs = sharding.specs(base, adapter)
    adapter = jax.tree.map(lambda x, s: x.update(sharding=s), adapter, specs)

    def loss(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        logits = lora.apply(base, adapter, ids)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    with around():
        lowered = jax.jit(jax.grad(loss)).lower(adapter, base, ids)
    step = lowered.compile(HURRIED)
    size: Any = step.cost_analysis()
    memory: Any = step.memory_analysis()
    found = summary(collectives(step.as_text()))
    lines = lowered.as_text().count("\n")
    return Cost(size["bytes accessed"], memory.temp_size_in_bytes, found, lines)


def in_flax(
    mesh: jax.sharding.Mesh, scan: bool, c: llama.Config = SMALL, shape: tuple[int, int] = (4, 256)
) -> Cost:
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "scan": scan, "remat": scan}
    model = llama.Llama(c, **options)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    places = shardings(boxed, mesh)
    base = jax.tree.map(lambda x, s: x.update(sharding=s), nn.unbox(boxed), places)
    with nn.logical_axis_rules(RULES):
        return cost(model.apply, base, shape, r"layers.*kernel", lambda: jax.set_mesh(mesh))


def in_pytorch(
    mesh: jax.sharding.Mesh,
    scan: bool,
    c: llama.Config = SMALL,
    shape: tuple[int, int] = (4, 256),
    attention: str = "sdpa",
    activations: str | None = ACTIVATIONS,
    **static: Any,
) -> Cost:
    sizes = {"vocab_size": c.vocab, "hidden_size": c.dim, "intermediate_size": c.hidden}
    heads = {"num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads}
    config = transformers.LlamaConfig(**sizes, **heads, num_hidden_layers=c.layers)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    rows = activations and {activations: NamedSharding(mesh, P("fsdp"))}
    again = {r"layers/\d+": None} if scan else None
    shapes, apply = jlora.torch.extract(model, rows, ["model/layers"] * scan, again)

    def place(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path)
        axes = ("fsdp", "tensor") if re.search("o_proj|down_proj", name) else ("tensor", "fsdp")
        stack = (None,) * (scan and "layers" in name)
        return x.update(
            sharding=NamedSharding(mesh, P(*stack, *axes) if "norm" not in name else P())
        )

    base = jax.tree_util.tree_map_with_path(place, shapes)
    call = lambda p, x: apply(p, x, use_cache=False, **static).logits  # noqa: E731
    return cost(call, base, shape, ".*_proj/weight", contextlib.nullcontext)


def check(found: Cost, expected: Cost, size: float, memory: float) -> None:
    """It has the same collectives, and at most so many times the bytes accessed and held."""
    assert found.collectives.keys() == expected.collectives.keys()
    for kind, (count, size) in expected.collectives.items():
        assert found.collectives[kind][0] == count
        assert found.collectives[kind][1] == pytest.approx(size, rel=1e-3)
    assert found.size <= size * expected.size
    assert found.memory <= memory * expected.memory


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mesh_costs_what_it_does_in_flax(attention: str) -> None:
    """Heads of attention are sharded, as PyTorch's products are not made of merged axes."""
    mesh = tpu.mesh_for("v5e:2x2", (2, 2))
    expected = in_flax(mesh, scan=False)
    found = in_pytorch(mesh, scan=False, attention=attention)
    check(found, expected, 1.05, 1.1)
    free = in_pytorch(mesh, scan=False, attention=attention, activations=None)
    assert free.size > 1.2 * found.size


def test_a_scan_costs_what_it_does_in_flax() -> None:
    """Also with positions that are static, so that `transformers` makes no mask."""
    mesh = tpu.mesh_for("v5e:2x2", (2, 2))
    expected = in_flax(mesh, scan=True)
    check(in_pytorch(mesh, scan=True), expected, 1.05, 1.1)
    found = in_pytorch(mesh, scan=True, position_ids=torch.arange(256)[None])
    check(found, expected, 1.0, 1.1)


@pytest.mark.slow
def test_llama_of_32_layers() -> None:
    """That of 8B on 16 chips; the program does not grow with the number of layers."""
    mesh = tpu.mesh_for("v5e:4x4", (8, 2))
    static = {"position_ids": torch.arange(2048)[None]}
    expected = in_flax(mesh, True, LARGE, (8, 2048))
    found = in_pytorch(mesh, True, LARGE, (8, 2048), **static)
    check(found, expected, 1.02, 1.02)
    few = in_pytorch(mesh, True, dataclasses.replace(LARGE, layers=4), (8, 2048), **static)
    assert few.lines == found.lines
