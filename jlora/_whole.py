"""Checks for methods and initializers that need the values of a whole weight."""

import jax

from . import _compat
from ._quantized import BaseLeaf, Quantized


def check_whole(use: str, w: BaseLeaf, path: str) -> jax.Array | Quantized:
    """Returns `w`; raises unless it has values and is whole, not a shard of a `shard_map`.

    Args:
        use: subject and verb for the error, such as `DoRA('w') takes norms of`.
        w: an array, a shape or a quantized weight.
        path: its path.
    """
    types = [x for x in jax.tree.leaves(w) if isinstance(x, jax.ShapeDtypeStruct)]
    if isinstance(w, jax.ShapeDtypeStruct) or types:
        raise ValueError(
            f"`params` has only a shape at {path!r}, but {use} its values. Give arrays, or call "
            "init under jax.eval_shape."
        )
    if _compat.may_be_cut_over(w):
        raise NotImplementedError(
            f"{use} the whole of {path!r}, but the shard_map around init may have sharded it. Call "
            "init outside of the shard_map."
        )
    return w
