"""How the leaves of a base are sharded, from arrays, shardings, specs or Flax's metadata."""

import sys
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from .._adapters import is_node
from .._compat import is_concrete
from .._quantized import Quantized, is_quantized
from .._tree import check_base, leaves_by_path
from .._types import Path, PyTree

Place = PartitionSpec | Sharding


class Unknown:
    """A leaf of the base whose sharding is unknown, and why."""

    def __init__(self, leaf: Any, why: str = "") -> None:
        self.got = type(leaf).__name__ + (f" {leaf!r}" if isinstance(leaf, str) else why)


def places_of(base: PyTree) -> dict[Path, Any]:
    """A PartitionSpec, a sharding or an `Unknown` by path."""

    def is_leaf(x: Any) -> bool:
        return x is None or is_node(x) or is_quantized(x) or _is_annotated(x)

    check_base(base)
    leaves = jax.tree.leaves(base, is_leaf=is_leaf)
    # As Flax takes it: beside leaves with metadata, those without are replicated.
    annotated = any(map(_is_annotated, leaves))
    own = [_place(x) for x in leaves]
    rest = everywhere(own)

    def place(x: Any) -> Any:
        found = _place(x)
        bare = annotated and hasattr(x, "shape") and not isinstance(found, NamedSharding)
        return rest if x is None or (bare and not _is_annotated(x)) else found

    return dict(leaves_by_path(jax.tree.map(place, base, is_leaf=is_leaf), _is_place))


def everywhere(places: list[Any]) -> Place:
    """The replicated place, on the mesh of `places` if they have one."""
    return next((with_spec(p, PartitionSpec()) for p in places if _is_named(p)), PartitionSpec())


def _is_named(x: Any) -> bool:
    return isinstance(x, NamedSharding)


def _is_place(x: Any) -> bool:
    return isinstance(x, Place | Unknown)


def _is_annotated(x: Any) -> bool:
    """Whether `x` is a leaf with metadata: a box of linen, or a variable of NNX that has some."""
    return hasattr(x, "get_partition_spec") or (_is_variable(x) and bool(_metadata(x)))


def _is_variable(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # without it there are no variables
    return nnx is not None and isinstance(x, nnx.Variable)


def _metadata(variable: Any) -> Any:
    return variable.get_metadata().get("out_sharding")


def _place(x: Any) -> Any:
    if isinstance(x, Place):
        return x
    if is_quantized(x):
        return _of_quantized(x)
    if _is_annotated(x):
        return _of_annotated(x)
    if isinstance(x, jax.Array) and not is_concrete(x):
        return _of_tracer(x)
    found = getattr(x, "sharding", None)
    return found if isinstance(found, Sharding) else Unknown(x, " without a sharding")


def _of_quantized(x: Quantized) -> Any:
    found = _place(x.data)
    if not isinstance(found, PartitionSpec | NamedSharding):
        return found
    spec = found if isinstance(found, PartitionSpec) else found.spec
    by_axis = dict(zip(x.axes()["data"], spec, strict=False))
    return with_spec(found, PartitionSpec(*(by_axis.get(d) for d in range(x.ndim))))


def _of_annotated(x: Any) -> Any:
    value = x.get_raw_value() if _is_variable(x) else x.value
    own = _place(value) if value is not None else None
    if isinstance(own, NamedSharding | PartitionSpec):
        return own
    if not _is_variable(x):
        return x.get_partition_spec()
    return sys.modules["flax.nnx"].get_partition_spec(x).get_raw_value()


def _of_tracer(x: Any) -> Any:
    found = jax.typeof(x).sharding
    if AxisType.Explicit in found.mesh.axis_types:
        return found
    return Unknown(x, " whose mesh axes are not explicit, so that its sharding is unknown in jit")


def with_spec(place: Place, spec: PartitionSpec) -> Place:
    """`spec` in the form of `place`: a spec, or a sharding of the same mesh and memory."""
    if not isinstance(place, NamedSharding):
        return spec if isinstance(place, PartitionSpec) else place
    return NamedSharding(place.mesh, spec, memory_kind=place.memory_kind)
