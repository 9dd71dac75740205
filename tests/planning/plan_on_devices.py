"""Plans against measured bytes, on eight devices."""

import functools

import jax
import jax.numpy as jnp
import optax
import plan_jobs
import pytest
import sharding_models as models
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of, put
from small import some

import jlora
from jlora import sharding

MESH = mesh_of()


def on_one(tree):
    """The bytes of real arrays on one device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("compile", some([False, True], False))
@pytest.mark.parametrize("name", some(["lists", "experts", "fused"], "lists"))
def test_exact_parts_are_measured_bytes(name, compile):
    """Base, adapter, moments and batch, against arrays that lie there."""
    model = models.MODELS[name]()
    base, args = put(model.params, MESH, model.base), put(model.args, MESH, P("fsdp"))
    adapter = models.adapter_of(model)
    places = sharding.specs(base, adapter)
    adapter = jax.device_put(jax.device_get(adapter), places)
    tx = jlora.optimizer(optax.adamw(1e-3))
    moments = sharding.moments(jax.eval_shape(tx.init, adapter), adapter, places)
    state = jax.jit(tx.init, out_shardings=moments)(adapter)
    lora = jlora.transform(model.apply, *model.rules)
    loss = lambda adapter, base, *args: lora.apply(base, adapter, *args).var()  # noqa: E731
    found = jlora.plan(loss, base, adapter, args, tx, compile=compile)
    assert (found.peak is not None) == compile
    assert (found.devices, found.mesh) == (8, {"fsdp": 4, "tensor": 2})
    parts = [on_one(tree) for tree in (base, adapter, state, args, adapter)]
    assert list(found[3:8]) == parts
    assert not compile or found.peak == sum(parts) + found.activations


def test_a_compiled_plan_is_the_step():
    """The peak is what XLA says of the step, donation included."""
    loss, base, adapter, args = plan_jobs.job(MESH, dtype=jnp.float32)
    found = jlora.plan(loss, base, adapter, args, optax.sgd(1e-3))
    places = sharding.specs(base, adapter)
    adapter = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), adapter, places
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
    def step(adapter, base, x):
        value, gradient = jax.value_and_grad(loss)(adapter, base, x)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, adapter, gradient), value

    used = step.lower(adapter, base, *args).compile().memory_analysis()
    held = used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes
    assert found.moments == 0
    assert found.peak == pytest.approx(held - used.alias_size_in_bytes, rel=0.02)


@pytest.mark.parametrize(
    "constrains", some(["nothing", "a weight", "an activation", "types"], "a weight", "types")
)
def test_what_constrains_activations(constrains):
    """On automatic axes, constraints of activations do, in loops too; those of weights do not."""
    kind = AxisType.Explicit if constrains == "types" else AxisType.Auto
    mesh = mesh_of(kind)
    by_rows = NamedSharding(mesh, P("fsdp"))
    place = jax.lax.with_sharding_constraint

    def layer(x, w):
        w = place(w, NamedSharding(mesh, P())) if constrains == "a weight" else w
        x = jnp.tanh(x @ w)
        return place(x, by_rows) if constrains == "an activation" else x, None

    spec = P(None, None, "fsdp" if constrains != "types" else None)
    w = jax.ShapeDtypeStruct((2, 8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=by_rows)
    with jax.set_mesh(mesh):
        found = jlora.plan(lambda w, _, x: jax.lax.scan(layer, x, w)[0].var(), {}, w, (x,))
    assert found.unconstrained == (constrains in ("nothing", "a weight"))
    assert ("compiled, nothing constrains" in str(found)) == found.unconstrained
