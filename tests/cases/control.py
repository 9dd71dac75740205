"""Higher-order primitives: loops, branches, derivatives, and stacks of layers in plain JAX."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jlora import LoRA

from ._case import Case, Problem, entry, normal, normals

CASES: list[Case] = []
case = partial(entry, CASES, exact_at_zero=False)
LORA = LoRA(rank=2, alpha=4)  # all-linear
FORMED = LoRA("^w$", rank=2, alpha=4, materialize=True)
ONE = {"subject": "control", "rules": (LORA,), "sites": 1, "trainable": 2 * (6 + 5)}  # w: (6, 5)
SQUARE = {"subject": "control", "rules": (LORA,), "sites": 1, "trainable": 2 * (5 + 5)}  # w: (5, 5)
STACK = {
    "subject": "layers",
    "rules": (LORA,),
    "sites": 1,
    "trainable": 3 * 2 * (5 + 5),
}  # w: (3, 5, 5)


def one(dtype, apply, *more):
    """The problem of one weight (6, 5) and an input (3, 6)."""
    return Problem(apply, normals(dtype, w=(6, 5)), (normal("x", (3, 6), dtype), *more))


def square(dtype, apply, *more):
    """The problem of one weight (5, 5) and an input (3, 5)."""
    return Problem(apply, normals(dtype, w=(5, 5)), (normal("x", (3, 5), dtype), *more))


def stack(dtype, apply, *more):
    """The problem of three stacked weights (5, 5) and an input (2, 5)."""
    return Problem(apply, normals(dtype, w=(3, 5, 5)), (normal("x", (2, 5), dtype), *more))


# --------------------------------------------------------------------------------------------
# Scan over layers and remat.
# --------------------------------------------------------------------------------------------


def layer(x, w):
    """One layer of a scan."""
    return jnp.tanh(x @ w), None


@case(**STACK)
def scan_layers(dtype):
    """Layers along axis 0 are scanned over."""
    return stack(dtype, lambda p, x: lax.scan(layer, x, p["w"])[0])


@case(**STACK)
def scan_layers_reversed(dtype):
    """The last layer first, unrolled by two; outputs and carry are trees."""

    def body(carry, xs):
        h = jnp.tanh(carry["h"] @ xs["w"] + xs["b"][None])
        return {"h": h, "n": carry["n"] + 1}, (h, None)

    def apply(p, x):
        return lax.scan(body, {"h": x, "n": 0}, p, reverse=True, unroll=2)

    return Problem(apply, normals(dtype, w=(3, 5, 5), b=(3, 5)), (normal("x", (2, 5), dtype),))


@case(subject="layers", rules=(LORA,), sites=2, trainable=3 * 2 * (5 + 5) + 2 * (5 + 5))
def scan_layers_and_a_constant(dtype):
    """One weight per layer, and one that all layers share."""

    def apply(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w) @ p["shared"], None), x, p["w"])[0]

    return Problem(apply, normals(dtype, w=(3, 5, 5), shared=(5, 5)), (normal("x", (2, 5), dtype),))


@case(**STACK)
def scan_of_remat(dtype):
    """Each layer is a checkpoint with a policy."""
    body = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    return stack(dtype, lambda p, x: lax.scan(body, x, p["w"])[0])


@case(subject="layers", rules=(LORA,), sites=1, trainable=2 * (6 + 5))
def remat(dtype):
    """A checkpoint that saves by name."""
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    @partial(jax.checkpoint, policy=policy)
    def block(w, x):
        return jnp.sin(checkpoint_name(jnp.tanh(x @ w), "hidden"))

    return one(dtype, lambda p, x: block(p["w"], x))


@case(**STACK)
def scan_indexes_the_stack(dtype):
    """A scan over layer numbers takes a layer by dynamic_index_in_dim."""

    def apply(p, x):
        def body(x, i):
            return jnp.tanh(x @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), None

        return lax.scan(body, x, jnp.arange(3))[0]

    return stack(dtype, apply)


# --------------------------------------------------------------------------------------------
# Loops and branches.
# --------------------------------------------------------------------------------------------


@case(**SQUARE)
def fori_loop(dtype):
    """A loop with static bounds: a scan, with the weight as a constant."""
    return square(dtype, lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]) + i, x))


@case(**SQUARE, grad=False)
def fori_loop_dynamic(dtype):
    """A loop whose bound is an argument: a while_loop where that is traced."""
    return square(
        dtype,
        lambda p, x, n: lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ p["w"]), x),
        jnp.array(3),
    )


@case(**SQUARE, grad=False)
def while_loop(dtype):
    """The weight is used in the body and in the condition."""

    def apply(p, x):
        def go_on(state):
            i, x = state
            return (i < 4) & (jnp.sum(jnp.abs(x @ p["w"])) > 1e-3)

        return lax.while_loop(go_on, lambda s: (s[0] + 1, 0.5 * jnp.tanh(s[1] @ p["w"])), (0, x))

    return square(dtype, apply)


@case(**SQUARE)
def scan_carries_the_weight(dtype):
    """The parameters are part of the carry of a scan and come back as they were."""

    def apply(p, x):
        def body(carry, shift):
            p, x = carry
            return (p, jnp.tanh(x @ p["w"]) + shift), None

        return lax.scan(body, (p, x), jnp.arange(3, dtype=x.dtype))[0][1]

    return square(dtype, apply)


@case(**ONE, grad=False)
def by_platform(dtype):
    """The branch of a platform that is not here cannot even be compiled here."""

    def elsewhere(x, w):
        y = x @ w
        copy = pl.pallas_call(
            lambda source, target: target.__setitem__(..., source[...]),
            out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        )
        return copy(y)

    def apply(p, x):
        return lax.platform_dependent(x, p["w"], tpu=elsewhere, default=lambda x, w: x @ w)

    return one(dtype, apply)


@case(subject="control", rules=(LORA,), sites=2, trainable=2 * 2 * (6 + 5))
def cond(dtype):
    """Each branch has a weight of its own, one as an operand, one by closure."""

    def apply(p, x):
        first = x[0, 0] < 1  # true, so that the weight of the adapted branch has a gradient
        return lax.cond(first, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ p["v"], p["w"], x)

    return Problem(apply, normals(dtype, w=(6, 5), v=(6, 5)), (normal("x", (3, 6), dtype),))


@case(subject="control", rules=(LORA,), sites=3, trainable=3 * 2 * (6 + 5))
def switch(dtype):
    """Three branches, the whole tree as operand."""
    branches = [
        lambda p, x: x @ p["a"],
        lambda p, x: jnp.tanh(x @ p["b"]),
        lambda p, x: jnp.sin(x @ p["c"]) + x @ p["a"],
    ]
    return Problem(
        lambda p, x, i: lax.switch(i, branches, p, x),
        normals(dtype, a=(6, 5), b=(6, 5), c=(6, 5)),
        (normal("x", (3, 6), dtype), jnp.array(2)),
    )


@case(**SQUARE)
def cond_in_scan(dtype):
    """A scan of which every second step uses the weight."""

    def apply(p, x):
        def step(x, i):
            return lax.cond(i % 2 == 0, lambda x: jnp.tanh(x @ p["w"]), lambda x: -x, x), x

        return lax.scan(step, x, jnp.arange(4))

    return square(dtype, apply)


@case(**ONE)
def lax_map(dtype):
    """`lax.map` over rows, in batches of two and a remainder."""
    return one(dtype, lambda p, x: lax.map(lambda row: jnp.tanh(row @ p["w"]), x, batch_size=2))


@case(**ONE)
def associative_scan(dtype):
    """An associative scan over activations."""

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def apply(p, x):
        h = x @ p["w"]
        return lax.associative_scan(combine, (jnp.tanh(h), h))[1]

    return one(dtype, apply)


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


def clipped_forward(x, bound):
    """The value, and the bound for the backward pass."""
    return x, bound


def clipped_backward(bound, cotangent):
    """The clipped cotangent; none for the bound."""
    return jnp.clip(cotangent, -bound, bound), None


clipped.defvjp(clipped_forward, clipped_backward)


@case(**ONE)
def custom_jvp(dtype):
    """A user's custom_jvp of an activation, also inside of jit and of scan."""

    def apply(p, x):
        h = cube(x @ p["w"]) + jax.jit(cube)(jnp.sin(x) @ p["w"])
        return lax.scan(lambda c, row: (c, cube(row)), 0, h)[1]

    return one(dtype, apply)


