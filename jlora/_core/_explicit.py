"""How results are sharded along explicit mesh axes, where JAX wants this stated."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit(x: Any) -> NamedSharding | None:
    """The sharding of an array or its type along explicit mesh axes, where the mesh has any."""
    aval = jax.typeof(x) if isinstance(x, jax.Array) else x
    found = getattr(aval, "sharding", None)
    if not isinstance(found, NamedSharding) or AxisType.Explicit not in found.mesh.axis_types:
        return None
    return found


def join_shardings(
    x: Sequence[Hashable],
    y: Sequence[Hashable],
    out: Sequence[Hashable],
    of_x: NamedSharding | None,
    of_y: NamedSharding | None,
) -> NamedSharding | None:
    """Shards each axis of `out` as in x, or else as in y, and uses no mesh axis twice."""
    known = of_x or of_y
    if known is None:
        return None
    entries: dict[Hashable, Any] = {}
    for axes, sharding in ((y, of_y), (x, of_x)):
        parts = sharding.spec if sharding else [None] * len(axes)
        entries |= {a: e for a, e in zip(axes, parts, strict=True) if e is not None}
    used: set[Any] = set()
    found: dict[Hashable, Any] = {}
    for a in sorted(out, key=lambda a: a not in x):
        names = set(mesh_axes(entries.get(a)))
        found[a] = None if names & used else entries.get(a)
        used |= names
    return NamedSharding(known.mesh, PartitionSpec(*(found[a] for a in out)))


def mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes of an entry of a partition."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
