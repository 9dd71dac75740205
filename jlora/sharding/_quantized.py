"""How a quantized weight is sharded: its codes and scales like the weight itself."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from .._core import mesh_axes
from .._quantized import Quantized, is_quantized, spell
from .._tree import leaves_by_path, name_of
from .._types import PyTree
from ._places import Place

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Misfit(Exception):  # noqa: N818 - collected into one ValueError
    """A partition cannot be that of its weight."""


def devices(entry: Any, mesh: Mesh) -> int:
    """Returns the number of devices over which an entry of a PartitionSpec divides an axis."""
    return math.prod(mesh.shape[name] for name in mesh_axes(entry))


def gathered(base: PyTree, specs: PyTree) -> PyTree:
    """Returns a base whose quantized weights are resharded as codes, before they are unpacked.

    Where FSDP shards weights that each device needs whole, XLA would unpack the shards first and
    all-gather the result: four times the bytes. Within `jax.jit` nothing tells which axes of the
    mesh these are, so name them inside the loss function:

        base = sharding.gathered(base, sharding.replicated(specs, "fsdp"))

    Args:
        base: the frozen tree.
        specs: a tree with the paths of `base`: for each quantized weight a PartitionSpec, along the
            axes of `jax.set_mesh`, or a NamedSharding. Other leaves are ignored.

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
            f"{', '.join(missing)}. Give the partition of each."
        )
    found = [
        dataclasses.replace(x, used=places[path]) if is_quantized(x) else x for path, x in leaves
    ]
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_quantized), found)


def describe(entry: Any, mesh: Mesh) -> str:
    """Names the axes of the mesh over which an entry divides an axis, with their sizes."""
    return " × ".join(f"{name}={mesh.shape[name]}" for name in mesh_axes(entry))


def check_blocks(entries: Mapping[int, Any], leaf: Quantized, mesh: Mesh) -> None:
    """Raises `Misfit` if a device would get a part of a block."""
    form, name = leaf.form, spell(leaf.scheme)
    for d, entry in entries.items():
        n = devices(entry, mesh)
        if n == 1 or d in form.stack:
            continue
        over = describe(entry, mesh)
        length = leaf.shape[d]
        if form.flat:
            raise Misfit(
                f"axis {d} of length {length} is divided over {over}, but blocks of {name} run "
                "over the ends of its rows; quantize it with a block that divides its inputs"
            )
        # Of 4 bits, a block has two codes a byte from end to end.
        whole = form.is_whole(d) and not (leaf.scheme.bits == 4 and d == form.axis)
        if not whole and (length // n) % form.blocks[d]:
            fits = [b for b in leaf.scheme.legal if (length // n) % b == 0]
            raise Misfit(
                f"axis {d} of length {length} over {over} gives each device {length // n}, which "
                f"is no multiple of the block {form.blocks[d]} of {name}; "
                + (f"blocks of {', '.join(map(str, fits))} would fit" if fits else "none would fit")
            )