@case(**ONE, forward=False)
def custom_vjp(dtype):
    """A user's custom_vjp of an activation: its backward pass is kept."""

    def apply(p, x):
        return jnp.sin(clipped(x @ p["w"], jnp.asarray(0.3, x.dtype)))

    return one(dtype, apply)


@case(**ONE, forward=False)
def custom_vjp_in_remat(dtype):
    """The same inside of a checkpoint with a policy, under jit."""

    @jax.jit
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(w, x):
        return jnp.sin(clipped(x @ w, jnp.asarray(0.3, x.dtype)))

    return one(dtype, lambda p, x: block(p["w"], x))


@jax.custom_vjp
def doubling(x, w):
    """x·w with a backward pass of its own, which doubles the gradient of w."""
    return x @ w


def doubling_forward(x, w):
    """The product and its operands."""
    return x @ w, (x, w)


def doubling_backward(operands, cotangent):
    """The cotangent of x, and twice that of w."""
    x, w = operands
    return cotangent @ w.T, 2 * (x.T @ cotangent)


doubling.defvjp(doubling_forward, doubling_backward)


@case(subject="control", rules=(FORMED,), sites=1, trainable=2 * (6 + 5), forward=False)
def custom_vjp_of_the_weight(dtype):
    """A custom_vjp that takes the weight: W + ΔW is formed, its backward pass is kept."""
    return one(dtype, lambda p, x: jnp.tanh(doubling(x, p["w"])))


