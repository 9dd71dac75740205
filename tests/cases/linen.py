"""Flax linen: its layers, lifted transforms and ways to be called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import LoRA

from ._case import Case, Problem, entry, fill, normal

CASES: list[Case] = []
case = partial(entry, CASES)
LORA = LoRA(rank=2, alpha=4)  # all-linear
IDS = ((3, 0, 6), (1, 6, 2))


def linen(module, dtype, *args, **kwargs):
    """A problem of `module.apply` with random variables. Options of `apply` are not for `init`."""
    options = {name: kwargs.pop(name) for name in ("mutable", "rngs", "method") if name in kwargs}
    init_method = {"method": options["method"]} if "method" in options else {}
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = jax.eval_shape(lambda: module.init(rngs, *args, **init_method, **kwargs))
    return Problem(module.apply, fill(variables, dtype), args, {**kwargs, **options})


def single(name, subject, make, x_shape, trainable, *, rules=(LORA,), **flags):
    """Adds a model of one layer with one site: `make(param_dtype=dtype)` called on x."""

    def build(dtype):
        return linen(make(param_dtype=dtype), dtype, normal("x", x_shape, dtype))

    CASES.append(
        Case(
            name=name,
            subject=subject,
            build=build,
            rules=rules,
            **{"sites": 1, "trainable": trainable, **flags},
        )
    )


# --------------------------------------------------------------------------------------------
# Dense, DenseGeneral, Einsum, attention.
# --------------------------------------------------------------------------------------------

single("linen_dense", "dense", partial(nn.Dense, 5), (3, 6), 2 * (6 + 5))
single(
    "linen_dense_general_both",
    "dense",
    partial(nn.DenseGeneral, (2, 5), axis=(-2, -1)),
    (3, 2, 4),
    2 * (2 * 4 + 2 * 5),
)

ATTENTION = partial(nn.MultiHeadDotProductAttention, num_heads=2, qkv_features=8)
single(  # q, k, v (6, 2, 4); out (2, 4, 6)
    "linen_attention", "dense", ATTENTION, (2, 3, 6), 3 * 2 * (6 + 8) + 2 * (8 + 6), sites=4
)


@case(subject="product", rules=(LORA,), sites=1, trainable=2 * (5 + 6))
def linen_map_variables(dtype):
    """A lifted Dense that stores its kernel transposed: (5, 6)."""

    def transposed(variables):
        return jax.tree.map(lambda x: x.T, variables)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.map_variables(
                nn.Dense, "params", transposed, transposed, init=self.is_initializing()
            )
            return dense(5, param_dtype=dtype)(x)

    return linen(Model(), dtype, normal("x", (3, 6), dtype))


# --------------------------------------------------------------------------------------------
# Stacks by scan, remat and vmap.
# --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A residual layer as `nn.scan` wants it: carry and input to carry and output."""

    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, shift: Any = None) -> tuple[jax.Array, Any]:
        """(…, 6) to the same, and the mean of the hidden units."""
        h = nn.Dense(5, param_dtype=self.param_dtype, kernel_init=self.kernel_init, name="up")(x)
        h = nn.Dropout(self.rate, deterministic=not self.rate)(jnp.tanh(h))
        y = nn.Dense(6, param_dtype=self.param_dtype, kernel_init=self.kernel_init, name="down")(h)
        return x + y if shift is None else x + y + shift, h.mean()


LAYER = 2 * (6 + 5) + 2 * (5 + 6)  # up, down


def scan(body, axis=0, **options):
    """`body` scanned over three layers, whose parameters are stacked along `axis`."""
    return nn.scan(
        body,
        variable_axes={"params": axis},
        split_rngs={"params": True, "dropout": True},
        length=3,
        **options,
    )


def stacked(name, lift, *, trainable=3 * LAYER, x_shape=(2, 6), **flags):
    """Adds a model `lift(Layer)`."""
    single(
        name,
        "layers",
        lambda param_dtype: lift(Layer)(param_dtype=param_dtype),
        x_shape,
        trainable,
        **{"sites": 2, "exact_at_zero": False, **flags},
    )


