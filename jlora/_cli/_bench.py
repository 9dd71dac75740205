"""`jlora bench`: a training step with LoRA beside a frozen and a full one, on this device."""

import json
import os
import platform
import statistics
import time
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import jlora

from .._planning import Plan, has_compiler, mesh_of, parse_topology
from .._progress import progress
from .._text import align_columns
from ._command import Answer, Command, call

HEAD, VOCABULARY, SECONDS, ROUNDS = 64, 32_000, 90, 30  # rounds end after either
STEPS = "frozen", "LoRA", "full"


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


@click.command(cls=Command)
@click.option("--rank", default=16, show_default=True, help="The rank of LoRA.")
@click.option("--sizes", metavar="DIM,LAYERS,BATCH,LENGTH", help="The model and its batch.")
@click.option(
    "--aot", metavar="CHIP:SHAPE", help="Count for a TPU slice that is not there, such as v5e:2x2."
)
def bench(rank: int, sizes: str | None, aot: str | None) -> Answer:
    """Time a training step with LoRA beside a frozen and a full one.

    The model is a Llama with random weights; LoRA is on all linear layers. Prints a table, and a
    line of JSON to report. Takes less than a minute on two cores. With --aot nothing runs: it
    counts operations, bytes and memory of the compiled steps on each device, which takes minutes.
    """
    own = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    own = own if aot is None else COUNTED
    given = [int(x) if x.isdecimal() else 0 for x in sizes.split(",")] if sizes else own[:4]
    if len(given) != 4 or min(rank, *given) < 1 or given[0] % HEAD or given[3] < 2:
        raise ValueError(
            f"--sizes must be four numbers, of which DIM is a multiple of {HEAD}, and --rank at "
            f"least 1; got {sizes} and {rank}."
        )
    own = Sizes(given[0], given[1], given[2], given[3], own.dtype)
    mesh = None if aot is None else call(mesh_of, aot, {"data": call(parse_topology, aot)[1]})
    if mesh is not None and not has_compiler():
        raise ValueError('--aot needs the compiler for TPUs: pip install "jax[tpu]".')
    with jax.enable_x64(False):
        steps = {x: _make_step(x, rank, own, mesh) for x in progress(STEPS, "compile")}
        times = {} if mesh else _time(steps)
    rows = {
        name: _count(x.plan) if mesh else _rate(own, times.get(name), x.plan)
        for name, x in steps.items()
    }
    first = rows["frozen"]
    ratios = {
        f"{name} / frozen": {k: round(x / y, 3) for k, x in row.items() if x and (y := first[k])}
        for name, row in rows.items()
        if row is not first
    }
    device = aot or jax.devices()[0].device_kind
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = {name: version(name) for name in ("jlora", "jax", "jaxlib")}
    shape = own._replace(dtype=jnp.dtype(own.dtype).name)._asdict() | {"rank": rank}
    fields = {"device": device, "processor": machine, **versions, **shape}
    fields |= {"steps": rows, "ratios": ratios}
    lines = [(name, *(_cell(row.get(k)) for k in first)) for name, row in (rows | ratios).items()]
    table = align_columns(("", *first), lines, {*first})
    return Answer("\n".join([*table, json.dumps(fields)]), fields)


# ---------------------------------------------------------------------------------------- the model


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True))).astype(x.dtype) * scale


def _apply(params: Any, ids: jax.Array, unroll: bool) -> jax.Array:
    """Token ids (B, L) to logits (B, L, V); XLA counts the body of a loop once."""

    def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        h = _norm(x, p["norm_1"])
        q, k, v = ((h @ p[name]).reshape(*x.shape[:2], -1, HEAD) for name in "qkv")
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["o"]
        h = _norm(x, p["norm_2"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None

    layer = jax.checkpoint(layer)
    x = params["embed"][ids] + params["shift"]
    x, _ = jax.lax.scan(layer, x, params["layers"], unroll=unroll)
    return (_norm(x, params["norm"]) @ params["embed"].T).astype(jnp.float32)


def _loss(apply: Any, adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
    import optax

    logits = apply(base, adapter, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def _shapes(sizes: Sizes, mesh: Any) -> Any:
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


# ---------------------------------------------------------------------------------------- the steps


class Step(NamedTuple):
    """A compiled step and its arguments."""

    plan: Plan
    adapter: Any
    base: Any
    ids: Any
    tx: Any


def _make_step(name: str, rank: int, sizes: Sizes, mesh: Any) -> Step:
    import optax

    tx = optax.adamw(1e-4)
    base, ids = _shapes(sizes, mesh)
    if mesh is None:
        draw = lambda x: 0.02 * jax.random.normal(jax.random.key(0), x.shape, x.dtype)  # noqa: E731
        base = jax.tree.map(draw, base)
        ids = jax.random.randint(jax.random.key(1), ids.shape, 0, VOCABULARY)
    model = partial(_apply, unroll=mesh is not None)
    apply = lambda base, adapter, ids: model({**base, **adapter}, ids)  # noqa: E731
    adapter = base
    if name == "LoRA":
        lora = jlora.transform(model, jlora.LoRA(rank=rank), jlora.Full("shift"))
        apply = lora.apply
        make = jax.jit(lora.init) if mesh is None else partial(jax.eval_shape, lora.init)
        _, adapter = make(jax.random.key(2), base, ids)
    elif name == "full":
        base = {}
    else:  # trains what is added to embeddings: all gradients but those of weights are computed
        adapter = {"shift": base["shift"]}
        base = {k: x for k, x in base.items() if k != "shift"}
    loss = partial(_loss, apply)
    options = jlora.compiler_options(None if mesh is None else "tpu")
    plan = jlora.plan(loss, base, adapter, (ids,), tx, compile=True, compiler_options=options)
    return Step(plan, adapter, base, ids, tx)


def _time(steps: dict[str, Step]) -> dict[str, float]:
    """Seconds of each step that fits, the median; they take turns."""
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


def _rate(sizes: Sizes, seconds: float | None, plan: Plan) -> dict[str, float | None]:
    rate = seconds and round(sizes.batch * (sizes.length - 1) / seconds, 1)
    return {"tokens/s": rate, "GB of memory": plan.peak and _giga(plan.peak)}


def _count(plan: Plan) -> dict[str, float | None]:
    cost = (plan.program and plan.program.cost_analysis()) or {}
    counted = {"GFLOP": cost.get("flops"), "GB accessed": cost.get("bytes accessed")}
    counted["GB of memory"] = plan.peak
    return {key: x and _giga(x) for key, x in counted.items()}


def _giga(x: float) -> float:
    return round(x / 1e9, 3)


def _cell(x: float | None) -> str:
    return "" if x is None else f"{x:,.5g}"
