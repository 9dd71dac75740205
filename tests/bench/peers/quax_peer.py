"""Quax: array-ish values in the place of the kernels, multiplied by multiple dispatch."""

from typing import Any

import equinox as eqx
import jax
import quax
from flax.traverse_util import flatten_dict, unflatten_dict
from quax.examples.lora import LoraArray

from .. import model
from . import compare, twins


def make(shape: model.Shape, **flags: bool) -> compare.Model:
    """The flat twin: a `LoraArray` factors the last two axes, whatever they mean."""
    return compare.linen(model.LM(shape, block=twins.FlatBlock, **flags))


def attach(base: compare.Model, ids: jax.Array) -> compare.Tuned:
    """Every kernel becomes a `LoraArray` that may not be materialized; only A and B are trained."""

    def factor(path: tuple[str, ...], x: jax.Array) -> Any:
        if path[-1] != "kernel":
            return x
        return LoraArray(x, rank=compare.RANK, key=jax.random.key(2))

    def is_factor(path: Any, _: Any) -> bool:
        return path[-1] in (jax.tree_util.GetAttrKey("a"), jax.tree_util.GetAttrKey("b"))

    flat = {path: factor(path, x) for path, x in flatten_dict(base.params).items()}
    trained, frozen = eqx.partition(flat, jax.tree_util.tree_map_with_path(is_factor, flat))
    adapted = quax.quaxify(lambda params, ids: base.apply(unflatten_dict(params), ids))

    def apply(frozen: Any, trained: Any, ids: jax.Array) -> jax.Array:
        return adapted(eqx.combine(trained, frozen), ids)

    return compare.Tuned(apply, frozen, trained)


PEER = compare.Peer("quax", compare.version("quax"), "2-D", make, attach)

if __name__ == "__main__":
    compare.main(PEER)
