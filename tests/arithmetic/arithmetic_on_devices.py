"""`jlora.arithmetic` and `jlora.precondition` of adapters on a mesh, in float64.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import contextlib

import jax
import jax.numpy as jnp
import laws
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import KINDS, assert_lies, compiled, mesh_of, moved, normal, on, put
from small import KEY, every, some

import jlora
from jlora import analysis, arithmetic, sharding
from jlora.types import Layout, LowRank
from tests import test_precondition as preconditioned

# Shapes and specs of W, and the layouts of its adapters; the head is trained in full.
SITES = {
    "plain": ((256, 128), P("fsdp", "tensor"), Layout((), (0,), (1,))),
    "experts": ((4, 256, 128), P("fsdp", None, "tensor"), Layout((0,), (1,), (2,))),
    "heads": ((4, 32, 256), P("tensor", None, "fsdp"), Layout((), (0, 1), (2,))),
    "slots": ((256, 192), P("fsdp"), Layout((), (0,), (1,), (3, (0, 2), 1))),
    "head": ((256, 128), P("fsdp", "tensor"), None),
}
MOVE_NOTHING = {
    "add": lambda t, base: arithmetic.add(t, [0.5, -2.0], base=base),
    "scale": lambda t, base: arithmetic.scale(t[0], -0.5, base=base),
    "difference": lambda t, base: arithmetic.difference(*t, base=base),
}
FUNCTIONS = MOVE_NOTHING | {
    "truncate": lambda t, base: arithmetic.truncate(t[0], 1),
    "ties": lambda t, base: arithmetic.ties(t, [0.5, -2.0], density=0.4, base=base),
    "dare": lambda t, base: arithmetic.dare(t, [0.5, -2.0], key=KEY, base=base),
}
ONE, ALL = ("heads",), tuple(SITES)


def problem(paths):
    """Two adapters, and the base, on one device."""

    def leaf(path, seed, rank):
        shape, _, layout = SITES[path]
        if layout is None:
            return normal(seed, *shape)
        a, b = jlora._adapters.factor_shapes(layout, shape, rank)
        return LowRank(normal(seed, *a), normal(seed + 50, *b), 0.5, layout)

    trees = [{p: leaf(p, 10 * i + k, i + 1) for k, p in enumerate(paths)} for i in (1, 2)]
    return trees, {p: jnp.ones(SITES[p][0]) for p in paths}


def placed(paths, kind):
    """The same on a mesh of 4 × 2 with axes of that kind, and the mesh."""
    mesh, specs = mesh_of(kind), {path: SITES[path][1] for path in paths}
    trees, base = problem(paths)
    return [put(t, mesh, sharding.specs(specs, t)) for t in trees], put(base, mesh, specs), mesh


def check(found, paths, f, like):
    """The same ΔW as on one device, on the devices that `like` lies on."""
    trees, base = problem(paths)
    got, expected = (jlora.merge(base, x) for x in jax.device_get((found, jax.jit(f)(trees, base))))
    laws.assert_close(got, expected, 1e-9)
    assert_lies(found, like)


@pytest.mark.parametrize(("name", "paths"), every(FUNCTIONS, [ONE, ALL], daily=[("add", ALL)]))
def test_what_is_moved(name, paths):
    """At most a part of A and B, of 256 rows; by what sums and scales, nothing."""
    f, (trees, base, mesh) = FUNCTIONS[name], placed(paths, AxisType.Auto)
    with jax.set_mesh(mesh):
        program = compiled(f, trees, base)
        check(program(trees, base), paths, f, trees[0])
    found = moved(program)
    most = 0 if name in MOVE_NOTHING else 256 * (2 if name == "truncate" else 5) / 4
    assert max((n for _, n in found), default=0) <= most, found


@pytest.mark.parametrize("name", some(FUNCTIONS, "truncate"))
@pytest.mark.parametrize("jit", some([True, False], True))
def test_explicit_axes(name, jit):
    """Under `jit` with the mesh in scope, and without either."""
    f, (trees, base, mesh) = FUNCTIONS[name], placed(ALL, AxisType.Explicit)
    with jax.set_mesh(mesh) if jit else contextlib.nullcontext():
        found = (jax.jit(f) if jit else f)(trees, base)
    check(found, ALL, f, trees[0])


# Of W and the nodes of two adapters.
MEASURES = {
    "spectrum": lambda w, x, y: analysis.delta_spectrum(x),
    "norm": lambda w, x, y: analysis.norm(x),
    "distance": lambda w, x, y: analysis.distance(x, y),
    "similarity": lambda w, x, y: analysis.subspace_similarity(x, y),
    "amplification": lambda w, x, y: analysis.amplification(w, x, rank=1),
    "intruders": lambda w, x, y: analysis.intruder_dimensions(w, y, k=4),
}


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    every(
        MEASURES,
        [path for path in SITES if path != "head"],
        KINDS,
        daily=[("amplification", "heads", AxisType.Explicit)],
    ),
)
@pytest.mark.parametrize("jit", some([True, False], False))
def test_measures_of_sharded_factors(name, path, kind, jit):
    """As on one device; under `jit` with the mesh in scope, and without either."""
    f, (trees, _), (placed_trees, _, mesh) = MEASURES[name], problem([path]), placed([path], kind)
    shape, spec, _ = SITES[path]
    w = normal(7, *shape)
    expected = f(w, *(tree[path] for tree in trees))
    args = put(w, mesh, spec), *(tree[path] for tree in placed_trees)
    with jax.set_mesh(mesh) if jit else contextlib.nullcontext():
        laws.assert_close((jax.jit(f) if jit else f)(*args), expected, 1e-9)


PLACES = {
    "plain": ((6, 4), P("x", "y")),
    "stacked": ((2, 6, 6), P(None, "y", "x")),
    "heads": ((6, 4, 2), P("y", "x", None)),
}


@pytest.mark.parametrize("name", some(PLACES, "stacked"))
@pytest.mark.parametrize("kind", some(KINDS, AxisType.Explicit))
def test_preconditioning_sums_only_matrices_of_the_rank(name, kind):
    """The same updates, in their places, and no A or B is gathered."""
    mesh, (shape, spec) = mesh_of(kind, (2, 2), ("x", "y")), PLACES[name]
    adapter, grads = preconditioned.made(name, shape)
    tx = jlora.optimizer(optax.chain(jlora.precondition(0.1), optax.sgd(1.0)))

    def step(grads, adapter):
        return tx.update(grads, tx.init(adapter), adapter)[0]

    expected = jax.jit(step)(grads, adapter)
    places = sharding.specs(on(mesh, {"w": spec}), adapter)
    adapter, grads = (jax.device_put(jax.device_get(x), places) for x in (adapter, grads))
    with jax.set_mesh(mesh):
        program = compiled(step, grads, adapter)
    actual, found = program(grads, adapter), moved(program)
    laws.assert_close(actual, expected, 1e-9)
    rank, stack = 3, shape[0] if name == "stacked" else 1
    assert found, "nothing is divided"
    assert max(n for _, n in found) <= stack * rank * rank, found
