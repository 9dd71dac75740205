"""Flax NNX through `nnx.split` and `nnx.merge`: its layers, state, stacks and tables."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora import LoRA

from ._case import Case, Problem, entry, fill, normal

CASES: list[Case] = []
case = partial(entry, CASES)
LORA = LoRA(rank=2, alpha=4)  # all-linear


def split(
    model, dtype, *args, call=lambda model, *args, **kwargs: model(*args, **kwargs), **kwargs
):
    """A problem whose parameters are the `nnx.Param`s of `model`, other state closed over.

    A merge without a copy would hand out the variables of `rest` themselves, to be mutated.
    """
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rest = fill(rest, dtype)

    def apply(params, *args, **kwargs):
        return call(nnx.merge(graph, params, rest, copy=True), *args, **kwargs)

    return Problem(apply, fill(params, dtype), args, kwargs)


def single(name, make, x_shape, trainable, *, subject="nnx", rules=(LORA,), **flags):
    """Adds a model of one layer with one site: `make(param_dtype=dtype, rngs=rngs)` on x."""

    def build(dtype):
        model = make(param_dtype=dtype, rngs=nnx.Rngs(0))
        return split(model, dtype, normal("x", x_shape, dtype))

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
# The layers, and other state beside the parameters.
# --------------------------------------------------------------------------------------------

single("nnx_linear", partial(nnx.Linear, 6, 5), (3, 6), 2 * (6 + 5))


class Network(nnx.Module):
    """Layers with parameters, batch statistics, dropout keys and a counter."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        """Makes the layers."""
        self.layers = nnx.List(
            [
                nnx.Linear(6, 5, param_dtype=dtype, rngs=rngs),
                nnx.BatchNorm(5, param_dtype=dtype, rngs=rngs),
            ]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(5, 4, param_dtype=dtype, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 6) to logits (batch, 4)."""
        self.calls[...] += 1
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(jnp.tanh(x)))


def stateful(model, x):
    """The output, and all state that is no parameter after the call."""
    y = model(x)
    return y, nnx.state(model, nnx.BatchStat), model.calls[...]


NETWORK = {
    "subject": "nnx",
    "rules": (LORA,),
    "sites": 2,
    "trainable": 2 * (6 + 5) + 2 * (5 + 4),
}


@case(**NETWORK, strict=False)
def nnx_train(dtype):
    """In train mode: statistics are updated, dropout draws from its stream, a counter counts."""
    model = Network(dtype, nnx.Rngs(0, dropout=1))
    return split(model, dtype, normal("x", (4, 6), dtype), call=stateful)


@case(**NETWORK, strict=False)
def nnx_state_as_argument(dtype):
    """All other state is an argument, and comes back with the output."""
    graph, params, rest = nnx.split(Network(dtype, nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        y = model(x)
        return y, nnx.split(model, nnx.Param, ...)[2]

    return Problem(apply, fill(params, dtype), (fill(rest, dtype), normal("x", (4, 6), dtype)))


@case(**NETWORK, exact_at_zero=False)
def nnx_functional_call(dtype):
    """A merged model under the user's own nnx.jit and nnx.remat."""

    def call(model, x):
        forward = nnx.jit(nnx.remat(lambda model, x: model(x)))
        return forward(model, x)

    model = Network(dtype, nnx.Rngs(0))
    model.eval()
    return split(model, dtype, normal("x", (4, 6), dtype), call=call)


# --------------------------------------------------------------------------------------------
# Stacks.
# --------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    """A residual layer with dropout."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        """Makes the layers."""
        self.up = nnx.Linear(6, 5, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True)
        self.down = nnx.Linear(5, 6, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(…, 6) to the same."""
        return x + self.down(self.dropout(jnp.tanh(self.up(x))))


LAYER = 2 * (6 + 5) + 2 * (5 + 6)  # up, down


def stacked(dtype):
    """Three layers, stacked by nnx.vmap."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Layer(dtype, rngs)

    return make(nnx.Rngs(0))


def stack(name, call, **flags):
    """Adds three stacked layers, run by `call(layers, x)`."""

    def build(dtype):
        return split(stacked(dtype), dtype, normal("x", (2, 6), dtype), call=call)

    fields = {"sites": 2, "trainable": 3 * LAYER, "rules": (LORA,), "exact_at_zero": False}
    CASES.append(Case(name=name, subject="layers", build=build, **{**fields, **flags}))


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def run(layer, x):
    """Runs the layers one after the other."""
    return layer(x)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
@nnx.remat(policy=jax.checkpoint_policies.dots_saveable)
def run_remat(layer, x):
    """Runs the layers one after the other, each a checkpoint."""
    return layer(x)


@nnx.vmap(in_axes=(0, None), out_axes=0)
def run_each(layer, x):
    """Runs every layer on the same input."""
    return layer(x)


def run_unrolled(layers, x):
    """Takes each layer out of the stack, in a Python loop."""
    graph, state = nnx.split(layers)
    for i in range(3):
        x = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], state))(x)
    return x


stack("nnx_scan", lambda layers, x: run(layers, x))
stack("nnx_scan_of_remat", lambda layers, x: run_remat(layers, x))
stack("nnx_unrolled", run_unrolled)
stack(
    "nnx_scan_only_up",
    lambda layers, x: run(layers, x),
    rules=(LoRA("up/kernel$", rank=3, alpha=3),),
    sites=1,
    trainable=3 * 3 * (6 + 5),
)


# --------------------------------------------------------------------------------------------
# Recurrent cells.
# --------------------------------------------------------------------------------------------

GATE = 2 * (4 + 4) + 2 * (4 + 4)  # of the input and of the state
# NNX's cells but the LSTM fuse their gates: (4, gates * 4) of each.
CELLS = {
    "nnx_rnn_lstm": (nnx.LSTMCell, 8, 4 * GATE),
    "nnx_rnn_optimized_lstm": (nnx.OptimizedLSTMCell, 2, 2 * (4 + 16) + 2 * (4 + 16)),
    "nnx_rnn_gru": (nnx.GRUCell, 2, 2 * (4 + 12) + 2 * (4 + 12)),
    "nnx_rnn_simple": (nnx.SimpleCell, 2, GATE),
}
for cell_name, (cell, cell_sites, cell_trainable) in CELLS.items():

    def build_rnn(dtype, cell=cell):
        """An nnx.RNN over (2, 5, 4)."""
        rngs = nnx.Rngs(0)
        model = nnx.RNN(cell(4, 4, dtype=dtype, param_dtype=dtype, rngs=rngs), rngs=rngs)
        return split(model, dtype, normal("x", (2, 5, 4), dtype))

    CASES.append(
        Case(
            name=cell_name,
            subject="convolution",
            build=build_rnn,
            rules=(LORA,),
            sites=cell_sites,
            trainable=cell_trainable,
            exact_at_zero=False,
            slow=cell in (nnx.LSTMCell, nnx.GRUCell),
        )
    )
