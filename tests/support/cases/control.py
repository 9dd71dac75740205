"""Higher-order primitives: loops, branches, derivatives, and stacks of layers in plain JAX."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jlora import LoRA

from ._case import Case, Problem, entry, model, normal, normals

CASES: list[Case] = []
case = model(CASES, exact_at_zero=False)
built = entry(CASES, exact_at_zero=False)
FORMED = (LoRA("^w$", rank=2, alpha=4, materialize=True),)
WIDE = 2 * (6 + 5)
# The subject, the number of trainable parameters, the shapes of w and of x.
ONE = ("control", WIDE, (6, 5), (3, 6))
SQUARE = ("control", 2 * (5 + 5), (5, 5), (3, 5))
STACK = ("layers", 3 * 2 * (5 + 5), (3, 5, 5), (2, 5))


# --------------------------------------------------------------------------------------------
# Scan over layers and remat.
# --------------------------------------------------------------------------------------------


def layer(x, w):
    """One layer of a scan."""
    return jnp.tanh(x @ w), None


@case(*STACK)
def scan_layers(p, x):
    """Layers along axis 0 are scanned over."""
    return lax.scan(layer, x, p["w"])[0]


@case("layers", 3 * 2 * (5 + 5), {"w": (3, 5, 5), "b": (3, 5)}, (2, 5))
def scan_layers_reversed(p, x):
    """The last layer first, unrolled by two; outputs and carry are trees."""

    def body(carry, xs):
        h = jnp.tanh(carry["h"] @ xs["w"] + xs["b"][None])
        return {"h": h, "n": carry["n"] + 1}, (h, None)

    return lax.scan(body, {"h": x, "n": 0}, p, reverse=True, unroll=2)


@case("layers", 4 * 2 * (5 + 5), {"w": (3, 5, 5), "shared": (5, 5)}, (2, 5), sites=2)
def scan_layers_and_a_constant(p, x):
    """One weight per layer, and one that all layers share."""
    return lax.scan(lambda x, w: (jnp.tanh(x @ w) @ p["shared"], None), x, p["w"])[0]


@case("layers", *ONE[1:])
def remat(p, x):
    """A checkpoint that saves by name."""
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    @partial(jax.checkpoint, policy=policy)
    def block(w, x):
        return jnp.sin(checkpoint_name(jnp.tanh(x @ w), "hidden"))

    return block(p["w"], x)


@case(*STACK)
def scan_indexes_the_stack(p, x):
    """A scan over layer numbers takes a layer by dynamic_index_in_dim."""

    def body(x, i):
        return jnp.tanh(x @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), None

    return lax.scan(body, x, jnp.arange(3))[0]


# --------------------------------------------------------------------------------------------
# Loops and branches.
# --------------------------------------------------------------------------------------------


@case(*SQUARE, np.array(3), grad=False)
def fori_loop_dynamic(p, x, n):
    """A loop whose bound is an argument: a while_loop where that is traced."""
    return lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ p["w"]), x)


@case(*SQUARE, grad=False)
def while_loop(p, x):
    """The weight is used in the body and in the condition."""

    def go_on(state):
        i, x = state
        return (i < 4) & (jnp.sum(jnp.abs(x @ p["w"])) > 1e-3)

    return lax.while_loop(go_on, lambda s: (s[0] + 1, 0.5 * jnp.tanh(s[1] @ p["w"])), (0, x))


@case(*SQUARE)
def scan_carries_the_weight(p, x):
    """The parameters are part of the carry of a scan and come back as they were."""

    def body(carry, shift):
        p, x = carry
        return (p, jnp.tanh(x @ p["w"]) + shift), None

    return lax.scan(body, (p, x), jnp.arange(3, dtype=x.dtype))[0][1]


@case(*SQUARE, np.array(3), grad=False)
def loops_return_the_weight_of_a_checkpoint(p, x, n):
    """A carry and a stacked output of loops whose bodies are checkpoints that return the weight."""

    @jax.checkpoint
    def body(w, x):
        return w, jnp.tanh(x @ w)

    w, x = lax.fori_loop(0, n, lambda i, carry: body(*carry), (p["w"], x))
    x, stack = lax.scan(lambda x, w: body(w, x)[::-1], x, w[None])
    return x @ stack[0]


@case(*ONE, grad=False)
def by_platform(p, x):
    """The branch of a platform that is not here cannot even be compiled here."""

    def elsewhere(x, w):
        y = x @ w
        shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return pl.pallas_call(lambda a, b: b.__setitem__(..., a[...]), out_shape=shape)(y)

    return lax.platform_dependent(x, p["w"], tpu=elsewhere, default=lambda x, w: x @ w)


@case("control", 2 * WIDE, {"w": (6, 5), "v": (6, 5)}, (3, 6), sites=2)
def cond(p, x):
    """Each branch has a weight of its own, one as an operand, one by closure."""
    first = x[0, 0] < 1  # true, so that the weight of the adapted branch has a gradient
    return lax.cond(first, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ p["v"], p["w"], x)


@case("control", 3 * WIDE, dict.fromkeys("abc", (6, 5)), (3, 6), np.array(2), sites=3)
def switch(p, x, i):
    """Three branches, the whole tree as operand."""
    branches = [
        lambda p, x: x @ p["a"],
        lambda p, x: jnp.tanh(x @ p["b"]),
        lambda p, x: jnp.sin(x @ p["c"]) + x @ p["a"],
    ]
    return lax.switch(i, branches, p, x)


@case(*SQUARE)
def cond_in_scan(p, x):
    """A scan of which every second step uses the weight."""

    def step(x, i):
        return lax.cond(i % 2 == 0, lambda x: jnp.tanh(x @ p["w"]), lambda x: -x, x), x

    return lax.scan(step, x, jnp.arange(4))


# --------------------------------------------------------------------------------------------
# Custom derivatives.
# --------------------------------------------------------------------------------------------


@jax.custom_jvp
def cube(x):
    """x³, with a derivative of its own: it must be kept, though it is wrong by a factor of 2."""
    return x**3


@cube.defjvp
def cube_jvp(primals, tangents):
    """6 x² dx."""
    (x,), (dx,) = primals, tangents
    return cube(x), 6 * x**2 * dx


@jax.custom_vjp
def clipped(x, bound):
    """The identity, whose cotangent is clipped to ±bound."""
    del bound
    return x


clipped.defvjp(lambda x, bound: (x, bound), lambda bound, g: (jnp.clip(g, -bound, bound), None))


@case(*ONE)
def custom_jvp(p, x):
    """A user's custom_jvp of an activation, also inside of jit and of scan."""
    h = cube(x @ p["w"]) + jax.jit(cube)(jnp.sin(x) @ p["w"])
    return lax.scan(lambda c, row: (c, cube(row)), 0, h)[1]


