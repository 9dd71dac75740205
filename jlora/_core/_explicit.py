"""Where results lie along explicit mesh axes, on which JAX has them stated."""

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


def renamed(sharding: NamedSharding, old: str, new: str) -> NamedSharding:
    """The same for an array whose axes `old` are in the order `new`."""
    entries = dict(zip(old, sharding.spec, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*(entries[c] for c in new)))


def joint(
    x: str, y: str, out: str, of_x: NamedSharding | None, of_y: NamedSharding | None
) -> NamedSharding | None:
    """Each axis of `out` as in x, or else as in y, and no mesh axis twice."""
    known = of_x or of_y
    if known is None:
        return None
    entries: dict[str, Any] = {}
    for axes, sharding in ((y, of_y), (x, of_x)):
        parts = sharding.spec if sharding else [None] * len(axes)
        entries |= {c: e for c, e in zip(axes, parts, strict=True) if e is not None}
    used: set[Any] = set()
    parts = []
    for c in sorted(out, key=lambda c: c not in x):
        names = entries.get(c)
        each = set(names) if isinstance(names, tuple) else {names} - {None}
        parts.append(None if each & used else names)
        used |= each
    order = sorted(out, key=lambda c: c not in x)
    return renamed(NamedSharding(known.mesh, PartitionSpec(*parts)), "".join(order), out)


def mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes of an entry of a partition."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
