"""A Llama in PyTorch, compiled for a TPU slice that is not there, beside the same one in Flax."""

import contextlib
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
pytest.importorskip("torchax")

import flax.linen as nn
import torch
import transformers
from models import llama
from models.parts import RULES, shardings

import jlora
from jlora import LoRA, sharding
from jlora._compat import HURRIED

# What torchax warns of is its own.
pytestmark = pytest.mark.filterwarnings("default")
VOCAB, LAYERS, DIM, HIDDEN, HEADS, GROUPS = 2048, 2, 1024, 2816, 8, 4
ACTIVATIONS = r"embed_tokens|layers/\d+(/mlp|/self_attn)?"


class Cost(NamedTuple):
    """What a step moves and holds."""

    size: float
    memory: int
    collectives: dict[str, tuple[int, int]]


def cost(f: Callable[..., Any], base: Any, pattern: str, around: Callable[[], Any]) -> Cost:
    """Compiles the gradient of a language model's loss, with LoRA on all projections."""
    mesh = jax.tree.leaves(base)[0].sharding.mesh
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    lora = jlora.transform(f, LoRA(pattern, rank=16, dtype=jnp.bfloat16))
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (base, ids))
    _, adapter = jax.eval_shape(lora.init, jax.random.key(0), *plain)
    specs = sharding.specs(base, adapter)
    adapter = jax.tree.map(lambda x, s: x.update(sharding=s), adapter, specs)

    def loss(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        logits = lora.apply(base, adapter, ids)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    with around():
        step = jax.jit(jax.grad(loss)).lower(adapter, base, ids)
    step = step.compile(HURRIED)
    size: Any = step.cost_analysis()
    memory: Any = step.memory_analysis()
    found = summary(collectives(step.as_text()))
    return Cost(size["bytes accessed"], memory.temp_size_in_bytes, found)


def in_flax(mesh: jax.sharding.Mesh) -> Cost:
    config = llama.Config(VOCAB, LAYERS, DIM, HIDDEN, HEADS, GROUPS, tied=False)
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "scan": False}
    model = llama.Llama(config, **options)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    places = shardings(boxed, mesh)
    base = jax.tree.map(lambda x, s: x.update(sharding=s), nn.unbox(boxed), places)
    with nn.logical_axis_rules(RULES):
        return cost(model.apply, base, r"layers_\d+/.*kernel", lambda: jax.set_mesh(mesh))


def in_pytorch(mesh: jax.sharding.Mesh, activations: Any, attention: str) -> Cost:
    sizes = {"vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": HIDDEN}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    config = transformers.LlamaConfig(**sizes, **heads, num_hidden_layers=LAYERS)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    shapes, apply = jlora.torch.extract(model, activations)

    def place(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_last = re.search("o_proj|down_proj", jax.tree_util.keystr(path))
        axes = ("fsdp", "tensor") if is_last else ("tensor", "fsdp")
        return x.update(sharding=NamedSharding(mesh, P(*axes) if x.ndim == 2 else P()))

    base = jax.tree_util.tree_map_with_path(place, shapes)
    call = lambda p, x: apply(p, x, use_cache=False).logits  # noqa: E731
    return cost(call, base, ".*_proj/weight", contextlib.nullcontext)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mesh_costs_what_it_does_in_flax(attention: str) -> None:
    """Heads of attention are sharded, as PyTorch's products are not made of merged axes."""
    mesh = tpu.mesh_for("v5e:2x2", (2, 2))
    rows = NamedSharding(mesh, P("fsdp"))
    expected = in_flax(mesh)
    found = in_pytorch(mesh, {ACTIVATIONS: rows}, attention)
    assert found.collectives.keys() == expected.collectives.keys()
    for kind, (count, size) in expected.collectives.items():
        assert found.collectives[kind][0] == count
        assert found.collectives[kind][1] == pytest.approx(size, rel=1e-3)
    assert found.size <= 1.05 * expected.size
    assert found.memory <= 1.1 * expected.memory
    assert in_pytorch(mesh, None, attention).size > 1.2 * found.size
