"""How a base is sharded: from arrays, shardings, PartitionSpecs or Flax's metadata."""

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
    """Stands for a leaf of the base whose sharding is unknown, and says why."""

    def __init__(self, leaf: Any, why: str = "") -> None:
        self.got = type(leaf).__name__ + (f" {leaf!r}" if isinstance(leaf, str) else why)


def places_of(base: PyTree) -> dict[Path, Any]:
    """Returns a PartitionSpec, a sharding or an `Unknown` by path."""

    def is_leaf(x: Any) -> bool:
        return x is None or is_node(x) or is_quantized(x) or _is_annotated(x)

    check_base(base)
    leaves, structure = jax.tree.flatten(base, is_leaf=is_leaf)
    own = [_place(x) for x in leaves]
    has_metadata, rest = any(map(_is_annotated, leaves)), everywhere(own)

    def place(x: Any, found: Any) -> Any:
        # As Flax takes it: beside leaves with metadata, those without are replicated.
        is_bare = has_metadata and not _is_annotated(x) and hasattr(x, "shape")
        return rest if x is None or (is_bare and not isinstance(found, NamedSharding)) else found

    tree = jax.tree.unflatten(structure, map(place, leaves, own))
    return dict(leaves_by_path(tree, lambda x: isinstance(x, Place | Unknown)))


def everywhere(places: list[Any]) -> Place:
    """Returns the replicated place, on the mesh of `places` if they have one."""
    on_mesh = (with_spec(x, PartitionSpec()) for x in places if isinstance(x, NamedSharding))
    return next(on_mesh, PartitionSpec())


def _is_annotated(x: Any) -> bool:
    """Whether `x` is a leaf with metadata: a box of linen, or a variable of NNX that has some."""
    is_box = hasattr(x, "get_partition_spec")
    return is_box or (_is_variable(x) and bool(x.get_metadata().get("out_sharding")))


def _is_variable(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # without it there are no variables
    return nnx is not None and isinstance(x, nnx.Variable)


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
    by_axis = dict(zip(x.form.coded, spec, strict=False))
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
    """Returns `spec` in the form of `place`: a spec, or a sharding of its mesh and memory."""
    if not isinstance(place, NamedSharding):
        return spec if isinstance(place, PartitionSpec) else place
    return NamedSharding(place.mesh, spec, memory_kind=place.memory_kind)
