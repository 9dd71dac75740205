"""The mesh of a plan, on which each leaf needs a sharding, and meshes of absent TPU slices."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, NamedSharding

from .._arrays import AnyMesh
from .._compat import Jaxpr, equations
from .._errors import InputError, list_few
from .._tree import is_abstract, leaves_by_path, name_of
from .._types import PyTree


def mesh_of_leaves(*trees: PyTree) -> Any:
    """Returns the mesh of the first leaf that is sharded over one, or None."""
    found = (getattr(x, "sharding", None) for x in jax.tree.leaves(trees))
    return next((s.mesh for s in found if isinstance(s, NamedSharding)), None)


def check_places(mesh: AnyMesh | None, base: PyTree, adapter: PyTree, args: Sequence[Any]) -> None:
    """Raises if a shape has no sharding, because every device would count all of it."""
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
            raise InputError(
                name,
                f"has shapes without `sharding`, on a mesh of {axes}, at {len(bare)} of "
                f"{len(leaves)} paths: {list_few(bare, 3)}. "
                f"{remedy}Write a leaf as jax.ShapeDtypeStruct(shape, dtype, "
                "sharding=NamedSharding(mesh, spec)); with PartitionSpec() every device holds all "
                "of it.",
            )


OF_BASE = (
    "Give the parameters that you gave to `init`, not the `base` that jax.eval_shape returns: "
    "jax.eval_shape drops shardings along automatic mesh axes. "
)
OF_ADAPTER = "jlora.sharding.specs(base, adapter) returns the shardings of an adapter. "


def _is_bare(x: object) -> bool:
    return is_abstract(x) and x.sharding is None and x.ndim > 0


def is_replicated(devices: int, base: PyTree) -> bool:
    """Whether each of several devices holds all of `base`; all its leaves have shardings."""
    leaves = [x for x in jax.tree.leaves(base) if x.ndim]
    return devices > 1 and bool(leaves) and all(x.sharding.is_fully_replicated for x in leaves)


def is_unconstrained(mesh: AnyMesh | None, jaxpr: Jaxpr, *weights: PyTree) -> bool:
    """Whether XLA alone decides how all activations of a program are sharded over a mesh.

    A constraint on what has the shape of a weight, or of a layer of a stack, is one of the weight.
    """
    if mesh is None or mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
        return False
    own = {shape for x in jax.tree.leaves(weights) for shape in (x.shape, x.shape[1:])}
    return not any(
        eqn.primitive.name == "shard_map"
        or (
            eqn.primitive.name == "sharding_constraint"
            and getattr(eqn.outvars[0].aval, "shape", None) not in own
        )
        for outer in jaxpr.eqns
        for eqn in equations(outer)
    )


# --------------------------------------------------------------------------- slices that are absent


class Chip(NamedTuple):
    """A kind of TPU.

    Attributes:
        kind: JAX's name for its devices.
        capacity: bytes of a device that a program may use, as its compiler reports them.
        devices: number of JAX's devices on a chip.
        config: `chip_config_name` for `get_topology_desc`, if it needs one.
    """

    kind: str
    capacity: int
    devices: int = 1
    config: str | None = None


def _gib(n: float) -> int:
    return int(n * 2**30)


CHIPS = {
    "v4": Chip("TPU v4", _gib(30.75), config="megacore"),
    "v5e": Chip("TPU v5 lite", _gib(15.75)),
    "v5p": Chip("TPU v5", _gib(95.73)),
    "v6e": Chip("TPU v6 lite", _gib(31.24)),
    "tpu7x": Chip("TPU7x", _gib(94.74), devices=2),
}
# These keep libtpu from asking a metadata server, writing logs and claiming the host's TPUs.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def parse_topology(name: str) -> tuple[Chip, int]:
    """Returns the chip and the number of devices of a topology such as `v5p:4x4x8`."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found[1] not in CHIPS:
        raise InputError(
            "topology",
            f"must be a chip and the shape of the slice, such as v5p:4x4x8. The chip is "
            f"one of {', '.join(CHIPS)}; got {name!r}.",
        )
    chip = CHIPS[found[1]]
    return chip, math.prod(map(int, found[2].split("x"))) * chip.devices


def mesh_of(name: str, axes: dict[str, int]) -> AnyMesh:
    """Makes the mesh of a topology's devices, or an abstract one if libtpu is not installed."""
    chip, count = parse_topology(name)
    if math.prod(axes.values()) != count:
        raise InputError(
            "mesh",
            f"must have the {count} devices of {name}; got "
            f"{' × '.join(f'{k}={v}' for k, v in axes.items())} = {math.prod(axes.values())}.",
        )
    shape = tuple(axes.values())
    types = (AxisType.Auto,) * len(axes)
    if not has_compiler():
        return jax.sharding.AbstractMesh(shape, tuple(axes), types)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    config = {} if chip.config is None else {"chip_config_name": chip.config}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **config)
    devices = mesh_utils.create_device_mesh(shape, topology.devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(devices, tuple(axes), types)


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None
