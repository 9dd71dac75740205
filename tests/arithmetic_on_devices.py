"""`jlora.arithmetic` of adapters on a mesh, in float64.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import some

import jlora
from jlora import arithmetic, sharding
from jlora.types import Layout, LowRank

# Shapes and specs of W, and the layouts of its adapters.
SITES = {
    "plain": ((256, 128), P("fsdp", "tensor"), Layout((), (0,), (1,))),
    "experts": ((4, 256, 128), P("fsdp", None, "tensor"), Layout((0,), (1,), (2,))),
    "heads": ((4, 32, 256), P("tensor", None, "fsdp"), Layout((), (0, 1), (2,))),
    "slots": ((256, 192), P("fsdp"), Layout((), (0,), (1,), (3, (0, 2), 1))),
}
HEAD = ((256, 128), P("fsdp", "tensor"))
KEY = jax.random.key(0)
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


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def adapter(seed, rank):
    found = {}
    for i, (name, (shape, _, layout)) in enumerate(SITES.items()):
        a, b = jlora._adapters.factor_shapes(layout, shape, rank)
        found[name] = LowRank(normal(10 * seed + i, a), normal(-i % 99 + seed, b), 0.5, layout)
    return found | {"head": normal(seed, HEAD[0])}


ADAPTERS = [adapter(1, 2), adapter(2, 3)]
BASE = {name: jnp.zeros(shape) for name, (shape, *_) in SITES.items()} | {"head": jnp.ones(HEAD[0])}
SPECS = {name: spec for name, (_, spec, _) in SITES.items()} | {"head": HEAD[1]}
FEW = ("heads", "slots", "head")
PATHS = pytest.mark.parametrize("paths", some([FEW, tuple(SPECS)], FEW))


def alone(paths):
    """The adapters and the base on one device."""
    return [{name: t[name] for name in paths} for t in ADAPTERS], {n: BASE[n] for n in paths}


def placed(paths, kind):
    """The same on a mesh of 4 × 2 with axes of that kind, and the mesh."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (kind, kind))
    trees, base = alone(paths)
    lies = {name: NamedSharding(mesh, SPECS[name]) for name in paths}
    trees = [jax.device_put(jax.device_get(t), sharding.specs(lies, t)) for t in trees]
    return trees, jax.device_put(jax.device_get(base), lies), mesh


def check(found, paths, f, like):
    """The same ΔW as on one device, on the devices that `like` lies on."""
    trees, base = alone(paths)
    both = jax.device_get((found, jax.jit(f)(trees, base)))
    got, expected = (jlora.merge(base, x) for x in both)
    for path, x in expected.items():
        np.testing.assert_allclose(got[path], x, atol=1e-9 * float(abs(x).max()), err_msg=path)
    for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim), new.sharding


@PATHS
@pytest.mark.parametrize("name", some(FUNCTIONS, "add", "ties"))
def test_what_is_moved(name, paths):
    """At most a part of A and B, of 8 bytes × 256 rows; by what sums and scales, nothing."""
    f, (trees, base, _) = FUNCTIONS[name], placed(paths, AxisType.Auto)
    compiled = jax.jit(f).lower(trees, base).compile()
    check(compiled(trees, base), paths, f, trees[0])
    moved = collectives(compiled.as_text())
    if name in MOVE_NOTHING:
        assert moved == []
    columns = 2 if name == "truncate" else 5
    assert max((c.size for c in moved), default=0) <= 8 * 256 * columns / 4, moved


@pytest.mark.parametrize("name", some(FUNCTIONS, "add"))
@pytest.mark.parametrize("jit", some([True, False], True))
def test_explicit_axes(name, jit):
    """Under `jit` with the mesh in scope, and without either."""
    f, (trees, base, mesh) = FUNCTIONS[name], placed(FEW, AxisType.Explicit)
    with jax.set_mesh(mesh) if jit else contextlib.nullcontext():
        found = (jax.jit(f) if jit else f)(trees, base)
    check(found, FEW, f, trees[0])
