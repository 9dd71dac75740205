"""What LoRA costs on this device: a training step beside a frozen and a full one.

    python examples/costs.py                # times; half a minute on two cores
    python examples/costs.py --aot v5e:2x2  # counts, for a TPU slice that is not there; minutes

The model is a Llama with random weights; LoRA is on all linear layers. Prints a table, and a line
of JSON to report. With `--aot` nothing runs: it counts operations, bytes and memory of the compiled
steps on each device, which needs `pip install -e ".[tpu]"`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pod_plan
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from progress import progress

import jlora

HEAD, VOCABULARY, SECONDS, ROUNDS = 64, 32_000, 90, 30  # rounds end after either
STEPS = "frozen", "LoRA", "full"
Row = dict[str, float | None]
RAW = argparse.RawDescriptionHelpFormatter


class Sizes(NamedTuple):
    """The sizes of the model and of its batch."""

    dim: int
    layers: int
    batch: int
    length: int
    dtype: Any


ON_CPU = Sizes(256, 4, 4, 128, jnp.float32)
ON_ACCELERATOR = Sizes(4096, 4, 2, 2048, jnp.bfloat16)  # four layers of a Llama of 7B
COUNTED = ON_ACCELERATOR._replace(layers=1)  # the compiler for TPUs takes minutes for a layer

# ---- the model ----------------------------------------------------------------------------------


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """RMS norm in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True))).astype(x.dtype) * scale


