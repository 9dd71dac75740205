"""Many runs on a mesh of eight devices, in float64.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_ENABLE_X64=1 pytest -n 0 FILE
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharding_models as models
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import many, sharding

KEYS = jax.random.split(jax.random.key(0), 4)
MESH = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)


def put(tree, specs):
    """Arrays at their specs; None for replicated."""
    is_spec = lambda x: x is None or isinstance(x, P)  # noqa: E731
    places = jax.tree.map(lambda s: NamedSharding(MESH, s or P()), specs, is_leaf=is_spec)
    return jax.device_put(jax.device_get(tree), places)


@pytest.mark.parametrize(
    ("name", "runs"), [("lists", "fsdp"), pytest.param("scanned", None, marks=pytest.mark.slow)]
)
def test_steps_are_those_of_one_device(name, runs):
    """Made, trained and kept at the places that `specs` and `moments` say, with an axis of runs."""
    model = models.MODELS[name]()
    lora = jlora.transform(model.apply, *model.rules)
    specs = model.base if runs is None else sharding.replicated(model.base, runs)
    params, args = put(model.params, specs), jax.device_put(model.args, NamedSharding(MESH, P()))
    tx = many.optimizer(optax.adamw, learning_rate=jnp.array([1e-3, 1e-2, 3e-2, 1e-1]))

    def loss(adapter, base):
        return jnp.mean((lora.apply(base, adapter, *args) - 1) ** 2)

    def step(table, state, base):
        grads = jax.vmap(jax.grad(loss), (0, None))(table, base)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state

    def begin(params):
        base, table = many.init(lora, KEYS, params, *args)
        return base, table, tx.init(table)

    base, table, state = jax.jit(begin)(model.params)
    one = jax.eval_shape(lora.init, KEYS[0], params, *args)[1]
    of_base = jax.tree.map(lambda x: x.sharding, params)
    place = lambda s: NamedSharding(s.mesh, P(runs, *s.spec))  # noqa: E731
    places = jax.tree.map(place, sharding.specs(of_base, one))
    of_state = sharding.moments(jax.eval_shape(tx.init, table), table, places)
    actual = jax.jit(begin, out_shardings=(of_base, places, of_state))(params)
    close(actual, (base, table, state))
    placed = jax.jit(step, out_shardings=(places, of_state))
    expected = (table, state)
    for _ in range(3):
        actual = actual[0], *placed(*actual[1:], actual[0])
        expected = jax.jit(step)(*expected, base)
    close(actual[1:], expected)
    for x, y in zip(jax.tree.leaves(actual[1:]), jax.tree.leaves((places, of_state)), strict=True):
        assert x.sharding.is_equivalent_to(y, x.ndim)
    if runs:
        assert {x.sharding.spec[0] for x in jax.tree.leaves(actual[1])} == {runs}


def close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
