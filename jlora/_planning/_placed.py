"""The mesh of a plan, and a check that every leaf has a sharding on it."""

from typing import Any

import jax
from jax.sharding import NamedSharding

from .._tree import is_abstract, leaves_by_path, name_of
from .._types import PyTree


def mesh_of_leaves(*trees: PyTree) -> Any:
    """Returns the mesh of the first leaf that is sharded over one, or None."""
    found = (getattr(x, "sharding", None) for x in jax.tree.leaves(trees))
    return next((s.mesh for s in found if isinstance(s, NamedSharding)), None)


def check_places(mesh: Any, base: PyTree, adapter: PyTree, args: Any) -> None:
    """Raises if a shape has no sharding: it would be counted whole on every device."""
    if mesh is None or mesh.size == 1:
        return
    trees = {"base": (base, OF_BASE), "args": (tuple(args), "")}
    if mesh_of_leaves(adapter) is not None or not jax.tree.leaves(base):
        trees["adapter"] = adapter, OF_ADAPTER
    for name, (tree, remedy) in trees.items():
        leaves = leaves_by_path(tree)
        bare = [name_of(path) for path, x in leaves if any(map(_is_bare, jax.tree.leaves(x)))]
        if bare:
            axes = " × ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
            raise ValueError(
                f"`{name}` has shapes without `sharding`, on a mesh of {axes}, at {len(bare)} of "
                f"{len(leaves)} paths: {', '.join(bare[:3])}{', …' if len(bare) > 3 else ''}. "
                f"{remedy}A leaf takes one as jax.ShapeDtypeStruct(shape, dtype, "
                "sharding=NamedSharding(mesh, spec)); with PartitionSpec() every device holds all "
                "of it."
            )


OF_BASE = (
    "jax.eval_shape drops shardings along automatic mesh axes: in the place of the `base` that it "
    "returns, give the parameters that `init` was given. "
)
OF_ADAPTER = "jlora.sharding.specs(base, adapter) has those of an adapter. "


def _is_bare(x: Any) -> bool:
    return is_abstract(x) and x.sharding is None and x.ndim > 0


def is_replicated(devices: int, base: PyTree) -> bool:
    """Whether each of several devices holds all of `base`, whose leaves all have shardings."""
    leaves = [x for x in jax.tree.leaves(base) if x.ndim]
    return devices > 1 and bool(leaves) and all(x.sharding.is_fully_replicated for x in leaves)