@jax.custom_jvp
def product(x, w):
    """x·w with a derivative of its own."""
    return x @ w


@product.defjvp
def product_jvp(primals, tangents):
    """dx·w + 2 x·dw."""
    (x, w), (dx, dw) = primals, tangents
    return product(x, w), dx @ w + 2 * (x @ dw)


@case(subject="control", rules=(FORMED,), sites=1, trainable=2 * (6 + 5))
def custom_jvp_of_the_weight(dtype):
    """A custom_jvp that takes the weight: W + ΔW is formed."""
    return one(dtype, lambda p, x: jnp.tanh(product(x, p["w"])))


@case(
    subject="control",
    rules=(FORMED,),
    sites=1,
    trainable=2 * (6 + 5),
    grad=False,
    forward=False,
)
def pallas_kernel(dtype):
    """A Pallas kernel takes the weight: W + ΔW is formed."""

    def kernel(x, w, out):
        out[...] = jnp.tanh(x[...] @ w[...])

    def apply(p, x):
        shape = jax.ShapeDtypeStruct((3, 5), x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, p["w"])

    return one(dtype, apply)


@case(subject="control", rules=(FORMED,), sites=1, trainable=2 * (6 + 5))
def weight_standardized(dtype):
    """The weight is standardized before it is used."""

    def apply(p, x):
        w = p["w"] - p["w"].mean(axis=0, keepdims=True)
        return x @ (w / jnp.sqrt(jnp.mean(w * w, axis=0, keepdims=True) + 1e-3))

    return one(dtype, apply)


@case(subject="control", rules=(FORMED,), sites=1, trainable=2 * (6 + 5))
def weight_in_the_output(dtype):
    """The product, and the weight itself."""
    return one(dtype, lambda p, x: {"y": x @ p["w"], "w": p["w"]})


@case(subject="control", rules=(FORMED,), sites=1, trainable=2 * (6 + 5))
def weight_chosen_by_cond(dtype):
    """A cond returns one of two leaves, which is then used."""

    def apply(p, x):
        w = lax.cond(x[0, 0] > 0, lambda p: p["w"] * 2, lambda p: p["v"], p)
        return x @ w + x @ p["w"]

    return Problem(apply, normals(dtype, w=(6, 5), v=(6, 5)), (normal("x", (3, 6), dtype),))


# --------------------------------------------------------------------------------------------
# Derivatives and maps inside of the model.
# --------------------------------------------------------------------------------------------


@case(subject="control", rules=(LORA,), sites=2, trainable=2 * (6 + 5) + 2 * (5 + 4))
def jacobian_and_hessian(dtype):
    """Forward and reverse Jacobians, and a Hessian, inside of the model."""

    def apply(p, x):
        def f(row):
            return jnp.tanh(row @ p["w"]) @ p["v"]

        hessian = jax.hessian(lambda row: jnp.sum(jnp.sin(f(row))))(x[0])
        return jax.vmap(jax.jacfwd(f))(x), jax.jacrev(f)(x[1]), hessian

    return Problem(apply, normals(dtype, w=(6, 5), v=(5, 4)), (normal("x", (2, 6), dtype),))


