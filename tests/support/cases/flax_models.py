"""Flax: what linen and NNX trace that plain JAX does not, and the ways in which both are called."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jlora import LoRA

from ._case import Case, Problem, entry, fill, normal

CASES: list[Case] = []
case = entry(CASES)
rearranged = entry(CASES, exact_at_zero=False)
LAYER = 2 * (6 + 5) + 2 * (5 + 6)  # up, down
# Of a stack of three layers.
STACK = {"sites": 2, "exact_at_zero": False}
NETWORK = {"sites": 2, "strict": False}
OF_NETWORK = 2 * (6 + 5) + 2 * (5 + 4)


def linen(module, dtype, *args, **kwargs):
    """A problem of `module.apply` with random variables. Options of `apply` are not for `init`."""
    options = {name: kwargs.pop(name) for name in ("mutable", "rngs") if name in kwargs}
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))
    return Problem(module.apply, fill(variables, dtype), args, {**kwargs, **options})


# --------------------------------------------------------------------------------------------
# Linen: layers of one product. The subject, the number of trainable parameters, x, the layer.
# --------------------------------------------------------------------------------------------

ATTENTION = partial(nn.MultiHeadDotProductAttention, num_heads=2, qkv_features=8)
OF_ATTENTION = 3 * 2 * (6 + 8) + 2 * (8 + 6)  # q, k, v (6, 2, 4); out (2, 4, 6)
LAYERS: dict[str, tuple[Any, ...]] = {
    "linen_dense_general": (
        *("product", 2 * (2 * 4 + 2 * 5), (3, 2, 4)),
        partial(nn.DenseGeneral, (2, 5), axis=(-2, -1)),
    ),
    "linen_attention": ("product", OF_ATTENTION, (2, 3, 6), ATTENTION),
    "conv_2d": ("convolution", 2 * (3 * 2 * 3 + 5), (2, 6, 5, 3), partial(nn.Conv, 5, (3, 2))),
    "conv_grouped_strided_dilated": (
        *("convolution", 2 * (3 * 2 + 6), (2, 9, 4)),
        partial(nn.Conv, 6, (3,), strides=2, kernel_dilation=2, feature_group_count=2),
    ),
    # A kernel for each of the seven positions: (7, 3 * 4, 5).
    "conv_local": ("convolution", 7 * 2 * (3 * 4 + 5), (2, 7, 4), partial(nn.ConvLocal, 5, (3,))),
    # Kernel (3, 2, 5, 4), flipped: inputs are axes 0, 1 and 3.
    "conv_transpose_of_kernel": (
        *("convolution", 2 * (3 * 2 * 4 + 5), (2, 3, 3, 4)),
        partial(nn.ConvTranspose, 5, (3, 2), strides=(2, 2), transpose_kernel=True),
    ),
    # A stack of two axes.
    "linen_remat_scan": (
        *("layers", 2 * 2 * 2 * (6 + 6), (2, 6)),
        partial(nn.remat_scan(nn.Dense, lengths=(2, 2)), 6),
    ),
}
for name, (subject, trainable, of_x, make) in LAYERS.items():

    def build_layer(dtype, make=make, of_x=of_x):
        """The layer on x."""
        return linen(make(param_dtype=dtype), dtype, normal("x", of_x, dtype))

    sites = 4 if make is ATTENTION else 1
    exact = subject != "layers"
    case(subject, trainable, name, sites=sites, exact_at_zero=exact)(build_layer)


# --------------------------------------------------------------------------------------------
# Linen: stacks, cells and calls.
# --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A residual layer as `nn.scan` wants it, its kernels in boxes of partitioning metadata."""

    param_dtype: Any = jnp.float32
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, Any]:
        """(…, 6) to the same, and the mean of the hidden units."""
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        dense = partial(nn.Dense, param_dtype=self.param_dtype, kernel_init=init)
        h = nn.Dropout(self.rate, deterministic=not self.rate)(jnp.tanh(dense(5, name="up")(x)))
        return x + dense(6, name="down")(h), h.mean()