def model(params: Any, ids: jax.Array, unroll: bool) -> jax.Array:
    """Token ids (B, L) to logits (B, L, V); XLA counts the body of a loop once."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        h = norm(x, p["norm_1"])
        q, k, v = ((h @ p[name]).reshape(*x.shape[:2], -1, HEAD) for name in "qkv")
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"]
        h = norm(x, p["norm_2"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    layer = jax.checkpoint(layer)
    x = params["embed"][ids] + params["shift"]
    x, _ = jax.lax.scan(layer, x, params["layers"], unroll=unroll)
    return (norm(x, params["norm"]) @ params["embed"].T).astype(jnp.float32)


def shapes(sizes: Sizes, mesh: Mesh | None) -> tuple[Any, Any]:
    """The parameters and a batch; on a mesh each device has a part of both."""
    dim = sizes.dim
    hidden = -(-dim * 8 // 3 // HEAD) * HEAD
    linear = dict.fromkeys("qkvo", (dim, dim)) | {"down": (hidden, dim)}
    linear |= dict.fromkeys(("gate", "up"), (dim, hidden))
    norms = dict.fromkeys(("norm_1", "norm_2"), (dim,))

    def shape(axes: tuple[int, ...], *cut: str | None, dtype: Any = sizes.dtype) -> Any:
        place = None if mesh is None else NamedSharding(mesh, PartitionSpec(*cut))
        return jax.ShapeDtypeStruct(axes, dtype, sharding=place)

    layers = {name: shape((sizes.layers, *x), None, "data") for name, x in linear.items()}
    layers |= {name: shape((sizes.layers, *x)) for name, x in norms.items()}
    params = {"embed": shape((VOCABULARY, dim), "data"), "layers": layers}
    params |= {"norm": shape((dim,)), "shift": shape((dim,))}
    rows = sizes.batch * (1 if mesh is None else mesh.size)
    return params, shape((rows, sizes.length), "data", dtype=jnp.int32)


# ---- the steps ----------------------------------------------------------------------------------


class Step(NamedTuple):
    """A compiled step and its arguments."""

    plan: jlora.types.Plan
    adapter: Any
    base: Any
    ids: Any
    tx: Any


def make_step(name: str, rank: int, sizes: Sizes, mesh: Mesh | None) -> Step:
    """Compiles a step. Without a mesh, its arguments are random arrays."""
    base, ids = shapes(sizes, mesh)
    if mesh is None:
        draw = lambda x: 0.02 * jax.random.normal(jax.random.key(0), x.shape, x.dtype)  # noqa: E731
        base = jax.tree.map(draw, base)
        ids = jax.random.randint(jax.random.key(1), ids.shape, 0, VOCABULARY)
    own = partial(model, unroll=mesh is not None)
    apply = lambda base, adapter, ids: own({**base, **adapter}, ids)  # noqa: E731
    if name == "LoRA":
        lora = jlora.transform(own, jlora.LoRA(rank=rank), jlora.Full("shift"))
        make = jax.jit(lora.init) if mesh is None else partial(jax.eval_shape, lora.init)
        apply, (_, adapter) = lora.apply, make(jax.random.key(2), base, ids)
    elif name == "full":
        adapter, base = base, {}
    else:  # trains what is added to embeddings: all gradients but those of weights are computed
        adapter = {"shift": base["shift"]}
        base = {k: x for k, x in base.items() if k != "shift"}

    def loss(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        logits = apply(base, adapter, ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    tx, options = optax.adamw(1e-4), jlora.compiler_options(None if mesh is None else "tpu")
    plan = jlora.plan(loss, base, adapter, (ids,), tx, compile=True, compiler_options=options)
    return Step(plan, adapter, base, ids, tx)


def seconds(steps: Mapping[str, Step]) -> dict[str, float]:
    """The median time of each step that fits; they take turns."""
    programs = {name: x.plan.program for name, x in steps.items() if x.plan.program is not None}
    found: dict[str, list[float]] = {name: [] for name in programs}
    running = {x: (steps[x].adapter, steps[x].tx.init(steps[x].adapter)) for x in programs}
    end = time.perf_counter() + SECONDS
    for _ in progress(range(ROUNDS), "rounds"):
        for name, program in programs.items():
            step = steps[name]
            begin = time.perf_counter()
            adapter, state, _ = program(*running[name], step.base, (step.ids,))
            running[name] = jax.block_until_ready((adapter, state))
            found[name].append(time.perf_counter() - begin)
        if time.perf_counter() > end:
            break
    return {name: statistics.median(times) for name, times in found.items()}


# ---- the report ---------------------------------------------------------------------------------


def measure(rank: int, sizes: Sizes, aot: str | None) -> dict[str, Any]:
    """Compiles the steps, and times them or counts for the slice `aot`."""
    mesh = None
    if aot is not None:
        mesh = Mesh(pod_plan.devices_of(aot), ("data",), axis_types=(AxisType.Auto,))
    steps = {x: make_step(x, rank, sizes, mesh) for x in progress(STEPS, "compile")}
    if mesh is None:
        times = seconds(steps)
        rows = {name: speed(sizes, times.get(name), x.plan) for name, x in steps.items()}
    else:
        rows = {name: counts(x.plan) for name, x in steps.items()}
    first = rows["frozen"]
    ratios = {
        f"{name} / frozen": {k: round(x / y, 3) for k, x in row.items() if x and (y := first[k])}
        for name, row in rows.items()
        if row is not first
    }
    device = aot or jax.devices()[0].device_kind
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = {name: version(name) for name in ("jlora", "jax", "jaxlib")}
    shape = sizes._replace(dtype=jnp.dtype(sizes.dtype).name)._asdict() | {"rank": rank}
    found = {"device": device, "processor": machine, **versions, **shape}
    return found | {"steps": rows, "ratios": ratios}


def speed(sizes: Sizes, time: float | None, plan: jlora.types.Plan) -> Row:
    """Tokens a second and memory; None if the step does not fit."""
    rate = time and round(sizes.batch * (sizes.length - 1) / time, 1)
    return {"tokens/s": rate, "GB of memory": in_giga(plan.peak)}


def counts(plan: jlora.types.Plan) -> Row:
    """What a device computes, accesses and holds."""
    cost = (plan.program and plan.program.cost_analysis()) or {}
    counted = {"GFLOP": cost.get("flops"), "GB accessed": cost.get("bytes accessed")}
    return {key: in_giga(x) for key, x in {**counted, "GB of memory": plan.peak}.items()}


def in_giga(x: float | None) -> float | None:
    """Billions."""
    return x and round(x / 1e9, 3)


def table(found: Mapping[str, Any]) -> str:
    """A line of each step and each ratio."""
    rows = found["steps"] | found["ratios"]
    names = list(found["steps"]["frozen"])
    cells = {name: [row.get(k) for k in names] for name, row in rows.items()}
    lines = [f"{'':14}" + "".join(f"{name:>15}" for name in names)]
    for name, row in cells.items():
        lines.append(f"{name:14}" + "".join(f"{'' if x is None else f'{x:,.5g}':>15}" for x in row))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table and the line to report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--sizes", metavar="DIM,LAYERS,BATCH,LENGTH", help="of model and batch")
    parser.add_argument("--aot", metavar="CHIP:SHAPE", help="count for a slice, such as v5e:2x2")
    args = parser.parse_args(argv)
    sizes = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    sizes = COUNTED if args.aot else sizes
    if args.sizes:
        given = [int(x) if x.isdecimal() else 0 for x in args.sizes.split(",")]
        if len(given) != 4 or min(given) < 1 or given[0] % HEAD or given[3] < 2:
            parser.error(f"--sizes must be four numbers, DIM a multiple of {HEAD}: {args.sizes}")
        sizes = Sizes(given[0], given[1], given[2], given[3], sizes.dtype)
    found = measure(args.rank, sizes, args.aot)
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
