"""A chain of layers of one matrix each, unrolled and scanned, with and without `jax.checkpoint`."""

import functools

import jax
import jax.numpy as jnp


def layer(w, x):
    return x + jnp.tanh(x @ w)


def unrolled(params, x, layer=layer):
    for w in params.values():
        x = layer(w, x)
    return x


def scanned(params, x, layer=layer):
    return jax.lax.scan(lambda x, w: (layer(w, x), None), x, params["w"])[0]


FORMS = {
    "plain": unrolled,
    "remat": functools.partial(unrolled, layer=jax.checkpoint(layer)),
    "scan": scanned,
    "scan+remat": functools.partial(scanned, layer=jax.checkpoint(layer)),
}
