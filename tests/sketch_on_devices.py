"""Sketches on a mesh of eight devices, in float64.

Whatever the mesh, a sketch is what it is on one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import every, some

import jlora
from jlora import LoRA
from jlora.initializers import eva, lora_ga

LAYERS, D, F = 3, 16, 8
MESHES = {
    kind: jax.make_mesh((2, 2), ("d", "t"), (kind,) * 2)
    for kind in (AxisType.Auto, AxisType.Explicit)
}
SPECS = {
    "replicated": (P(), P()),
    "fsdp": (P(None, "d"), P(None, "d")),
    "tensor": (P(None, None, "t"), P(None, "t")),
    "both": (P(None, "d", "t"), P(None, "t", "d")),
}
KINDS = ("inputs", "gradient")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


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


def loss(p, x):
    return jnp.sum(jnp.sin(lax.scan(layer, x, p)[0]))


def sketched(loss, params, batches, kind):
    return jlora.sketch(loss, params, LoRA(rank=1), batches, kind=kind, components=F, passes=2)


@functools.cache
def expected(kind):
    return sketched(loss, PARAMS, BATCHES, kind)


def check(found, kind):
    for path, s in expected(kind).sites.items():
        for name in ("values", "total"):
            np.testing.assert_allclose(
                getattr(found.sites[path], name), getattr(s, name), rtol=1e-8
            )
        a, b = (np.asarray(x.inputs) for x in (s, found.sites[path]))
        np.testing.assert_allclose(a @ a.mT, b @ b.mT, atol=1e-8)


DAILY = [("both", AxisType.Auto, "inputs")]


@pytest.mark.parametrize(("spec", "mesh", "kind"), every(SPECS, MESHES, KINDS, daily=DAILY))
def test_on_a_mesh_is_as_on_one_device(spec, mesh, kind):
    mesh = MESHES[mesh]
    put = lambda x, s: jax.device_put(np.asarray(x), NamedSharding(mesh, s))  # noqa: E731
    params = dict(zip(PARAMS, map(put, PARAMS.values(), SPECS[spec]), strict=True))
    with jax.set_mesh(mesh):
        found = sketched(loss, params, [put(x, P("d")) for x in BATCHES], kind)
    check(found, kind)


def within(body, specs, **how):
    """The loss of a model that is a `shard_map` itself."""

    def loss(p, x):
        f = jax.shard_map(
            body, mesh=MESHES[AxisType.Auto], in_specs=(specs, P("d")), out_specs=P("d"), **how
        )
        return jnp.sum(jnp.sin(f(p, x)))

    return loss


@pytest.mark.parametrize("kind", some(KINDS, "inputs"))
def test_within_the_models_own_shard_map(kind):
    """Over tokens."""
    body = lambda p, x: lax.scan(layer, x, p)[0]  # noqa: E731
    check(sketched(within(body, P()), PARAMS, BATCHES, kind), kind)


def column_and_row(p, x):
    """Outputs of `up` and inputs of `down` are cut."""
    step = lambda x, p: (x + lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "t"), None)  # noqa: E731
    return lax.scan(step, x, p)[0]


CUT = {"up": P(None, None, "t"), "down": P(None, "t")}


def test_inputs_of_matrices_that_a_shard_map_cuts_are_refused():
    """Where inputs are cut x·A is a part; where outputs are, each device has all. Not of G."""
    f = within(column_and_row, CUT)
    check(sketched(f, PARAMS, BATCHES, "gradient"), "gradient")
    for path in PARAMS:
        message = f"'{path}' reaches `shard_map` at .*a device has a part of each matrix"
        with pytest.raises(NotImplementedError, match=message):
            jlora.sketch(f, PARAMS, LoRA(path, rank=1), BATCHES, kind="inputs")


@pytest.mark.slow
def test_experts_that_a_shard_map_cuts():
    """Each device has some of them whole."""
    params = {"up": normal(0, 4, D, F), "down": normal(1, 4, F, D)}
    batches = [normal(seed, 4, 8, D) for seed in (2, 3)]
    each = jax.vmap(lambda p, x: layer(x, p)[0])
    mesh = MESHES[AxisType.Auto]
    cut = jax.shard_map(each, mesh=mesh, in_specs=(P("t"), P("t", "d")), out_specs=P("t", "d"))
    found, whole = (
        sketched(lambda p, x, f=f: jnp.sum(jnp.sin(f(p, x))), params, batches, "inputs")
        for f in (cut, each)
    )
    for path, s in found.sites.items():
        np.testing.assert_allclose(s.values, whole.sites[path].values, rtol=1e-8)
        np.testing.assert_allclose(s.total, whole.sites[path].total, rtol=1e-8)


def test_inputs_within_a_shard_map_that_checks_nothing_are_refused():
    body = lambda p, x: lax.scan(layer, x, p)[0]  # noqa: E731
    f = within(body, P(), check_vma=False)
    check(sketched(f, PARAMS, BATCHES, "gradient"), "gradient")
    with pytest.raises(NotImplementedError, match="or that is not checked"):
        sketched(f, PARAMS, BATCHES, "inputs")


@pytest.mark.parametrize("mesh", some(MESHES, AxisType.Explicit))
@pytest.mark.parametrize(("start", "kind"), [(eva, "inputs"), (lora_ga, "gradient")])
def test_starts_on_a_mesh(start, kind, mesh):
    """The base lies where it lay, and the model begins as it was."""
    mesh = MESHES[mesh]
    put = lambda x, s: jax.device_put(np.asarray(x), NamedSharding(mesh, s))  # noqa: E731
    params = {"up": put(PARAMS["up"], SPECS["fsdp"][0]), "down": put(PARAMS["down"], P())}
    x = put(BATCHES[0], P("d"))
    with jax.set_mesh(mesh):
        rule = LoRA(rank=2, init=start(sketched(loss, params, [x], kind)))
        lora = jlora.transform(loss, rule)
        for init in (jax.jit(lora.init), lora.init):
            base, adapter = init(jax.random.key(0), params, x)
            actual = jax.jit(lora.apply)(base, adapter, x)
            np.testing.assert_allclose(actual, jax.jit(loss)(params, x))
    for path, w in base.items():
        assert w.sharding.is_equivalent_to(params[path].sharding, w.ndim)
        assert np.any(np.asarray(w) != np.asarray(params[path])) == (kind == "gradient")
