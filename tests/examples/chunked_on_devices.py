"""`examples/chunked.py` on eight devices: each keeps its rows, and its part of the vocabulary."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from laws import assert_close
from meshes import adapter_of, compiled, lines, mesh_of, moved, normal, put
from small import some

import jlora
from tests.adapters.methods_on_devices import is_explicit
from tests.examples.test_chunked import by_chunks, whole

ROWS, LENGTH, DIM, VOCAB, CHUNK = 8, 24, 128, 64, 5
PARAMS = {"table": normal(0, VOCAB, DIM), "w": normal(1, DIM, DIM), "head": normal(2, DIM, VOCAB)}
IDS = jax.random.randint(jax.random.key(0), (ROWS, LENGTH + 1), 0, VOCAB)
WEIGHTS = normal(3, ROWS, LENGTH)
SPECS = {"table": P(None, "fsdp"), "w": P("fsdp", "tensor"), "head": P("fsdp", "tensor")}
HEADS = {
    "frozen": jlora.LoRA("w", rank=2),
    "adapted": jlora.LoRA("w|head", rank=2),
    "DoRA": jlora.DoRA("w|head", rank=2),
    "Full": jlora.Full("head"),
    "NF4": jlora.LoRA("w|head", rank=2),
    "tied": jlora.LoRA("w|table", rank=2),
    "tied Full": jlora.Full("table"),
    "tied Rows": jlora.Rows("table", (3, 17)),
}


def slope_of(form, kind):
    """The sum of the log-probabilities with a weight each, and its gradient in the adapter."""

    def model(p, ids):
        rows = jax.typeof(ids).sharding.spec[:1]
        out = P(*rows, None, None) if is_explicit() else None
        h = jnp.tanh(p["table"].at[ids[:, :-1]].get(out_sharding=out) @ p["w"])
        head = p["table"].T if kind.startswith("tied") else p["head"]
        return form(lambda h: h @ head, h, ids[:, 1:])

    lora = jlora.transform(model, HEADS[kind])

    def f(adapter, base, ids, weights):
        return (weights * lora.apply(base, adapter, ids)).sum()

    return lora, jax.value_and_grad(f)


@pytest.mark.parametrize("kind", some(HEADS, "adapted"))
def test_eight_devices_are_one(kind):
    """Values and gradients; no array is moved that is larger than with whole logits."""
    lora, expected = slope_of(whole, kind)
    _, found = slope_of(by_chunks(CHUNK), kind)
    params, mesh = PARAMS, mesh_of()
    if kind == "NF4":
        params = jlora.quantize(PARAMS, jlora.NF4("w|head", block=32))
    adapter = adapter_of(lora, params, IDS)
    one = jax.jit(expected)(adapter, params, IDS, WEIGHTS)
    with jax.set_mesh(mesh):
        dense = put(PARAMS, mesh, SPECS)
        specs = jlora.sharding.specs(jax.tree.map(lambda x: x.sharding, dense), params)
        params = jax.tree.map(jax.device_put, params, specs)
        args = put(adapter, mesh, P()), params, put(IDS, mesh, P("fsdp"))
        args = *args, put(WEIGHTS, mesh, P("fsdp"))
        programs = [compiled(f, *args) for f in (expected, found)]
        eight = programs[1](*args)
    assert_close(jax.device_get(eight), jax.device_get(one), 1e-10, "eight devices are one")
    before, now = (max(size for _, size in moved(program)) for program in programs)
    assert now <= before


@pytest.mark.parametrize("kind", some(["frozen", "adapted"], "frozen"))
def test_explicit_axes(kind):
    """The head says how its logits are sharded, as along explicit axes every product does."""
    mesh = lines()[AxisType.Explicit]
    lora, expected = slope_of(whole, kind)
    adapter = adapter_of(lora, PARAMS, IDS)
    one = jax.jit(expected)(adapter, PARAMS, IDS, WEIGHTS)
    with jax.set_mesh(mesh):
        _, found = slope_of(by_chunks(CHUNK), kind)
        args = (put(x, mesh, spec) for x, spec in ((adapter, P()), (PARAMS, P()), (IDS, P("d"))))
        eight = jax.jit(found)(*args, put(WEIGHTS, mesh, P("d")))
    assert_close(jax.device_get(eight), jax.device_get(one), 1e-10, "explicit axes")
