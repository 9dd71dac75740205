"""W + s·A·B formed before the model, as libraries do that know nothing of the product (Keras)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from .. import model
from . import compare


def attach(base: compare.Model, ids: jax.Array) -> compare.Tuned:
    """A and B of two axes, or three with the layers', for each kernel."""
    frozen = flatten_dict(base.params)
    kernels = [path for path in frozen if path[-1] == "kernel"]
    keys = jax.random.split(jax.random.key(2), len(kernels))
    trained = {
        path: factors(key, path, frozen[path].shape)
        for key, path in zip(keys, kernels, strict=True)
    }

    def apply(frozen: Any, trained: Any, ids: jax.Array) -> jax.Array:
        def add(path: tuple[str, ...], a: jax.Array, b: jax.Array) -> jax.Array:
            delta = (compare.ALPHA / compare.RANK) * (a @ b)
            return frozen[path] + delta.reshape(frozen[path].shape)

        sums = {path: add(path, *ab) for path, ab in trained.items()}
        return base.apply(unflatten_dict({**frozen, **sums}), ids)

    return compare.Tuned(apply, frozen, trained)


def factors(
    key: jax.Array, path: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """A of normal numbers and B of zeros; the layers of a scan are the first axis."""
    stack = int("layers" in path)
    split = stack + (2 if path[-2] == "o" else 1)  # o has two input axes: heads and their size
    layers, inputs, outputs = shape[:stack], shape[stack:split], shape[split:]
    a = 0.02 * jax.random.normal(key, (*layers, math.prod(inputs), compare.RANK))
    return a, jnp.zeros((*layers, compare.RANK, math.prod(outputs)))


def make(shape: model.Shape, **flags: bool) -> compare.Model:
    """The measured model itself."""
    return compare.linen(model.LM(shape, **flags))


PEER = compare.Peer("dense W + A·B", "-", "n-D", make, attach)

if __name__ == "__main__":
    compare.main(PEER)
