"""Many adapters on a mesh of eight devices, in float64: rows of one batch, and runs of one step."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
import sharding_models as models
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_lies, compiled, mesh_of, moved, normal, put
from small import every, some

import jlora
from jlora import many, sharding
from jlora.many._route import FORMS

MESH = mesh_of()
SPECS = {"embed": P(None, None), "up": P(None, None, "tensor"), "down": P(None, "tensor", None)}
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


def alone(params, which, ids):
    """A function of the table that gives what each row is by its own merged weights."""

    def of_row(adapter, i, row):
        own = jax.tree.map(lambda x: jnp.where(i < 0, 0, x[i]), adapter)
        return model(jlora.merge(params, own), row[None])[0]

    return lambda table: jax.vmap(of_row, (None, 0, 0))(table, which, ids)


@pytest.mark.parametrize(
    ("form", "apply"),
    every(FORMS, [constrained, model], daily=[("gathered", model)]),
)
def test_rows_are_what_they_are_alone(form, apply):
    """Outputs and gradients; no collective has the size of a weight or of a table.

    But for sums: those of logits, as without adapters, and of h over the axis of inputs.
    """
    params = {k: normal(i, *s) / 16 for i, (k, s) in enumerate(SHAPES.items())}
    ids = np.random.default_rng(0).integers(0, 96, (ROWS, LENGTH))
    which = np.arange(ROWS) % (SLOTS + 1) - 1
    lora = jlora.transform(apply, jlora.LoRA("embed|up|down", rank=2, alpha=16))
    one = jax.eval_shape(lora.init, jax.random.key(0), params, ids)[1]
    table = jax.tree.map(lambda x: normal(x.size, SLOTS, *x.shape) / 8, one)
    spmd = "fsdp" if apply is constrained else None
    routed = many.route(lora.apply, form=form, spmd_axis_name=spmd)

    def on_mesh(table, base, which, ids):
        return laws.value_and_slope(lambda table: routed(base, table, which, ids))(table)

    specs = sharding.specs(SPECS, one)
    specs = jax.tree.map(lambda s: P(None, *s), specs, is_leaf=lambda s: isinstance(s, P))
    rows = P("fsdp")
    args = zip((table, params, which, ids), (specs, SPECS, rows, rows), strict=True)
    args = [put(tree, MESH, spec) for tree, spec in args]
    program = compiled(on_mesh, *args)
    laws.assert_close(
        program(*args), jax.jit(laws.value_and_slope(alone(params, which, ids)))(table), 1e-9
    )
    found = moved(program)
    assert all(n < 64 * 128 for kind, n in found if kind != "all-reduce"), found


EXPLICIT = mesh_of(AxisType.Explicit)
IN_PLACE = {"up": P(None, None, "tensor"), "down": P(None, "tensor"), "bias": P("fsdp")}


def stated(params, x):
    """Layers that state how their results are sharded, and a bias."""

    def layer(x, w):
        h = jnp.tanh(jnp.einsum("ti,io->to", x, w["up"], out_sharding=P(None, "tensor")))
        return x + jnp.einsum("to,oi->ti", h, w["down"], out_sharding=P(None, None)), None

    bias = jax.sharding.reshard(params["bias"], P(None))
    return jax.lax.scan(layer, x, {k: params[k] for k in ("up", "down")})[0] + bias


@pytest.mark.parametrize(
    ("form", "known", "of_ids"),
    every([None, *FORMS], [True, False], [P("fsdp"), P()], daily=[("gathered", False, P())]),
)
@pytest.mark.parametrize("drop", some([False, True], False))
def test_rows_along_explicit_axes(form, known, of_ids, drop):
    """Values and gradients as on one device, and rows sharded as they were; known ids have runs."""
    shapes = {"up": (3, 64, 128), "down": (3, 128, 64), "bias": (64,)}
    params = {k: normal(i, *s) / 16 for i, (k, s) in enumerate(shapes.items())}
    x = normal(9, ROWS, 1, 64)
    # Eight rows of a slot are on two devices; each would be a run with a mask of its own.
    which = np.arange(ROWS) // (2 if drop else 8) % (SLOTS + 1) - 1
    rules = jlora.LoRA("up|down", rank=2, alpha=16, dropout=0.5), jlora.Full("bias")
    lora = jlora.transform(lambda p, x: jax.vmap(lambda x: stated(p, x))(x), *rules)
    route = many.route(lora.apply, form=form)

    def step(table, base, ids, x):
        noisy = jlora.dropout(table, jax.random.key(3)) if drop else table
        return route(base, noisy, which if known else ids, x)

    def run(mesh):
        with jax.set_mesh(mesh):
            base, rows = put(params, mesh, IN_PLACE), put(x, mesh, P("fsdp"))
            one = jax.eval_shape(lora.init, jax.random.key(0), base, rows)[1]
            table = jax.tree.map(lambda v: normal(v.size, SLOTS, *v.shape) / 8, one)
            table = put(table, mesh, sharding.specs(IN_PLACE, table))
            ids = put(jnp.asarray(which), mesh, of_ids)
            return jax.jit(laws.value_and_slope(step))(table, base, ids, rows)

    actual = run(EXPLICIT)
    laws.assert_close(actual, run(mesh_of(AxisType.Explicit, (1, 1))), 1e-9)
    assert actual[0][0].sharding.spec[0] == "fsdp"


KEYS = jax.random.split(jax.random.key(0), 4)


@pytest.mark.parametrize(
    ("name", "runs"), [("fused", "fsdp"), pytest.param("scanned", None, marks=pytest.mark.slow)]
)
def test_steps_are_those_of_one_device(name, runs):
    """Made, trained and kept at the places that `specs` and `moments` say, with an axis of runs."""
    model = models.MODELS[name]()
    lora = jlora.transform(model.apply, *model.rules)
    specs = model.base if runs is None else sharding.replicated(model.base, runs)
    params, args = put(model.params, MESH, specs), put(model.args, MESH, P())
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
    place = lambda s: NamedSharding(MESH, P(runs, *s))  # noqa: E731
    places = jax.tree.map(place, sharding.specs(specs, one))
    of_state = sharding.moments(jax.eval_shape(tx.init, table), table, places)
    of_base = jax.tree.map(lambda x: x.sharding, params)
    actual = jax.jit(begin, out_shardings=(of_base, places, of_state))(params)
    laws.assert_close(actual, (base, table, state), 1e-9)
    placed, alone = jax.jit(step, out_shardings=(places, of_state)), jax.jit(step)
    trained, expected = actual[1:], (table, state)
    for _ in range(3):
        trained, expected = placed(*trained, actual[0]), alone(*expected, base)
    laws.assert_close(trained, expected, 1e-9)
    assert_lies(trained, (places, of_state))
    assert {x.sharding.spec[0] for x in jax.tree.leaves(trained[0])} == {runs} or runs is None