stacked("linen_scan", scan)
stacked(
    "linen_scan_of_remat_with_policy",
    lambda layer: scan(
        nn.remat(
            layer,
            prevent_cse=False,
            policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        ),
        axis=1,
    ),
    slow=True,
)
stacked(
    "linen_vmap_batch",
    partial(nn.vmap, variable_axes={"params": None}, split_rngs={"params": False}),
    x_shape=(3, 2, 6),
    trainable=LAYER,
)


@case(subject="layers", rules=(LORA,), sites=2, trainable=3 * LAYER, exact_at_zero=False)
def linen_scan_with_dropout(dtype):
    """Dropout in a scanned layer: its mask must be the base model's."""
    model = scan(Layer)(param_dtype=dtype, rate=0.5)
    return linen(model, dtype, normal("x", (2, 6), dtype), rngs={"dropout": jax.random.key(1)})


@case(
    subject="layers",
    rules=(LoRA("kernel", rank=2, alpha=4),),
    sites=2,
    trainable=3 * LAYER,
    exact_at_zero=False,
)
def linen_scan_partitioned(dtype):
    """Kernels in boxes of partitioning metadata, to which scan adds the layer axis."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = scan(Layer, axis=1, metadata_params={nn.PARTITION_NAME: "layers"})
    return linen(model(param_dtype=dtype, kernel_init=init), dtype, normal("x", (2, 6), dtype))


@case(subject="layers", rules=(LORA,), sites=1, trainable=2 * 2 * 2 * (6 + 6), exact_at_zero=False)
def linen_remat_scan(dtype):
    """`nn.remat_scan` over two times two layers: a stack of two axes."""
    model = nn.remat_scan(nn.Dense, lengths=(2, 2))(6, param_dtype=dtype)
    return linen(model, dtype, normal("x", (2, 6), dtype))


# --------------------------------------------------------------------------------------------
# Embeddings, and layers that are called more than once.
# --------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model with one table for its tokens and its logits."""

    param_dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Token ids to logits."""
        embed = nn.Embed(7, 4, param_dtype=self.param_dtype)
        h = nn.Dense(4, param_dtype=self.param_dtype)(embed(ids))
        return embed.attend(jnp.tanh(h))


@case(
    subject="lookup",
    rules=(LoRA("embedding$", rank=3, alpha=3), LORA),
    sites=2,
    trainable=3 * (7 + 4) + 2 * (4 + 4),  # one for the table, one for Dense
)
def linen_tied(dtype):
    """Lookup and `attend` of one Embed: one adapter."""
    return linen(Tied(dtype), dtype, jnp.array(IDS))


# --------------------------------------------------------------------------------------------
# Convolutions and recurrent cells.
# --------------------------------------------------------------------------------------------

single("conv_2d", "convolution", partial(nn.Conv, 5, (3, 2)), (2, 6, 5, 3), 2 * (3 * 2 * 3 + 5))
single(
    "conv_grouped_strided_dilated",
    "convolution",
    partial(nn.Conv, 6, (3,), strides=2, kernel_dilation=2, feature_group_count=2, use_bias=False),
    (2, 9, 4),
    2 * (3 * 2 + 6),
)
single(  # a kernel for each of the seven positions: (7, 3 * 4, 5)
    "conv_local", "convolution", partial(nn.ConvLocal, 5, (3,)), (2, 7, 4), 7 * 2 * (3 * 4 + 5)
)
single(  # kernel (3, 2, 5, 4), flipped: inputs are axes 0, 1 and 3
    "conv_transpose_of_kernel",
    "convolution",
    partial(nn.ConvTranspose, 5, (3, 2), strides=(2, 2), transpose_kernel=True),
    (2, 3, 3, 4),
    2 * (3 * 2 * 4 + 5),
)


@case(
    subject="convolution",
    rules=(LoRA("kernel", rank=2, alpha=4, materialize=True),),
    sites=1,
    trainable=2 * (3 * 4 + 5),
    exact_at_zero=False,
)
def conv_masked(dtype):
    """A kernel times a mask has no factored form."""
    mask = jnp.triu(jnp.ones((12, 5), dtype), -3).reshape(3, 4, 5)
    model = nn.Conv(5, (3,), mask=mask, param_dtype=dtype)
    return linen(model, dtype, normal("x", (2, 7, 4), dtype))


# Each gate has a kernel (4, 4) of the input and one of the state.
GATE = 2 * (4 + 4) + 2 * (4 + 4)


@case(
    subject="convolution",
    rules=(LoRA("(if|hg)/kernel", rank=2, alpha=4),),
    sites=2,
    trainable=2 * (3 + 4) + 2 * (4 + 4),
    exact_at_zero=False,
)
def rnn_optimized_lstm_two_gates(dtype):
    """The cell concatenates its kernels; one input and one state kernel are adapted."""
    model = nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=dtype))
    return linen(model, dtype, normal("x", (2, 5, 3), dtype))


@case(
    subject="convolution",
    rules=(LORA,),
    sites=14,
    trainable=4 * GATE + 3 * GATE,
    exact_at_zero=False,
)
def rnn_bidirectional(dtype):
    """An LSTM forward and a GRU backward, with lengths."""
    model = nn.Bidirectional(
        nn.RNN(nn.OptimizedLSTMCell(4, param_dtype=dtype)),
        nn.RNN(nn.GRUCell(4, param_dtype=dtype)),
    )
    x = normal("x", (2, 5, 4), dtype)
    return linen(model, dtype, x, seq_lengths=jnp.array([5, 3]))


# --------------------------------------------------------------------------------------------
# What a call may look like.
# --------------------------------------------------------------------------------------------


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


NETWORK = {
    "subject": "call",
    "rules": (LORA,),
    "sites": 2,
    "trainable": 2 * (6 + 5) + 2 * (5 + 4),
    "strict": False,
}


@case(**NETWORK)
def linen_train(dtype):
    """Batch statistics are updated and returned; dropout has its key."""
    x = normal("x", (4, 6), dtype)
    rngs = {"dropout": jax.random.key(1)}
    return linen(Network(dtype), dtype, x, train=True, mutable=["batch_stats"], rngs=rngs)


@case(**NETWORK)
def linen_capture_intermediates(dtype):
    """Every intermediate output is captured, and one is sown."""
    x = normal("x", (4, 6), dtype)
    problem = linen(Network(dtype), dtype, x, train=False, mutable=["intermediates"])
    variables = {name: problem.params[name] for name in ("params", "batch_stats")}
    return problem._replace(
        params=variables, kwargs={**problem.kwargs, "capture_intermediates": True}
    )


class AutoEncoder(nn.Module):
    """Two methods beside `__call__`."""

    param_dtype: Any

    def setup(self) -> None:
        """Makes both layers."""
        self.encoder = nn.Dense(5, param_dtype=self.param_dtype)
        self.decoder = nn.Dense(6, param_dtype=self.param_dtype)

    def encode(self, x: jax.Array) -> jax.Array:
        """(…, 6) to (…, 5)."""
        return jnp.tanh(self.encoder(x))

    def decode(self, z: jax.Array) -> jax.Array:
        """(…, 5) to (…, 6)."""
        return self.decoder(z)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, 6) to the same."""
        return self.decode(self.encode(x))