def scan(body, axis):
    """`body` scanned over three layers, whose parameters are stacked along `axis`."""
    return nn.scan(
        body,
        variable_axes={"params": axis},
        split_rngs={"params": True, "dropout": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


@case("layers", 3 * LAYER, **STACK)
def linen_scan_with_dropout(dtype):
    """Dropout in a scanned layer: its mask must be the base model's."""
    model, rngs = scan(Layer, 0)(param_dtype=dtype, rate=0.5), {"dropout": jax.random.key(1)}
    return linen(model, dtype, normal("x", (2, 6), dtype), rngs=rngs)


@case("layers", 3 * LAYER, **STACK)
def linen_scan_of_remat_with_policy(dtype):
    """Layers along axis 1, each of them a checkpoint."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    model = scan(nn.remat(Layer, prevent_cse=False, policy=policy), 1)(param_dtype=dtype)
    return linen(model, dtype, normal("x", (2, 6), dtype))


TWO_GATES = (LoRA("(if|hg)/kernel", rank=2, alpha=4),)


@rearranged("convolution", 2 * (3 + 4) + 2 * (4 + 4), sites=2, rules=TWO_GATES)
def rnn_optimized_lstm_two_gates(dtype):
    """The cell concatenates its kernels; one input and one state kernel are adapted."""
    model = nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=dtype))
    return linen(model, dtype, normal("x", (2, 5, 3), dtype))


class Network(nn.Module):
    """Dense, batch norm and dropout under one flag; shows that it is called as it should be."""

    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, *, scale: float = 1.0) -> dict[str, Any]:
        """(batch, 6) to logits (batch, 4) and more."""
        if train is not True and train is not False:
            raise TypeError("`train` must stay a Python bool")
        h = nn.Dense(5, param_dtype=self.param_dtype)(x)
        h = nn.BatchNorm(use_running_average=not train, param_dtype=self.param_dtype)(h)
        self.sow("intermediates", "hidden", h)
        h = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(h))
        logits = nn.Dense(4, param_dtype=self.param_dtype)(h) * scale
        return {"logits": logits, "hidden": [h, None]}


@case("call", OF_NETWORK, **NETWORK)
def linen_train(dtype):
    """Batch statistics are returned, dropout has its key, intermediate outputs are captured."""
    x, rngs = normal("x", (4, 6), dtype), {"dropout": jax.random.key(1)}
    mutable = ["batch_stats", "intermediates"]
    problem = linen(Network(dtype), dtype, x, train=True, mutable=mutable, rngs=rngs)
    variables = {name: problem.params[name] for name in ("params", "batch_stats")}
    kwargs = {**problem.kwargs, "capture_intermediates": True}
    return problem._replace(params=variables, kwargs=kwargs)


@case("call", OF_ATTENTION, sites=4, strict=False)
def linen_decode_with_cache(dtype):
    """One step of autoregressive attention: the cache is read and returned."""
    model = ATTENTION(param_dtype=dtype, decode=True)
    variables = linen(model, dtype, normal("x", (2, 5, 6), dtype)).params
    step = normal("step", (2, 1, 6), dtype)
    return Problem(model.apply, variables, (step,), {"mutable": ["cache"]})


@case("no_site", 2 * (2 * 2 * 3 + 6) + 2 * (6 + 5), sites=2, strict=False)
def linen_vision_transformer(dtype):
    """Patches and head are sites; positions, class token, norms, scales and PReLU are not."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def param(name, *shape):
                return self.param(name, nn.initializers.normal(1.0), shape, dtype)

            x = nn.Conv(6, (2, 2), strides=2, padding="VALID", param_dtype=dtype)(x)
            x = x.reshape(x.shape[0], -1, 6)
            token = jnp.broadcast_to(param("token", 1, 1, 6), (x.shape[0], 1, 6))
            x = jnp.concatenate([token, x], axis=1) + param("position", 1, 5, 6)
            x = nn.LayerNorm(param_dtype=dtype)(x) * param("scale", 6)
            x = nn.RMSNorm(param_dtype=dtype)(nn.PReLU(param_dtype=dtype)(x))
            x = nn.InstanceNorm(param_dtype=dtype)(x) * param("gate", 5, 6)
            return nn.Dense(5, param_dtype=dtype)(x[:, 0])

    return linen(Model(), dtype, normal("x", (2, 4, 4, 3), dtype))


# --------------------------------------------------------------------------------------------
# NNX, through `nnx.split` and `nnx.merge`.
# --------------------------------------------------------------------------------------------


def split(model, dtype, shape, call=lambda model, x: model(x)):
    """A problem whose parameters are the `nnx.Param`s of `model`, other state closed over.

    A merge without a copy would hand out the variables of `rest` themselves, to be mutated.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = fill(rest, dtype)

    def apply(params, x):
        return call(nnx.merge(graph, params, rest, copy=True), x)

    return Problem(apply, fill(params, dtype), (normal("x", shape, dtype),))


class NnxNetwork(nnx.Module):
    """Layers with parameters, batch statistics, dropout keys and a counter."""

    def __init__(self, dtype: Any):
        """Makes the layers."""
        rngs = nnx.Rngs(0, dropout=1)
        linear = nnx.Linear(6, 5, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([linear, nnx.BatchNorm(5, param_dtype=dtype, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5, 4, param_dtype=dtype, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 6) to logits (batch, 4)."""
        self.calls[...] += 1
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(jnp.tanh(x)))


@case("call", 2 * (6 + 5))
def nnx_linear(dtype):
    """One layer."""
    return split(nnx.Linear(6, 5, param_dtype=dtype, rngs=nnx.Rngs(0)), dtype, (3, 6))


@case("call", OF_NETWORK, **NETWORK)
def nnx_state_as_argument(dtype):
    """In train mode, with all other state as an argument, which comes back with the output."""
    graph, params, rest = nnx.split(NnxNetwork(dtype), nnx.Param, ...)

    def apply(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        return model(x), nnx.split(model, nnx.Param, ...)[2]

    return Problem(apply, fill(params, dtype), (fill(rest, dtype), normal("x", (4, 6), dtype)))


@case("call", OF_NETWORK, sites=2, exact_at_zero=False)
def nnx_functional_call(dtype):
    """A merged model under the user's own nnx.jit and nnx.remat."""

    def call(model, x):
        return nnx.jit(nnx.remat(lambda model, x: model(x)))(model, x)

    model = NnxNetwork(dtype)
    model.eval()
    return split(model, dtype, (4, 6), call)


class NnxLayer(nnx.Module):
    """A residual layer with dropout."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        """Makes the layers."""
        self.up = nnx.Linear(6, 5, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True)
        self.down = nnx.Linear(5, 6, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, 6) to the same."""
        return x + self.down(self.dropout(jnp.tanh(self.up(x))))


def stacked(dtype):
    """Three layers, stacked by nnx.vmap."""
    make = nnx.vmap(lambda rngs: NnxLayer(dtype, rngs), in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=3)(make)(nnx.Rngs(0))


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def run(layer, x):
    """Runs the layers one after the other."""
    return layer(x)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
@nnx.remat(policy=jax.checkpoint_policies.dots_saveable)
def run_remat(layer, x):
    """Runs the layers one after the other, each a checkpoint."""
    return layer(x)


@case("layers", 3 * LAYER, **STACK)
def nnx_scan_of_remat(dtype):
    """All layers."""
    return split(stacked(dtype), dtype, (2, 6), lambda layers, x: run_remat(layers, x))


ONLY_UP = (LoRA("up/kernel$", rank=3, alpha=3),)


@rearranged("layers", 3 * 3 * (6 + 5), rules=ONLY_UP)
def nnx_scan_only_up(dtype):
    """A part of each."""
    return split(stacked(dtype), dtype, (2, 6), lambda layers, x: run(layers, x))


@rearranged("convolution", 2 * (4 + 16) + 2 * (4 + 16), sites=2)
def nnx_rnn_optimized_lstm(dtype):
    """The cell fuses its gates: (4, gates · 4) of the input and of the state."""
    rngs = nnx.Rngs(0)
    cell = nnx.OptimizedLSTMCell(4, 4, dtype=dtype, param_dtype=dtype, rngs=rngs)
    return split(nnx.RNN(cell, rngs=rngs), dtype, (2, 5, 4))
