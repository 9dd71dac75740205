"""Checks for methods and initializers that need the values of a whole weight."""

from typing import Any

import jax

from . import _compat


def check_whole(use: str, w: Any, path: str) -> None:
    """Raises unless `w` has values, and no enclosing `shard_map` has a part of it.

    Args:
        use: who does what to the weight, as `DoRA('w') takes norms of`.
        w: an array, a shape or a quantized weight.
        path: its path.
    """
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w)):
        raise ValueError(
            f"`params` has a shape at {path!r}, but {use} its values. Give arrays, or call init "
            "under jax.eval_shape."
        )
    if _compat.may_be_cut_over(w):
        raise NotImplementedError(
            f"{use} the whole of {path!r}, of which a shard_map around init may have a part. Call "
            "init outside of it."
        )