@case(*ONE, forward=False)
def custom_vjp_in_remat(p, x):
    """A user's custom_vjp of an activation: its backward pass is kept, also in a checkpoint."""

    @jax.jit
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(w, x):
        return jnp.sin(clipped(x @ w, jnp.asarray(0.3, x.dtype)))

    return block(p["w"], x) + jnp.sin(clipped(x @ p["w"], jnp.asarray(0.3, x.dtype)))


@jax.custom_vjp
def doubling(x, w):
    """x·w with a backward pass of its own, which doubles the gradient of w."""
    return x @ w


doubling.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, 2 * (xw[0].T @ g)))


@case(*ONE, rules=FORMED, forward=False)
def custom_vjp_of_the_weight(p, x):
    """A custom_vjp that takes the weight: W + ΔW is formed, its backward pass is kept."""
    return jnp.tanh(doubling(x, p["w"]))


@case(*ONE, rules=FORMED, grad=False, forward=False)
def pallas_kernel(p, x):
    """A Pallas kernel takes the weight: W + ΔW is formed."""

    def kernel(x, w, out):
        out[...] = jnp.tanh(x[...] @ w[...])

    shape = jax.ShapeDtypeStruct((3, 5), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, p["w"])


@case(*ONE, rules=FORMED)
def weight_standardized(p, x):
    """The weight is standardized before it is used."""
    w = p["w"] - p["w"].mean(axis=0, keepdims=True)
    return x @ (w / jnp.sqrt(jnp.mean(w * w, axis=0, keepdims=True) + 1e-3))


@case("control", WIDE, {"w": (6, 5), "v": (6, 5)}, (3, 6), rules=FORMED)
def weight_chosen_by_cond(p, x):
    """A cond returns one of two leaves, which is then used."""
    w = lax.cond(x[0, 0] > 0, lambda p: p["w"] * 2, lambda p: p["v"], p)
    return x @ w + x @ p["w"]


# --------------------------------------------------------------------------------------------
# Derivatives and maps inside of the model.
# --------------------------------------------------------------------------------------------


@case("control", WIDE + 2 * (5 + 4), {"w": (6, 5), "v": (5, 4)}, (2, 6), sites=2)
def jacobian_and_hessian(p, x):
    """Forward and reverse Jacobians, and a Hessian, inside of the model."""

    def f(row):
        return jnp.tanh(row @ p["w"]) @ p["v"]

    hessian = jax.hessian(lambda row: jnp.sum(jnp.sin(f(row))))(x[0])
    return jax.vmap(jax.jacfwd(f))(x), jax.jacrev(f)(x[1]), hessian


@case(*ONE)
def grad_of_scan_inside(p, x):
    """A gradient through a scan, with respect to the input."""

    def total(x):
        def step(c, row):
            return c + jnp.sum(jnp.tanh(row @ p["w"])), None

        return lax.scan(step, 0.0 * x[0, 0], x)[0]

    return jax.grad(total)(x)


