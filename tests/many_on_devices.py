"""Many adapters on a mesh of eight devices, in float64: rows of one batch, and runs of one step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharding_models as models
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_lies, compiled, mesh_of, moved, normal, put
from small import some

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


def placed(apply):
    """The transform, the adapters, and base, table, slots and rows where they lie on the mesh."""
    params = {k: normal(i, *s) / 16 for i, (k, s) in enumerate(SHAPES.items())}
    ids = np.random.default_rng(0).integers(0, 96, (ROWS, LENGTH))
    lora = jlora.transform(apply, jlora.LoRA("embed|up|down", rank=2))
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, ids)[1]
    adapters = [
        jax.tree.map(lambda x, i=i: normal(x.size + i, *x.shape) / 8, shapes) for i in range(SLOTS)
    ]
    specs = sharding.specs(SPECS, shapes)
    specs = jax.tree.map(lambda s: P(None, *s), specs, is_leaf=lambda s: isinstance(s, P))
    which = np.arange(ROWS) % (SLOTS + 1) - 1
    base, table = put(params, MESH, SPECS), put(many.stack(adapters), MESH, specs)
    return lora, adapters, (base, table, put(which, MESH, P("fsdp")), put(ids, MESH, P("fsdp")))


def every_form():
    """Each form with each model, of which one has a constraint every day."""
    for form in FORMS:
        for apply in (constrained, model):
            daily = (form == FORMS[0]) == (apply is constrained)
            yield pytest.param(form, apply, marks=[] if daily else pytest.mark.slow)


@pytest.mark.parametrize(("form", "apply"), list(every_form()))
def test_rows_are_what_they_are_alone(form, apply):
    lora, adapters, (base, table, which, ids) = placed(apply)
    spmd = "fsdp" if apply is constrained else None
    y = jax.jit(many.route(lora.apply, form=form, spmd_axis_name=spmd))(base, table, which, ids)
    base, which, ids = jax.device_put((base, which, ids), jax.devices()[0])
    one = jax.jit(jlora.transform(model).apply)
    each = [one(base, adapters[i] if i >= 0 else {}, ids[k : k + 1]) for k, i in enumerate(which)]
    np.testing.assert_allclose(y, jnp.concatenate(each), atol=1e-9)


@pytest.mark.parametrize("form", some(FORMS, FORMS[0]))
def test_no_collective_has_the_size_of_a_weight_or_of_a_table(form):
    """But for sums: those of logits, as without adapters, and of h over the axis of inputs."""
    lora, _, arguments = placed(model)
    routed = many.route(lora.apply, form=form)
    for f in (routed, jax.grad(lambda *args: (routed(*args) ** 2).sum(), argnums=1)):
        found = moved(compiled(f, *arguments))
        assert all(n < 64 * 128 for kind, n in found if kind != "all-reduce"), found


KEYS = jax.random.split(jax.random.key(0), 4)


@pytest.mark.parametrize(
    ("name", "runs"), [("lists", "fsdp"), pytest.param("scanned", None, marks=pytest.mark.slow)]
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
    close(actual, (base, table, state))
    placed, alone = jax.jit(step, out_shardings=(places, of_state)), jax.jit(step)
    trained, expected = actual[1:], (table, state)
    for _ in range(3):
        trained, expected = placed(*trained, actual[0]), alone(*expected, base)
    close(trained, expected)
    assert_lies(trained, (places, of_state))
    assert {x.sharding.spec[0] for x in jax.tree.leaves(trained[0])} == {runs} or runs is None


def close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
