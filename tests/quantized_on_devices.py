"""Quantized bases on a mesh of eight devices, in float64: run by `test_quantized_mesh.py`.

Whatever the mesh, a step gives what it gives on one device on the weights that the codes stand for.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from collectives import collectives
from jax import lax
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import jlora
from jlora import FP8, NF4, Int4, Int8, sharding

LAYERS, D, F, ROWS = 3, 256, 128, 8


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), (kind, kind))


AUTO, EXPLICIT = map(mesh_of, (AxisType.Auto, AxisType.Explicit))
UP, DOWN = P("fsdp", "tensor"), P("tensor", "fsdp")
SPECS = {"up": UP, "down": DOWN}
STACKED = {name: P(None, *spec) for name, spec in SPECS.items()}
SCHEMES = [
    NF4("up|down"),
    NF4("up|down", double=False),
    Int8("up|down"),
    Int8("up|down", block=32),
    FP8("up|down", block=64),
    FP8("up|down", block=None),
    Int4("up|down", group=32),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)
FEW = pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2], SCHEMES[6]], ids=str)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)) / 8


def layer(w, x):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def scanned(layer):
    return lambda p, x: lax.scan(lambda x, w: (layer(w, x), None), x, p)[0]


def problem(model, scheme, stacked=False):
    """The transform, a quantized base and an adapter on one device, and where weights lie."""
    lead = (LAYERS,) if stacked else ()
    params = {"up": normal(0, *lead, D, F), "down": normal(1, *lead, F, D)}
    x = normal(2, ROWS, D)
    lora = jlora.transform(model, jlora.LoRA(rank=2))
    base, adapter = lora.init(jax.random.key(0), jlora.quantize(params, scheme), x)
    return lora, base, laws.randomize(adapter), x, STACKED if stacked else SPECS


def on_mesh(mesh, base, adapter, x, specs):
    """All of it on a mesh, by the partitions of the dense weights."""
    return (
        jax.device_put(base, sharding.specs(specs, base, mesh)),
        jax.device_put(adapter, sharding.specs(specs, adapter, mesh)),
        jax.device_put(x, NamedSharding(mesh, P("fsdp"))),
    )


def lies_as(tree, places):
    """Whether each array lies where `places` has it."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return all(x.sharding.is_equivalent_to(place, x.ndim) for x, place in pairs)


def step(lora, brought=lambda base: base):
    """Outputs, and their slope along the adapter, of (adapter, base, x)."""
    return jax.jit(laws.value_and_slope(lambda a, b, x: lora.apply(brought(b), a, x)))


def check(model, scheme, stacked=False, mesh=AUTO, brought=lambda base, specs: base, dense=None):
    """`model` on the mesh is `dense`, or itself, on one device on dequantized weights."""
    lora, base, adapter, x, specs = problem(dense or model, scheme, stacked)
    expected = step(lora)(adapter, jlora.dequantize(base), x)
    assert np.abs(expected[0][0]).max() > 0.1
    base, adapter, x = on_mesh(mesh, base, adapter, x, specs)
    ours = jlora.transform(model, jlora.LoRA(rank=2))
    with jax.set_mesh(mesh):
        f = step(ours, lambda base: brought(base, specs))
        laws.assert_close(f(adapter, base, x), expected, 1e-5)
        return f.lower(adapter, base, x).compile().as_text()


# ----------------------------------------------------------------------------------- automatic axes


def gathered(base, specs):
    """Its codes whole along fsdp where they are used, along the axes of the mesh in scope."""
    return sharding.gathered(base, sharding.replicated(specs, "fsdp"))


def gathered_on(base, specs):
    """The same by NamedShardings."""
    places = jax.tree.map(lambda s: NamedSharding(AUTO, s), specs)
    return sharding.gathered(base, sharding.replicated(places, "fsdp"))


def as_it_is(base, specs):
    return base


@schemes
@pytest.mark.parametrize("brought", [as_it_is, gathered])
def test_a_step(scheme, brought):
    check(layer, scheme, brought=brought)


@schemes
@pytest.mark.parametrize("brought", [as_it_is, gathered, gathered_on])
def test_a_scan_over_remat(scheme, brought):
    check(scanned(jax.checkpoint(layer)), scheme, True, brought=brought)


@FEW
def test_a_scan(scheme):
    check(scanned(layer), scheme, True, brought=gathered)