@case(*ONE)
def vmap_inside(p, x):
    """A vmap over the batch, with a named axis and a collective."""

    def f(row):
        h = row @ p["w"]
        return jnp.tanh(h - lax.pmean(h, "batch"))

    return jax.vmap(f, axis_name="batch")(x)


# --------------------------------------------------------------------------------------------
# `shard_map` and sharding, on a mesh of one device.
# --------------------------------------------------------------------------------------------


def mesh():
    """A mesh of one device and one automatic axis, d."""
    return jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))


ROWS, COLUMNS = P("d", None), P(None, "d")
# What a shard computes, how w, x and the result are sharded, and options.
SHARDED = {
    "shard_map_replicated": (lambda w, x: jnp.tanh(x @ w), P(), P("d"), P("d"), {}),
    "shard_map_outputs": (  # column-parallel: the output is gathered
        lambda w, x: lax.all_gather(jnp.tanh(x @ w), "d", axis=1, tiled=True),
        *(COLUMNS, P(), P(), {"check_vma": False}),
    ),
    "shard_map_inputs": (  # row-parallel: the output is summed
        lambda w, x: lax.psum(x @ w, "d"),
        *(ROWS, COLUMNS, P(), {}),
    ),
    "shard_map_gathers_the_weight": (
        lambda w, x: jnp.tanh(x @ lax.all_gather(w, "d", axis=0, tiled=True)),
        *(ROWS, ROWS, ROWS, {}),
    ),
    "shard_map_gathers_the_weight_to_invarying": (
        lambda w, x: jnp.tanh(x @ lax.all_gather(w, "d", axis=0, tiled=True, to="invarying")),
        *(ROWS, P(), P(), {}),
    ),
}
for name, (body, of_w, of_x, of_y, options) in SHARDED.items():

    def sharded(p, x, body=body, specs=(of_w, of_x), out=of_y, options=options):
        """The sine of x·w under shard_map."""
        f = jax.shard_map(body, mesh=mesh(), in_specs=specs, out_specs=out, **options)
        return jnp.sin(f(p["w"], x))

    leaks = name in ("shard_map_outputs", "shard_map_inputs")
    case(*ONE, name=name, leaks=leaks)(sharded)


@case(*STACK, leaks=True)
def shard_map_in_scan(p, x):
    """A shard_map in each layer of a scan."""
    f = jax.shard_map(
        lambda x, w: jnp.tanh(lax.psum(x @ w, "d")),
        mesh=mesh(),
        in_specs=(COLUMNS, ROWS),
        out_specs=P(),
    )
    return lax.scan(lambda x, w: (f(x, w), None), x, p["w"])[0]


@case(*ONE)
def sharding_constraints(p, x):
    """Constraints on the weight and on the activations."""
    w = lax.with_sharding_constraint(p["w"], NamedSharding(mesh(), COLUMNS))
    return lax.with_sharding_constraint(x @ w, NamedSharding(mesh(), ROWS))


# --------------------------------------------------------------------------------------------
# Memory: weights in that of the host, which the model moves to that of the device.
# --------------------------------------------------------------------------------------------


def streamed(p, x, device):
    """Each layer of a stack is moved before its product."""
    del device
    body = jax.checkpoint(lambda x, w: layer(x, jax.device_put(w, jax.memory.Space.Device)))
    return lax.scan(body, x, p["w"])[0]


def moved_whole(p, x, device):
    """The tree is moved, the bias with it."""
    p = jax.device_put(p, device.with_memory_kind("device"))
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]


def moved_to_a_mesh(p, x, device):
    """Where it is sharded."""
    del device
    return x @ jax.device_put(p["w"], NamedSharding(mesh(), COLUMNS, memory_kind="device"))


OFFLOADED = {
    streamed: (3 * 2 * (5 + 5), {"w": (3, 5, 5)}, (2, 5)),
    moved_whole: (WIDE + 2 * (5 + 4), {"w": (6, 5), "v": (5, 4), "b": (5,)}, (3, 6)),
    moved_to_a_mesh: (WIDE, {"w": (6, 5)}, (3, 6)),
}
for apply, (trainable, shapes, of_x) in OFFLOADED.items():

    def offloaded(dtype, apply=apply, shapes=shapes, of_x=of_x):
        """The parameters in the memory of the host."""
        device = SingleDeviceSharding(jax.devices()[0])
        params = jax.device_put(normals(dtype, **shapes), device.with_memory_kind("pinned_host"))
        return Problem(partial(apply, device=device), params, (normal("x", of_x, dtype),))

    sites = 2 if "v" in shapes else 1
    built("memory", trainable, f"{apply.__name__}_from_the_host", sites=sites)(offloaded)
