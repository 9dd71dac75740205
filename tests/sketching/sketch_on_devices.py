"""Sketches on a mesh of eight devices, in float64.

Whatever the mesh, a sketch is what NumPy computes from the inputs and gradients of one device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sketch_models as models
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import KINDS, assert_lies, mesh_of, normal, put
from small import every

import jlora
from jlora import LoRA
from jlora.initializers import eva, lora_ga

LAYERS, D, KEPT = 3, 16, 8
MESHES = {kind: mesh_of(kind, (2, 2), ("d", "t")) for kind in KINDS}
AUTO = MESHES[AxisType.Auto]
SPECS = {
    "replicated": {"up": P(), "down": P()},
    "fsdp": {"up": P(None, "d"), "down": P(None, "d")},
    "tensor": {"up": P(None, None, "t"), "down": P(None, "t")},
    "both": {"up": P(None, "d", "t"), "down": P(None, "t", "d")},
}
PARAMS = {"up": normal(0, LAYERS, D, D), "down": normal(1, LAYERS, D, D)}
BATCHES = [normal(2, 8, D), normal(3, 8, D)]
STARTS = {"inputs": eva, "gradient": lora_ga}


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


def sketched(model, kind, params=PARAMS, batches=BATCHES, rule=LoRA(rank=1)):  # noqa: B008
    loss = lambda p, x: jnp.sum(jnp.sin(model(p, x)))  # noqa: E731
    return jlora.sketch(loss, params, rule, batches, kind=kind, components=KEPT)


@functools.cache
def covariances(kind):
    """Of the inputs of each matrix, or of the rows of its gradient, written out."""
    written = models.Model(PARAMS, model, models.of_layers, normal)
    if kind == "inputs":
        return models.of_all(written, BATCHES)
    loss = lambda p: sum(jnp.sum(jnp.sin(model(p, x))) for x in BATCHES) / 2  # noqa: E731
    return {path: np.asarray(g @ g.mT) for path, g in jax.jit(jax.grad(loss))(PARAMS).items()}


def check(found, kind):
    """The leading values, the sum of the squares of all, and the space that the vectors span."""
    for path, covariance in covariances(kind).items():
        s, (squares, u) = found.sites[path], np.linalg.eigh(covariance)
        u, v = u[..., -KEPT:], np.asarray(s.inputs)
        np.testing.assert_allclose(s.values, np.sqrt(squares[:, : -KEPT - 1 : -1]), rtol=1e-8)
        np.testing.assert_allclose(s.total, squares.sum(-1), rtol=1e-8)
        np.testing.assert_allclose(v @ v.mT, u @ u.mT, atol=1e-8)


@pytest.mark.parametrize(
    ("spec", "axes", "kind"),
    every(SPECS, KINDS, STARTS, daily=[("fsdp", AxisType.Explicit, "gradient")]),
    ids=str,
)
def test_on_a_mesh_is_as_on_one_device(spec, axes, kind):
    """Of a start by it the base lies where it lay, and the model begins as it was."""
    mesh = MESHES[axes]
    params, batches = put(PARAMS, mesh, SPECS[spec]), put(BATCHES, mesh, P("d"))
    with jax.set_mesh(mesh):
        found = sketched(model, kind, params, batches)
        check(found, kind)
        lora, x = jlora.transform(model, LoRA(rank=2, init=STARTS[kind](found))), batches[0]
        init = lora.init if spec in ("replicated", "both") else jax.jit(lora.init)
        base, adapter = init(jax.random.key(0), params, x)
        actual, expected = jax.jit(lora.apply)(base, adapter, x), jax.jit(model)(params, x)
    np.testing.assert_allclose(actual, expected)
    assert_lies(base, params)
    for path, w in base.items():
        assert np.any(np.asarray(w) != np.asarray(params[path])) == (kind == "gradient")


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
    check(sketched(f, kind), kind)


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (CUT, "reaches `shard_map` at .*of whole matrices, of which a device may have shards"),
        (UNCHECKED, "of whole matrices, of which a device may have shards"),
    ],
)
def test_inputs_that_a_shard_map_hides_are_refused(f, message):
    """Where inputs are cut x·A is a part; where outputs are, each device has all."""
    for path in PARAMS:
        with pytest.raises(NotImplementedError, match=f"'{path}'.*{message}"):
            sketched(f, "inputs", rule=LoRA(path, rank=1))


@pytest.mark.slow
def test_experts_that_a_shard_map_cuts():
    """Each device has some of them whole."""
    params = {"up": normal(0, 4, D, D), "down": normal(1, 4, D, D)}
    batches = [normal(seed, 4, 8, D) for seed in (2, 3)]
    each = jax.vmap(lambda p, x: layer(x, p)[0])
    cut = jax.shard_map(each, mesh=AUTO, in_specs=(P("t"), P("t", "d")), out_specs=P("t", "d"))
    found, other = (sketched(f, "inputs", params, batches).sites for f in (cut, each))
    for path, s in other.items():
        np.testing.assert_allclose(found[path].values, s.values, rtol=1e-8)
        np.testing.assert_allclose(found[path].total, s.total, rtol=1e-8)
