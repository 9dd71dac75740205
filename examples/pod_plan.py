"""What a step of `pod.py` needs on a slice that is not there: bytes, collectives, operations.

    python examples/pod.py plan --shape 175b --topology v5p:4x4x8 --mesh 16,8
    python examples/pod.py plan --shape 175b --smallest v5p

Five steps are compiled: with the weights frozen and only the norms' scales trained, which is the
floor; LoRA on queries and values; LoRA on all dense layers; the same with the frozen layers in
NF4; full fine-tuning with Adam's moments in float32. For TPUs that takes `pip install -e
".[tpu]"` and no TPU. For H100s, `--topology cuda:1x1x8` (slices, hosts, devices of a host), it
takes `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt` in JAX's version and no GPU.
"""

import argparse
import importlib.util
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import tables
from collectives import collectives, summary
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh
from progress import progress

import jlora

METHODS = {
    "floor": "frozen, norms trained",
    "qv": "LoRA, query and value",
    "all": "LoRA, all dense layers",
    "nf4": "the same on NF4",
    "full": "full fine-tuning",
}
PARTS = ("base", "adapter", "moments", "gradients", "activations")
# Slices from small to large.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
# The module that compiles, and what to install.
COMPILERS = {
    "tpu": ("libtpu", "-e '.[tpu]'"),
    "cuda": ("jax_cuda12_plugin", "--no-deps jax-cuda12-plugin jax-cuda12-pjrt, of JAX's version"),
}
H100 = pathlib.Path(__file__).with_name("h100.txtpb")
# So that libtpu neither asks a metadata server nor writes logs nor claims the host's TPUs, and the
# compiler for GPUs looks for no libraries that only their programs need.
QUIET = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}

Job = Callable[[str, Mesh], tuple[Any, ...]]  # (method, mesh) to `jlora.plan`'s arguments

# ---- one step -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a step of a method needs on each device of a topology.

    Attributes:
        flops: of the products in a step, over the number of devices.
        collectives: by kind, how often it runs in a step and the bytes of its results; None where
            the step does not fit, so that there is no program.
    """

    method: str
    topology: str
    plan: jlora.types.Plan
    flops: float
    collectives: Mapping[str, tuple[int, int]] | None


def measure(
    method: str,
    topology: str,
    axes: tuple[int, int],
    job: Job,
    names: Any,
    options: dict[str, Any] | None = None,
) -> Row:
    """Compiles a step for a topology, with jlora's options for the compiler and others.

    `names` are the rules for the model's logical axes.
    """
    mesh = mesh_of(topology, axes)
    loss, base, adapter, args, tx = job(method, mesh)
    platform = "cuda" if topology.startswith("cuda") else "tpu"
    options = jlora.compiler_options(platform) | (options or {})
    with jax.set_mesh(mesh), nn.logical_axis_rules(names):
        plan = jlora.plan(loss, base, adapter, args, tx, compiler_options=options)
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(adapter, base, *args)
    found = summary(collectives(plan.program.as_text())) if plan.program else None
    return Row(method, topology, plan._replace(program=None), flops(jaxpr) / mesh.size, found)


def mesh_of(topology: str, axes: tuple[int, int]) -> Mesh:
    """A mesh of devices that are not there, for their compiler.

    Raises:
        ModuleNotFoundError: without that compiler.
        ValueError: if `axes` has not the topology's number of devices.
    """
    found = devices_of(topology)
    if len(found) != math.prod(axes):
        raise ValueError(
            f"`--mesh` must have the {len(found)} devices of {topology}; got "
            f"{' × '.join(map(str, axes))} = {math.prod(axes)}."
        )
    if topology.startswith("cuda"):
        devices = np.array(found).reshape(axes)
    else:
        devices = mesh_utils.create_device_mesh(axes, found, allow_split_physical_axes=True)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def devices_of(topology: str) -> list[Any]:
    """Devices that are not there, `v5p:4x4x8` or `cuda:1x1x8`.

    Raises:
        ModuleNotFoundError: without their compiler.
    """
    os.environ.update(QUIET | dict(os.environ))
    platform, _, shape = topology.partition(":")
    module, install = COMPILERS["cuda" if platform == "cuda" else "tpu"]
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"`--topology {topology}` needs {module}: pip install {install}")
    if platform == "cuda":
        found = topologies.get_topology_desc(
            "h100", platform="cuda", target_config=H100.read_text(), topology=shape
        )
    else:
        found = topologies.get_topology_desc(topology, platform="tpu")
    return found.devices


def flops(jaxpr: Any) -> float:
    """Operations of the matrix products in a jaxpr, those of a loop's body times its length."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            [x, _], [out] = eqn.invars, eqn.outvars
            contracted = eqn.params["dimension_numbers"][0][0]
            total += 2.0 * out.aval.size * math.prod(x.aval.shape[d] for d in contracted)
        inner = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += times * sum(flops(p) for p in inner if hasattr(p, "eqns"))
    return total


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with moments and arithmetic in float32, whatever the parameters' dtype."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(np.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(wide(updates), state, wide(params))

    return optax.GradientTransformation(lambda params: tx.init(wide(params)), update)


# ---- reports ------------------------------------------------------------------------------------


def run(args: argparse.Namespace, job: Job, names: Any) -> None:
    """Measures, prints a table, and writes it to `args.out`."""
    methods = args.methods or list(METHODS)
    if args.smallest:
        rows = smallest(args.smallest, methods, job, names)
    else:
        bar = progress(methods)
        rows = [measure(method, args.topology, args.mesh, job, names) for method in bar]
    print(table(rows))
    folder = pathlib.Path(args.out) / "plan"
    path = folder / f"{args.shape}-{(args.smallest or args.topology).replace(':', '-')}.csv"
    tables.write(path, [cells(row) for row in rows])
    print(f"also {path}")


def smallest(chip: str, methods: Sequence[str], job: Job, names: Any) -> list[Row]:
    """For each method the steps on slices of a chip from small to large, to the first that fits."""
    rows = []
    for method in progress(methods):
        for shape in SLICES[chip]:
            devices = math.prod(map(int, shape.split("x")))
            tensor = min(8, devices)
            axes = devices // tensor, tensor
            rows.append(measure(method, f"{chip}:{shape}", axes, job, names))
            if rows[-1].plan.fits:
                break
    return rows


def cells(row: Row) -> dict[str, Any]:
    """A row as numbers, bytes in GB (10^9)."""
    plan, found = row.plan, row.collectives or {}
    count, size = found.get("total", (None, None))
    return {
        "step": METHODS[row.method],
        "topology": row.topology,
        "mesh": "×".join(map(str, plan.mesh.values())),
        **{part: round(getattr(plan, part) / 1e9, 3) for part in PARTS},
        "peak": round(plan.peak / 1e9, 2),
        "fits": {True: "yes", False: "no", None: "?"}[plan.fits],
        "TFLOPs": round(row.flops / 1e12, 1),
        "collectives": count,
        "their GB": None if size is None else round(size / 1e9, 2),
        "all-reduce GB": None
        if size is None
        else round(found.get("all-reduce", (0, 0))[1] / 1e9, 2),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows under their names, GB and TFLOPs a device."""
    lines = [list(map(str, cells(rows[0]))), *(list(map(str, cells(row).values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(["a device, in GB and TFLOPs:", *padded])
