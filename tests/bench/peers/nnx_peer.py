"""`nnx.LoRA`: modules around modules, told apart by the type of their variables."""

from typing import Any

import jax
from flax import nnx

from .. import model
from . import compare, twins


def make(shape: model.Shape, **flags: bool) -> compare.Model:
    """The NNX twin as a function of its parameters."""
    graph, state = nnx.split(twins.NNXLM(shape, **flags))

    def apply(params: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, params, copy=True)(ids)

    return compare.Model((shape, flags), apply, nnx.to_pure_dict(state))


def attach(base: compare.Model, ids: jax.Array) -> compare.Tuned:
    """The twin with an `nnx.LoRA` around each of its kernels, of the same initial weights."""
    shape, flags = base.module
    module = twins.NNXLM(shape, compare.RANK, **flags)
    graph, trained, frozen = nnx.split(module, nnx.LoRAParam, ...)

    def apply(frozen: Any, trained: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, trained, frozen, copy=True)(ids)

    return compare.Tuned(apply, frozen, trained)


PEER = compare.Peer("nnx.LoRA", compare.version("flax"), "2-D, NNX", make, attach)

if __name__ == "__main__":
    compare.main(PEER)
