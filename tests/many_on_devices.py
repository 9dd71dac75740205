"""Rows of one batch with an adapter each on a mesh of eight devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import many, sharding
from jlora.many._route import FORMS

MESH = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
LIES = {"embed": P(None, None), "up": P(None, None, "tensor"), "down": P(None, "tensor", None)}
SHAPES = {"embed": (96, 64), "up": (3, 64, 128), "down": (3, 128, 64)}
ROWS, LENGTH, SLOTS = 16, 5, 4


def model(params, ids):
    def layer(x, w):
        up, down = w
        return x + jnp.tanh(x @ up) @ down, None

    x, _ = jax.lax.scan(layer, params["embed"][ids], (params["up"], params["down"]))
    return x @ params["embed"].T


def constrained(params, ids):
    """With a constraint on an activation, as models for meshes have."""
    spec = NamedSharding(MESH, P(None, None, "tensor"))
    return jax.lax.with_sharding_constraint(model(params, ids), spec)


def placed(apply):
    """The transform, and base, table, slots and rows where they lie on the mesh."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.standard_normal(s) / 16) for k, s in SHAPES.items()}
    ids = rng.integers(0, 96, (ROWS, LENGTH))
    lora = jlora.transform(apply, jlora.LoRA("embed|up|down", rank=2))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, ids)[1]
    adapters = [
        jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) / 8), adapter)
        for _ in range(SLOTS)
    ]
    which = np.arange(ROWS) % (SLOTS + 1) - 1
    specs = sharding.specs(LIES, adapter)
    specs = jax.tree.map(lambda s: P(None, *s), specs, is_leaf=lambda s: isinstance(s, P))
    put = lambda x, s: jax.device_put(jax.device_get(x), NamedSharding(MESH, s))  # noqa: E731
    base = {k: put(x, LIES[k]) for k, x in params.items()}
    table = jax.tree.map(put, many.stack(adapters), specs)
    return lora, adapters, (base, table, put(which, P("data")), put(ids, P("data")))


def alone(lora, adapters, base, which, ids):
    """Each row by itself, on one device."""
    base, which, ids = jax.device_put((base, which, ids), jax.devices()[0])
    one = jax.jit(lora.apply)
    each = [
        one(base, adapters[i] if i >= 0 else {}, ids[k : k + 1])
        for k, i in enumerate(np.asarray(which))
    ]
    return jnp.concatenate(each)


@pytest.mark.parametrize(
    ("form", "apply"),
    [
        (FORMS[0], constrained),
        (FORMS[1], model),
        pytest.param(FORMS[0], model, marks=pytest.mark.slow),
        pytest.param(FORMS[1], constrained, marks=pytest.mark.slow),
    ],
)
def test_rows_are_what_they_are_alone(form, apply):
    lora, adapters, (base, table, which, ids) = placed(apply)
    spmd = "data" if apply is constrained else None
    f = jax.jit(many.route(lora.apply, form=form, spmd_axis_name=spmd))
    y = f(base, table, which, ids)
    np.testing.assert_allclose(
        y, alone(jlora.transform(model, *[]), adapters, base, which, ids), atol=1e-9
    )


@pytest.mark.parametrize("form", [FORMS[0], pytest.param(FORMS[1], marks=pytest.mark.slow)])
def test_no_collective_has_the_size_of_a_weight_or_of_a_table(form):
    """But for sums: those of logits, as without adapters, and of h over the axis of inputs."""
    lora, _, arguments = placed(model)

    def loss(base, table, which, ids):
        return (many.route(lora.apply, form=form)(base, table, which, ids) ** 2).sum()

    for f in (many.route(lora.apply, form=form), jax.grad(loss, argnums=1)):
        text = jax.jit(f).lower(*arguments).compile().as_text()
        found = re.findall(
            r"= \w+\[([\d,]*)\]\S* (all-gather|all-to-all|collective-permute)\(", text
        )
        sizes = [(math.prod(map(int, shape.split(","))) if shape else 1, op) for shape, op in found]
        assert all(n < 64 * 128 for n, _ in sizes), sizes
