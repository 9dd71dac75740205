"""Sketches on a mesh of eight devices, in float64.

Whatever the mesh, a sketch is what it is on one device.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import KINDS, assert_lies, mesh_of, normal, put
from small import some

import jlora
from jlora import LoRA
from jlora.initializers import eva, lora_ga

LAYERS, D, F = 3, 16, 8
MESHES = {kind: mesh_of(kind, (2, 2), ("d", "t")) for kind in KINDS}
AUTO = MESHES[AxisType.Auto]
SPECS = {
    "replicated": {"up": P(), "down": P()},
    "fsdp": {"up": P(None, "d"), "down": P(None, "d")},
    "tensor": {"up": P(None, None, "t"), "down": P(None, "t")},
    "both": {"up": P(None, "d", "t"), "down": P(None, "t", "d")},
}
PARAMS = {"up": normal(0, LAYERS, D, F), "down": normal(1, LAYERS, F, D)}
BATCHES = [normal(2, 8, D), normal(3, 8, D)]


def layer(x, p):
    """Whose weights are gathered along `d`, as FSDP has it, where the axes are explicit."""
    up, down = p["up"], p["down"]
    if jax.typeof(x).sharding.mesh.are_all_axes_explicit:
        up, down = (
            jax.reshard(w, P(*(a if a == "t" else None for a in jax.typeof(w).sharding.spec)))
            for w in (up, down)
        )
        return x + jnp.matmul(jnp.tanh(x @ up), down, out_sharding=P("d")), None
    return x + jnp.tanh(x @ up) @ down, None


def model(p, x):
    return lax.scan(layer, x, p)[0]


def loss_of(model):
    return lambda p, x: jnp.sum(jnp.sin(model(p, x)))


def sketched(model, kind, params=PARAMS, batches=BATCHES):
    return jlora.sketch(loss_of(model), params, LoRA(rank=1), batches, kind=kind, components=F)


@functools.cache
def expected(kind):
    return sketched(model, kind)


def check(found, other):
    for path, s in other.sites.items():
        mine = found.sites[path]
        for name in ("values", "total"):
            np.testing.assert_allclose(getattr(mine, name), getattr(s, name), rtol=1e-8)
        a, b = (np.asarray(x.inputs) for x in (s, mine))
        np.testing.assert_allclose(a @ a.mT, b @ b.mT, atol=1e-8)


def every_place():
    """Every spec on every mesh, one every day; starts are on explicit axes then."""
    daily = ("both", AxisType.Auto, "inputs")
    rows = itertools.product(SPECS, KINDS, ("inputs", "gradient"))
    return [pytest.param(*r, marks=[] if r == daily else pytest.mark.slow) for r in rows]


@pytest.mark.parametrize(("spec", "axes", "kind"), every_place(), ids=str)
def test_on_a_mesh_is_as_on_one_device(spec, axes, kind):
    mesh = MESHES[axes]
    params, batches = put(PARAMS, mesh, SPECS[spec]), put(BATCHES, mesh, P("d"))
    with jax.set_mesh(mesh):
        found = sketched(model, kind, params, batches)
    check(found, expected(kind))


def within(body, specs, **how):
    """A model that is a `shard_map` itself, over tokens."""
    return jax.shard_map(body, mesh=AUTO, in_specs=(specs, P("d")), out_specs=P("d"), **how)


def column_and_row(p, x):
    """Outputs of `up` and inputs of `down` are cut."""
    step = lambda x, p: (x + lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "t"), None)  # noqa: E731
    return lax.scan(step, x, p)[0]


WHOLE, CUT = within(model, P()), within(column_and_row, SPECS["tensor"])
UNCHECKED = within(model, P(), check_vma=False)
GRADIENTS = [pytest.param(f, "gradient", marks=pytest.mark.slow) for f in (WHOLE, CUT, UNCHECKED)]


@pytest.mark.parametrize(("f", "kind"), [(WHOLE, "inputs"), *GRADIENTS])
def test_within_the_models_own_shard_map(f, kind):
    check(sketched(f, kind), expected(kind))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (CUT, "reaches `shard_map` at .*a device has a part of each matrix"),
        (UNCHECKED, "or that is not checked"),
    ],
)
def test_inputs_that_a_shard_map_hides_are_refused(f, message):
    """Where inputs are cut x·A is a part; where outputs are, each device has all."""
    for path in PARAMS:
        with pytest.raises(NotImplementedError, match=f"'{path}'.*{message}"):
            jlora.sketch(loss_of(f), PARAMS, LoRA(path, rank=1), BATCHES, kind="inputs")


@pytest.mark.slow
def test_experts_that_a_shard_map_cuts():
    """Each device has some of them whole."""
    params = {"up": normal(0, 4, D, F), "down": normal(1, 4, F, D)}
    batches = [normal(seed, 4, 8, D) for seed in (2, 3)]
    each = jax.vmap(lambda p, x: layer(x, p)[0])
    cut = jax.shard_map(each, mesh=AUTO, in_specs=(P("t"), P("t", "d")), out_specs=P("t", "d"))
    found, other = (sketched(f, "inputs", params, batches) for f in (cut, each))
    check(found, other)


@pytest.mark.parametrize("axes", some(KINDS, AxisType.Explicit))
@pytest.mark.parametrize("start", some([eva, lora_ga], lora_ga))
@pytest.mark.parametrize("jit", some([True, False], True))
def test_starts_on_a_mesh(start, axes, jit):
    """The base lies where it lay, and the model begins as it was."""
    mesh, kind = MESHES[axes], "inputs" if start is eva else "gradient"
    specs = {"up": SPECS["fsdp"]["up"], "down": P()}
    params, x = put(PARAMS, mesh, specs), put(BATCHES[0], mesh, P("d"))
    with jax.set_mesh(mesh):
        rule = LoRA(rank=2, init=start(sketched(model, kind, params, [x])))
        lora = jlora.transform(model, rule)
        base, adapter = (jax.jit(lora.init) if jit else lora.init)(jax.random.key(0), params, x)
        actual, expected = jax.jit(lora.apply)(base, adapter, x), jax.jit(model)(params, x)
    np.testing.assert_allclose(actual, expected)
    assert_lies(base, params)
    for path, w in base.items():
        assert np.any(np.asarray(w) != np.asarray(params[path])) == (kind == "gradient")