@case(subject="call", rules=(LORA,), sites=1, trainable=2 * (6 + 5))
def linen_method_by_name(dtype):
    """`method="encode"`: the decoder is not used, so it is no site."""
    x = normal("x", (3, 6), dtype)
    problem = linen(AutoEncoder(dtype), dtype, x)
    return problem._replace(kwargs={"method": "encode"})


@case(subject="call", rules=(LORA,), sites=4, trainable=3 * 2 * (6 + 8) + 2 * (8 + 6), strict=False)
def linen_decode_with_cache(dtype):
    """One step of autoregressive attention: the cache is read and returned."""
    model = ATTENTION(param_dtype=dtype, decode=True)
    variables = linen(model, dtype, normal("x", (2, 5, 6), dtype)).params
    step = normal("step", (2, 1, 6), dtype)
    return Problem(model.apply, variables, (step,), {"mutable": ["cache"]})


@case(**{**NETWORK, "trainable": 3 * (2 * (6 + 5) + 2 * (5 + 6))}, exact_at_zero=False)
def linen_scan_with_batch_norm(dtype):
    """Statistics of scanned layers, stacked along axis 0 and the parameters along 1."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.BatchNorm(use_running_average=False, param_dtype=dtype)(x)
            h = jnp.tanh(nn.Dense(5, param_dtype=dtype)(h))
            return x + nn.Dense(6, param_dtype=dtype)(h), None

    model = nn.scan(
        Normed,
        variable_axes={"params": 1, "batch_stats": 0},
        split_rngs={"params": True},
        length=3,
    )
    return linen(model(), dtype, normal("x", (4, 6), dtype), None, mutable=["batch_stats"])


# --------------------------------------------------------------------------------------------
# Lifted control flow, and a wrapper that no factored form follows.
# --------------------------------------------------------------------------------------------


@case(
    subject="control",
    rules=(LORA,),
    sites=2,
    trainable=2 * (6 + 5) + 2 * (6 + 5),
    exact_at_zero=False,
)
def linen_cond(dtype):
    """`nn.cond` between two layers."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, flag):
            yes = nn.Dense(5, param_dtype=dtype, name="yes")
            no = nn.Dense(5, param_dtype=dtype, name="no")
            if self.is_initializing():
                return yes(x) + no(x)
            return nn.cond(flag, lambda m, x: yes(x), lambda m, x: jnp.sin(no(x)), self, x)

    return linen(Model(), dtype, normal("x", (3, 6), dtype), jnp.array(False))


