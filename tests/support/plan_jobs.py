"""A job for the tests of `jlora.plan`, as `jlora plan` takes it: a function of a mesh."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora


def job(mesh, layers=4, d=256, width=1024, rows=16, length=64, dtype=jnp.bfloat16, remat=True):
    """Scanned layers, each a product up and one down."""

    def lies(shape, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def layer(x, w):
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"], None

    def model(params, x):
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params)[0]

    params = {
        "up": lies((layers, d, width), None, "fsdp", "tensor"),
        "down": lies((layers, width, d), None, "tensor", "fsdp"),
    }
    x = lies((rows, length, d), "fsdp")
    lora = jlora.transform(model, jlora.LoRA(rank=8))
    _, adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)

    def loss(adapter, base, x):
        return lora.apply(base, adapter, x).astype(jnp.float32).var()

    return loss, params, adapter, (x,)


def sgd(mesh):
    """The same with another optimizer."""
    return *job(mesh), optax.sgd(1e-3)


def large(mesh):
    """Too large for four v5e."""
    return job(mesh, layers=64, d=8192, width=32768)


def lost(mesh):
    """The base that `jax.eval_shape` gives, without shardings."""
    loss, base, adapter, args = job(mesh)
    return loss, jax.eval_shape(lambda x: x, base), adapter, args


def nowhere(mesh):
    """All of it without shardings."""
    loss, *trees = job(mesh)
    return loss, *jax.eval_shape(lambda *x: x, *trees)


def wrong(mesh):
    """Not what plan needs."""
    return mesh
