"""Meshes of TPU slices that are not there."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType

Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


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
# With these libtpu asks no metadata server, writes no logs and does not claim the host's TPUs.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def parse(name: str) -> tuple[Chip, int]:
    """Returns the chip and the number of devices of a topology such as `v5p:4x4x8`."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None or found[1] not in CHIPS:
        raise ValueError(
            f"`topology` must be a chip and the slice's shape, such as v5p:4x4x8, with one of "
            f"{', '.join(CHIPS)}; got {name!r}."
        )
    chip = CHIPS[found[1]]
    return chip, math.prod(map(int, found[2].split("x"))) * chip.devices


def mesh_of(name: str, axes: dict[str, int]) -> Mesh:
    """Makes a mesh of the topology's devices, or an abstract one if libtpu is not installed."""
    chip, count = parse(name)
    if math.prod(axes.values()) != count:
        raise ValueError(
            f"`mesh` must have the {count} devices of {name}; got "
            f"{' × '.join(f'{k}={v}' for k, v in axes.items())} = {math.prod(axes.values())}."
        )
    shape, types = tuple(axes.values()), (AxisType.Auto,) * len(axes)
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
