"""How a weight is sharded: W, or its codes and scales, and the factors of its change."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from .._arrays import AnyMesh, count_pieces, mesh_axes
from ._axes import Axis, Factor, Unfactorable, map_factors
from ._packed import Packed, place_of_part
from ._weight import Operand, Weight


def constrain(x: Operand, sharding: object) -> Operand:
    """Constrains an array, W, or its codes and scales to `sharding`, if this is one."""
    if not isinstance(sharding, Sharding):
        return x
    if not isinstance(x, Weight):
        return lax.with_sharding_constraint(x, sharding)
    if not isinstance(x.w, Packed):
        return x.each(lambda v: lax.with_sharding_constraint(v, sharding))
    is_named = isinstance(sharding, NamedSharding)
    return _shard(x, sharding, lax.with_sharding_constraint) if is_named else x


def _shard(w: Weight, to: NamedSharding, put: Callable[..., jax.Array]) -> Weight:
    """Applies `put` to W, or to its codes and scales, and where they are with a W that is `to`."""
    each = lambda f: f.each(lambda x: put(x, place_of_part(f, to, w.axes)))  # noqa: E731
    return w.replace(map_factors(each, w.w))


def move(x: Operand, to: Any) -> Operand:
    """Moves an array, or all arrays of a weight, as `jax.device_put` does.

    A sharding is for W, or for its codes and scales. A and B keep theirs, in the same memory.
    """
    if not isinstance(x, Weight) or not isinstance(to, NamedSharding):
        return jax.device_put(x, to)
    w = _shard(x, to, jax.device_put)
    memory = jax.typeof(jax.tree.leaves(w.w)[0]).memory_space
    return w.replace(w.w, jax.device_put(w.change, memory))


def specs(w: Weight, spec: PartitionSpec) -> Weight:
    """Replaces each array by its PartitionSpec, for a W with the PartitionSpec `spec`."""
    by_axis = dict(zip(w.axes, spec, strict=False))
    return map_factors(lambda f: f.specs(by_axis), w)


def place(w: Weight, mesh: AnyMesh, spec: PartitionSpec) -> Weight:
    """Reshards each array to `mesh`, for a W with the PartitionSpec `spec`."""
    places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs(w, spec))
    return jax.sharding.reshard(w, places)


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