@case(
    subject="control",
    rules=(LORA,),
    sites=1,
    trainable=2 * (6 + 6),
    grad=False,
    exact_at_zero=False,
)
def linen_while_loop(dtype):
    """`nn.while_loop` around a layer."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(6, param_dtype=dtype)
            if self.is_initializing():
                return dense(x)
            return nn.while_loop(
                lambda m, state: state[0] < 3,
                lambda m, state: (state[0] + 1, jnp.tanh(dense(state[1]))),
                self,
                (0, x),
                broadcast_variables="params",
            )[1]

    return linen(Model(), dtype, normal("x", (3, 6), dtype))


@case(
    subject="control",
    rules=(LoRA("Dense_0/kernel$", rank=2, alpha=4, materialize=True),),
    sites=1,
    trainable=2 * (6 + 5),
    exact_at_zero=False,
    strict=False,
)
def linen_weight_norm(dtype):
    """`nn.WeightNorm`: the kernel is divided by its norms before the product."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(nn.Dense(5, param_dtype=dtype))(x)

    return linen(Model(), dtype, normal("x", (3, 6), dtype))


# --------------------------------------------------------------------------------------------
# What is no site.
# --------------------------------------------------------------------------------------------


@case(
    subject="no_site",
    rules=(LORA,),
    sites=2,
    trainable=2 * (2 * 2 * 3 + 6) + 2 * (6 + 5),
    strict=False,
)
def linen_vision_transformer(dtype):
    """Patches and head are sites; positions, class token, norms, scales and PReLU are not."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (2, 2), strides=2, padding="VALID", param_dtype=dtype)(x)
            x = x.reshape(x.shape[0], -1, 6)
            normal_init = nn.initializers.normal()
            token = self.param("token", normal_init, (1, 1, 6), dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 6)), x], axis=1)
            x = x + self.param("position", normal_init, (1, 5, 6), dtype)
            x = nn.LayerNorm(param_dtype=dtype)(x) * self.param("scale", normal_init, (6,), dtype)
            x = nn.RMSNorm(param_dtype=dtype)(nn.PReLU(param_dtype=dtype)(x))
            x = nn.InstanceNorm(param_dtype=dtype)(x) * self.param(
                "gate", normal_init, (5, 6), dtype
            )
            return nn.Dense(5, param_dtype=dtype)(x[:, 0])

    return linen(Model(), dtype, normal("x", (2, 4, 4, 3), dtype))
