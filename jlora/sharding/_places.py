"""How a base is sharded, read from arrays, shardings, specs or Flax's metadata."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from .._adapters import is_node
from .._arrays import AnyMesh, count_pieces, mesh_axes
from .._compat import is_concrete
from .._quantized import Quantized, is_quantized, spell
from .._tree import check_base, leaves_by_path, name_of
from .._types import Path, PyTree

Place = PartitionSpec | Sharding


class Unknown:
    """A leaf of the base whose sharding is unknown, with the reason."""

    def __init__(self, leaf: object, why: str = "") -> None:
        self.got = type(leaf).__name__ + (f" {leaf!r}" if isinstance(leaf, str) else why)


def places_of(base: PyTree) -> dict[Path, Any]:
    """Returns the PartitionSpec or the sharding of each leaf by path, or an `Unknown`."""

    def is_leaf(x: object) -> bool:
        return x is None or is_node(x) or is_quantized(x) or _is_annotated(x)

    check_base(base)
    leaves, structure = jax.tree.flatten(base, is_leaf=is_leaf)
    own = [_place(x) for x in leaves]
    has_metadata = any(map(_is_annotated, leaves))
    rest = everywhere(own)

    def place(x: object, found: Place | Unknown) -> Place | Unknown:
        # As in Flax: beside leaves with metadata, leaves without it are replicated.
        is_bare = has_metadata and not _is_annotated(x) and hasattr(x, "shape")
        return rest if x is None or (is_bare and not isinstance(found, NamedSharding)) else found

    tree = jax.tree.unflatten(structure, map(place, leaves, own))
    return dict(leaves_by_path(tree, lambda x: isinstance(x, Place | Unknown)))


def everywhere(places: list[Any]) -> Place:
    """Returns a replicated place, on the mesh of `places` if they have one."""
    on_mesh = (with_spec(x, PartitionSpec()) for x in places if isinstance(x, NamedSharding))
    return next(on_mesh, PartitionSpec())


def _is_annotated(x: object) -> bool:
    """Whether `x` is a leaf with metadata: a box of linen, or a variable of NNX that has it."""
    is_box = hasattr(x, "get_partition_spec")
    return is_box or (_is_variable(x) and bool(x.get_metadata().get("out_sharding")))


def _is_variable(x: object) -> TypeGuard[Any]:
    nnx = sys.modules.get("flax.nnx")  # if it is not imported, there are no variables
    return nnx is not None and isinstance(x, nnx.Variable)


def _place(x: object) -> Any:
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


def _of_tracer(x: jax.Array) -> Any:
    found = jax.typeof(x).sharding
    if AxisType.Explicit in found.mesh.axis_types:
        return found
    return Unknown(x, " whose mesh axes are not explicit, so its sharding is unknown in jit")


def with_spec(place: Place, spec: PartitionSpec) -> Place:
    """Returns `spec` in the form of `place`: a spec, or a sharding with its mesh and memory."""
    if not isinstance(place, NamedSharding):
        return spec if isinstance(place, PartitionSpec) else place
    return NamedSharding(place.mesh, spec, memory_kind=place.memory_kind)


def in_device_memory(place: Place) -> Place:
    """Returns the same place, but in the memory of the devices: W may be in that of the host."""
    if isinstance(place, PartitionSpec) or place.memory_kind in (None, "device"):
        return place
    return place.with_memory_kind("device")


# -------------------------------------------------------------------------------- quantized weights


class Misfit(Exception):  # noqa: N818 - collected into one ValueError
    """A weight cannot have this sharding."""


def gathered(base: PyTree, specs: PyTree) -> PyTree:
    """Returns a base whose quantized weights are all-gathered as codes, before dequantization.

    Use it if FSDP shards quantized weights that each device needs whole: otherwise XLA dequantizes
    the shards first and all-gathers their values, in bfloat16 four times the bytes of 4-bit codes.
    Within `jax.jit` jlora cannot know the
    FSDP axes of the mesh, so name them inside the loss function:

        base = sharding.gathered(base, sharding.replicated(specs, "fsdp"))

    Args:
        base: the frozen tree.
        specs: a tree with the paths of `base` that has, for each quantized weight, the sharding in
            which the model uses it: a NamedSharding, or a PartitionSpec for the mesh of
            `jax.set_mesh`. Other leaves are ignored.

    Returns:
        A tree of the same arrays.

    Raises:
        ValueError: if `specs` lacks a quantized weight.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jax.sharding import PartitionSpec as P
        >>> from jlora import sharding
        >>> base, specs = {"w": jnp.ones((128, 64))}, {"w": P("fsdp", "tensor")}
        >>> base = jlora.quantize(base, jlora.NF4("w"))
        >>> sharding.gathered(base, sharding.replicated(specs, "fsdp"))["w"].used
        P(None, 'tensor')
    """
    places = dict(leaves_by_path(specs, lambda x: isinstance(x, Place)))
    leaves = leaves_by_path(base)
    missing = [name_of(path) for path, x in leaves if is_quantized(x) and path not in places]
    if missing:
        raise ValueError(
            f"`specs` of gathered lacks {len(missing)} quantized weights of `base`: "
            f"{', '.join(missing)}. Give the sharding of each."
        )
    found = [
        dataclasses.replace(x, used=places[path]) if is_quantized(x) else x for path, x in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_quantized), found)


def describe(entry: object, mesh: AnyMesh) -> str:
    """Returns the mesh axes of an entry of a PartitionSpec, with their sizes, as text."""
    return " × ".join(f"{name}={mesh.shape[name]}" for name in mesh_axes(entry))


def check_blocks(entries: Mapping[int, Any], leaf: Quantized, mesh: AnyMesh) -> None:
    """Raises `Misfit` if a device would get only a part of a block."""
    form = leaf.form
    name = spell(leaf.scheme)
    for d, entry in entries.items():
        n = count_pieces(entry, mesh)
        if n == 1 or d in form.stack:
            continue
        over = describe(entry, mesh)
        length = leaf.shape[d]
        if form.flat:
            raise Misfit(
                f"axis {d} of length {length} is divided over {over}, but blocks of {name} cross "
                "the ends of its rows; quantize it with a block that divides its inputs"
            )
        # In 4 bits, each byte has a code of the first half of a block and one of the second.
        whole = form.is_whole(d) and not (leaf.scheme.bits == 4 and d == form.axis)
        if not whole and (length // n) % form.blocks[d]:
            fits = [b for b in leaf.scheme.legal if (length // n) % b == 0]
            raise Misfit(
                f"axis {d} of length {length} over {over} gives each device {length // n}, which "
                f"is not a multiple of the block {form.blocks[d]} of {name}; "
                + (f"blocks of {', '.join(map(str, fits))} would fit" if fits else "none would fit")
            )
