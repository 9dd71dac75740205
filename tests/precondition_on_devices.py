"""Preconditioned gradients of an adapter on a mesh."""

import math
import re

import jax
import numpy as np
import optax
import pytest
import test_precondition as models
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

PLACES = {"plain": P("x", "y"), "scanned": P(None, "y", "x"), "heads": P("y", None, "x", None)}
DAILY = (("plain", AxisType.Auto), ("scanned", AxisType.Explicit))
COLLECTIVE = re.compile(r"= \(?\w+\[([\d,]*)\]\S* (all-reduce|all-gather|all-to-all|collective-p)")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in DAILY else pytest.mark.slow)
        for name in PLACES
        for kind in (AxisType.Auto, AxisType.Explicit)
    ],
)
def test_only_matrices_of_the_rank_are_summed(name, kind):
    """The same updates, in their places, and no A or B is gathered."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), (kind, kind), devices=jax.devices()[:4])
    base, adapter, grads = models.made(name)
    tx = jlora.optimizer(optax.chain(jlora.precondition(0.1), optax.sgd(1.0)))

    @jax.jit
    def step(grads, adapter):
        return tx.update(grads, tx.init(adapter), adapter)[0]

    expected = step(grads, adapter)
    base = jax.device_put(jax.device_get(base), NamedSharding(mesh, PLACES[name]))
    places = jlora.sharding.specs(base, adapter)
    adapter, grads = (jax.device_put(jax.device_get(x), places) for x in (adapter, grads))
    with jax.set_mesh(mesh):
        compiled = step.lower(grads, adapter).compile()
        actual = step(grads, adapter)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)
    rank, stack = 3, models.MODELS[name].shape[0] if name == "scanned" else 1
    found = COLLECTIVE.findall(compiled.as_text())
    assert found, "nothing is divided"
    for dims, kind_of in found:
        assert math.prod(map(int, filter(None, dims.split(",")))) <= stack * rank * rank, kind_of
