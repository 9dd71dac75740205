"""How a weight is sharded: W, or its codes and scales, and the factors of its change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .._arrays import AnyMesh, count_pieces, mesh_axes
from ._axes import Axis, Factor, Unfactorable, map_factors
from ._packed import Packed, shard_part
from ._weight import Operand, Weight


def constrain(w: Weight, sharding: Sharding) -> Weight:
    """Constrains W, or its codes and scales, to `sharding`."""
    if not isinstance(w.w, Packed):
        return w.each(lambda x: lax.with_sharding_constraint(x, sharding))
    if not isinstance(sharding, NamedSharding):
        return w
    return w.replace(map_factors(lambda f: shard_part(f, sharding, w.axes), w.w))


def move(x: Operand, to: Any) -> Operand:
    """Moves an array, or all arrays of a weight, as `jax.device_put` does.

    A sharding is for W, or for its codes and scales. A and B keep theirs, in the same memory.
    """
    if not isinstance(x, Weight) or not isinstance(to, NamedSharding):
        return jax.device_put(x, to)
    w = map_factors(lambda f: shard_part(f, to, x.axes, jax.device_put), x.w)
    memory = jax.typeof(jax.tree.leaves(w)[0]).memory_space
    return x.replace(w, jax.device_put(x.change, memory))


def specs(w: Weight, spec: PartitionSpec) -> Weight:
    """Replaces each array by its PartitionSpec, for a W with the PartitionSpec `spec`."""
    by_axis = dict(zip(w.axes, spec, strict=False))
    return map_factors(lambda f: f.specs(by_axis), w)


def place(w: Weight, mesh: AnyMesh, spec: PartitionSpec) -> Weight:
    """Reshards each array to `mesh`, for a W with the PartitionSpec `spec`."""

    def reshard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(reshard, w, specs(w, spec))


def pieces(w: Weight, spec: PartitionSpec, mesh: AnyMesh) -> dict[Axis, int]:
    """Counts the pieces into which a PartitionSpec splits each axis of W that it names."""
    entries = zip(w.axes, spec, strict=False)
    return {a: count_pieces(e, mesh) for a, e in entries if mesh_axes(e)}


def shard_of(
    w: Weight, spec: PartitionSpec, unchecked: frozenset[Any], shape: Sequence[int]
) -> Weight:
    """Makes the shard of shape `shape`; JAX does not check what varies over `unchecked` axes."""
    by_axis = dict(zip(w.axes, spec, strict=False))

    def mark(f: Factor) -> Factor:
        names = {n for a in f.axes for n in mesh_axes(by_axis.get(a))}
        return f.may_vary(names & unchecked)

    for d in w.change.deltas:
        apart = {*d.a.axes} ^ {*d.b.axes}
        if not d.is_matrix and (unchecked or any(map(by_axis.get, apart))):
            raise Unfactorable(
                "its statistics are of whole matrices, of which a device may have shards"
            )
    origin = dataclasses.replace(w.origin, unchecked=w.origin.unchecked | unchecked)
    shard = w.replace(w.w.with_axes(w.axes, shape), map_factors(mark, w.change))
    return dataclasses.replace(shard, origin=origin)