@case(**ONE)
def vjp_inside(dtype):
    """A vector-Jacobian product with respect to the input, of a jitted function under remat."""

    def apply(p, x):
        f = jax.jit(jax.checkpoint(lambda x: jnp.tanh(x @ p["w"])))
        y, pull = jax.vjp(f, x)
        return pull(jnp.cos(y))[0]

    return one(dtype, apply)


@case(**ONE)
def grad_of_scan_inside(dtype):
    """A gradient through a scan, with respect to the input."""

    def apply(p, x):
        def total(x):
            return lax.scan(
                lambda c, row: (c + jnp.sum(jnp.tanh(row @ p["w"])), None), 0.0 * x[0, 0], x
            )[0]

        return jax.grad(total)(x)

    return one(dtype, apply)


@case(**ONE)
def vmap_inside(dtype):
    """A vmap over the batch, with a named axis and a collective."""

    def apply(p, x):
        def f(row):
            h = row @ p["w"]
            return jnp.tanh(h - lax.pmean(h, "batch"))

        return jax.vmap(f, axis_name="batch")(x)

    return one(dtype, apply)


# --------------------------------------------------------------------------------------------
# `shard_map` and sharding, on a mesh of one device.
# --------------------------------------------------------------------------------------------


def mesh():
    """A mesh of one device and one automatic axis, d."""
    return jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))


def sharded(name, body, in_specs, out_specs, leaks=False, **options):
    """Adds x·w under shard_map, with w: (6, 5)."""

    def build(dtype):
        f = jax.shard_map(body, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, **options)
        return one(dtype, lambda p, x: jnp.sin(f(p["w"], x)))

    CASES.append(
        Case(
            name=name,
            subject="control",
            build=build,
            rules=(LORA,),
            sites=1,
            trainable=2 * (6 + 5),
            exact_at_zero=False,
            leaks=leaks,
        )
    )


sharded("shard_map_replicated", lambda w, x: jnp.tanh(x @ w), (P(), P("d")), P("d"))
sharded(
    "shard_map_replicated_unchecked",
    lambda w, x: jnp.tanh(x @ w),
    (P(), P("d")),
    P("d"),
    check_vma=False,
)
sharded(  # column-parallel: the output is gathered
    "shard_map_outputs",
    lambda w, x: lax.all_gather(jnp.tanh(x @ w), "d", axis=1, tiled=True),
    (P(None, "d"), P()),
    P(),
    check_vma=False,
    leaks=True,
)
sharded("shard_map_outputs_sharded", lambda w, x: x @ w, (P(None, "d"), P()), P(None, "d"))
sharded(  # row-parallel: the output is summed
    "shard_map_inputs",
    lambda w, x: lax.psum(x @ w, "d"),
    (P("d", None), P(None, "d")),
    P(),
    leaks=True,
)
sharded(  # the batch and the weight are sharded, the weight is gathered
    "shard_map_gathers_the_weight",
    lambda w, x: jnp.tanh(x @ lax.all_gather(w, "d", axis=0, tiled=True)),
    (P("d", None), P("d", None)),
    P("d", None),
)


@case(**STACK, leaks=True)
def shard_map_in_scan(dtype):
    """A shard_map in each layer of a scan."""

    def apply(p, x):
        f = jax.shard_map(
            lambda x, w: jnp.tanh(lax.psum(x @ w, "d")),
            mesh=mesh(),
            in_specs=(P(None, "d"), P("d", None)),
            out_specs=P(),
        )
        return lax.scan(lambda x, w: (f(x, w), None), x, p["w"])[0]

    return stack(dtype, apply)


@case(**STACK)
def scan_in_shard_map(dtype):
    """A scan over layers in a shard_map."""

    def apply(p, x):
        return jax.shard_map(
            lambda w, x: lax.scan(layer, x, w)[0],
            mesh=mesh(),
            in_specs=(P(), P("d")),
            out_specs=P("d"),
        )(p["w"], x)

    return stack(dtype, apply)


@case(**ONE)
def sharding_constraints(dtype):
    """Constraints on the weight and on the activations."""

    def apply(p, x):
        w = lax.with_sharding_constraint(p["w"], NamedSharding(mesh(), P(None, "d")))
        return lax.with_sharding_constraint(x @ w, NamedSharding(mesh(), P("d", None)))

    return one(dtype, apply)
