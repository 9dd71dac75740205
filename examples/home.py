"""The longest row that LoRA trains on one device, by the device's compiler and without the device.

    python examples/home.py --models llama3-8b --weights nf4 --devices 24   # minutes
    python examples/home.py                                                 # all, hours

A step has one row, recomputes each layer in the backward pass, and takes the loss without its
logits (`chunked`); what a layer is computed again from stays on the device, or is offloaded to the
host. LoRA of rank 16, in float32 as Adam's moments are, adapts the dense layers, of gpt-oss those
of attention. Embedding, head and norms are bfloat16, and so are activations.

The decoder has the shapes of the models: their products, experts, cache-free attention and
vocabulary. Norms of queries, biases, sinks and windows are left out, which take no memory to speak
of. Lengths are 8 to 15 times a power of two, up to 491,520. A length fits if the compiled step's
peak is at most the device's memory: a device of 16, 24, 40 or 80 GB has 0.95 of as many GiB, and
runs the program of the compiler for H100s; a v5e has what its own compiler allows, which is told to
hurry.

Each compiled step is a row of `--out`, so that a run that was stopped goes on.
"""

import argparse
import functools
import itertools
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chunked
import jax
import jax.numpy as jnp
import optax
import pod_plan
import tables
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models import llama
from progress import progress

import jlora

RANK = 16
HERE = pathlib.Path(__file__).parent
SHARE = 0.95  # of a GPU's memory, as with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
CHUNK = 512
LENGTHS = [m * 2**k for k in range(7, 16) for m in range(8, 16)]  # 1,024 to 491,520
FIRST = 8192  # to compile
# The compilers in a hurry. That for GPUs tries no other kernels: it takes a third less time, and
# peaks are the same. That for TPUs would take minutes; the peaks are those of this program.
FAST = {"H100": {"xla_gpu_autotune_level": 0}, "v5e": {"optimization_level": "O0"}}


class Shape(NamedTuple):
    """A decoder.

    Attributes:
        experts: in each layer; 0 is one MLP.
        chosen: experts of each token.
    """

    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    experts: int = 0
    chosen: int = 0


SHAPES = {
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128, 128_256, tied=False),
    "qwen3-4b": Shape(36, 2560, 9728, 32, 8, 128, 151_936),
    "gemma3-4b": Shape(34, 2560, 10240, 8, 4, 256, 262_208),
    "gpt-oss-20b": Shape(24, 2880, 2880, 64, 8, 64, 201_088, False, experts=32, chosen=4),
}
DENSE = r"layers/(q|k|v|o|gate|up|down)"
SCHEMES = {"nf4": jlora.NF4(DENSE), "int8": jlora.Int8(DENSE), "bfloat16": None}
GPUS = ("16", "24", "40", "80")
DEVICES = (*GPUS, "v5e")
SAVED = ("device", "host")  # where the inputs of layers are kept

# ---- the step -----------------------------------------------------------------------------------


def weights(shape: Shape) -> dict[str, Any]:
    """The shapes of all parameters."""
    s, e = shape, (shape.experts,) if shape.experts else ()
    heads, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    layer = {"norm1": (s.dim,), "norm2": (s.dim,)}
    layer |= {"q": (s.dim, heads), "k": (s.dim, kv), "v": (s.dim, kv), "o": (heads, s.dim)}
    layer |= {"gate": (*e, s.dim, s.hidden), "up": (*e, s.dim, s.hidden)}
    layer |= {"down": (*e, s.hidden, s.dim)} | ({"router": (s.dim, *e)} if e else {})
    ends = {"embed": (s.vocab, s.dim), "norm": (s.dim,)}
    ends |= {} if s.tied else {"head": (s.dim, s.vocab)}
    return {"layers": {k: (s.layers, *v) for k, v in layer.items()}, **ends}


def log_probs(
    shape: Shape, attend: Callable[..., jax.Array], saved: str, params: Any, ids: jax.Array
) -> jax.Array:
    """Of each token (B, L) after the first, given those before it."""
    embed = params["embed"]
    layer = functools.partial(_layer, shape, attend)
    x = jax.lax.scan(
        jax.checkpoint(layer, policy=policy(saved), prevent_cse=False),
        embed[ids[:, :-1]],
        params["layers"],
    )[0]
    head = embed.T if shape.tied else params["head"]
    x = _norm(x, params["norm"])
    return chunked.log_probs(lambda x: x @ head, x, ids[:, 1:], CHUNK)


def policy(saved: str) -> Any:
    """What is kept of a layer: its input, on the device or on the host."""
    if saved == "device":
        return None
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input of layer"],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _layer(shape: Shape, attend: Any, x: jax.Array, w: Any) -> tuple[jax.Array, None]:
    x = checkpoint_name(x, "input of layer")
    y = _norm(x, w["norm1"])
    q, k, v = ((y @ w[n]).reshape(*x.shape[:2], -1, shape.head_dim) for n in "qkv")
    frequencies = 5e5 ** -(jnp.arange(0, shape.head_dim, 2) / shape.head_dim)
    q, k = (llama.rope(h, jnp.arange(x.shape[1])[None], frequencies) for h in (q, k))
    x = x + attend(q, k, v).reshape(*x.shape[:2], -1) @ w["o"]
    y = _norm(x, w["norm2"])
    return x + (_experts(shape, w, y) if shape.experts else _mlp(w, y, jnp.matmul)), None


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype) * scale


def _mlp(w: Any, x: jax.Array, dot: Callable[..., jax.Array]) -> jax.Array:
    return dot(jax.nn.silu(dot(x, w["gate"])) * dot(x, w["up"]), w["down"])


def _experts(shape: Shape, w: Any, x: jax.Array) -> jax.Array:
    """Each token's chosen experts, weighted; tokens are sorted by expert."""
    flat = x.reshape(-1, shape.dim)
    gains, chosen = jax.lax.top_k((flat @ w["router"]).astype(jnp.float32), shape.chosen)
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=shape.experts)
    tokens = order // shape.chosen
    y = _mlp(w, flat[tokens], lambda x, w: jax.lax.ragged_dot(x, w, sizes))
    y = y * jax.nn.softmax(gains).ravel()[order, None].astype(y.dtype)
    return jnp.zeros_like(flat).at[tokens].add(y).reshape(x.shape)


def make_job(
    shape: Shape, scheme: Any, attend: Any, saved: str, ids: Any, place: Any
) -> tuple[Any, ...]:
    """What `jlora.plan` takes for a batch of `ids` (B, L + 1)."""

    def spec(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16),
        weights(shape),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params = params if scheme is None else jlora.quantize(params, scheme)
    names = "q|k|v|o" if shape.experts else "q|k|v|o|gate|up|down"
    rule = jlora.LoRA(f"layers/({names})", rank=RANK, dtype=jnp.float32)
    lora = jlora.transform(functools.partial(log_probs, shape, attend, saved), rule)
    _, adapter = jax.eval_shape(lora.init, jax.random.key(0), params, ids)

    def loss(adapter: Any, base: Any, ids: jax.Array) -> jax.Array:
        return -lora.apply(base, adapter, ids).mean()

    return loss, spec(params), spec(adapter), (spec(ids),), optax.adamw(1e-4)


# ---- the attention ------------------------------------------------------------------------------


@jax.custom_vjp
def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """What XLA sees of a flash attention: kernels of these operands and results, which do nothing.

    cuDNN's own cannot be compiled where its library is missing.
    """
    return _forward(q, k, v)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, length, heads, _ = q.shape
    sums = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    mixed, sums = _kernel(q, sums)(q, k, v)
    return mixed, (q, k, v, mixed, sums)


def _backward(saved: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(_kernel(*saved[:3])(*saved, g))


flash.defvjp(_forward, _backward)


def _kernel(*results: Any) -> Callable[..., list[jax.Array]]:
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return lambda *xs: pl.pallas_call(
        lambda *refs: None,
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        in_specs=[anywhere] * len(xs),
        out_specs=[anywhere] * len(results),
    )(*xs)


# ---- the search ---------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A kind of step; `compiler` is "H100" or "v5e"."""

    model: str
    weights: str
    saved: str
    compiler: str


def measure(cell: Cell, length: int) -> dict[str, Any]:
    """Compiles a step of one row of `length` tokens: a row of the results, in bytes."""
    began, on_tpu = time.monotonic(), cell.compiler == "v5e"
    if on_tpu:
        mesh = pod_plan.mesh_of("v5e:2x2", (2, 2))
        mesh = Mesh(mesh.devices[:1, :1], mesh.axis_names)
    else:
        mesh = pod_plan.mesh_of("cuda:1x1x1", (1, 1))
    ids = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
    place = NamedSharding(mesh, PartitionSpec())
    job = make_job(SHAPES[cell.model], SCHEMES[cell.weights], flash, cell.saved, ids, place)
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # No others of Pallas compile without a GPU.
        warnings.filterwarnings("ignore", ".*Triton backend is deprecated", DeprecationWarning)
        found = jlora.plan(*job, compiler_options=FAST[cell.compiler])
    assert found.peak is not None
    seconds = round(time.monotonic() - began, 1)
    sizes = {"exact": found.exact, "peak": found.peak, "capacity": found.capacity or 0}
    return {**cell._asdict(), "length": length, **sizes, "seconds": seconds}


Peaks = dict[int, int]  # by length; that of 0 is what the shapes alone say


def next_length(peaks: Peaks, capacity: int, others: Peaks | None = None) -> int | None:
    """The length to compile next, for the longest whose peak is at most `capacity`; None if known.

    It is known if it was compiled, and the one after it takes more: it was compiled too, or lies
    beyond by the line through the two nearest peaks. Peaks are all but linear in the length. Those
    of `others`, steps on other weights, are as far apart, so they say where to look first.
    """
    if len(peaks) < 2:
        return FIRST
    fits = [n for n in LENGTHS if peaks.get(n, math.inf) <= capacity]
    fails = [n for n in LENGTHS if peaks.get(n, 0) > capacity]
    low = LENGTHS.index(fits[-1]) if fits else -1
    high = LENGTHS.index(fails[0]) if fails else len(LENGTHS)
    for known in (_moved(others or {}, peaks) | peaks, peaks):
        guess = by_line(known, capacity)
        at = min(max(sum(n <= guess for n in LENGTHS) - 1, low), high - 1)
        if at != low:
            return LENGTHS[at]
    return None


def _moved(others: Peaks, peaks: Peaks) -> Peaks:
    """Peaks of steps on other weights, with those of `peaks` at the first length."""
    more = peaks.get(FIRST, 0) - others.get(FIRST, 0)
    return {n: peak + more for n, peak in others.items() if n >= FIRST in peaks}


def by_line(peaks: Peaks, capacity: int) -> float:
    """The length that takes `capacity`, on the line through the two peaks that are nearest."""
    (m, low), (n, high) = sorted(peaks.items(), key=lambda x: abs(x[1] - capacity))[:2]
    return m + (capacity - low) * (n - m) / (high - low)


def longest(peaks: Peaks, capacity: int) -> int | None:
    """The longest length that fits; 0 if the first does not, None if it is not known yet."""
    if next_length(peaks, capacity) is not None:
        return None
    return max((n for n in peaks if peaks[n] <= capacity), default=0)


def known(rows: Sequence[dict[str, Any]], device: str) -> tuple[Peaks, int]:
    """What the results of a kind of step say: peaks, and the bytes of the device."""
    peaks = {0: rows[0]["exact"]} if rows else {}
    peaks |= {row["length"]: row["peak"] for row in rows}
    if device == "v5e":
        return peaks, rows[0]["capacity"] if rows else 0
    return peaks, int(SHARE * int(device) * 2**30)


def search(cell: Cell, devices: Sequence[str], out: pathlib.Path) -> None:
    """Compiles until the longest row is known on each of the devices."""
    for device in devices:
        while True:
            rows = tables.read(out)
            peaks, capacity = known(of_cell(rows, cell), device)
            others, _ = known(of_cell(rows, cell._replace(weights="nf4")), device)
            length = next_length(peaks, capacity, others)
            if length is None or peaks.get(0, 0) > capacity > 0:
                break
            row = measure(cell, length)
            tables.append(out, row)
            gb, s = row["peak"] / 1e9, row["seconds"]
            took = f"{length:,} tokens take {gb:.2f} GB, compiled in {s} s"
            progress.write(f"{' '.join(cell)}: {took}")


def of_cell(rows: Sequence[dict[str, Any]], cell: Cell) -> list[dict[str, Any]]:
    """Those of the results that are of one kind of step."""
    return [row for row in rows if tuple(row[name] for name in Cell._fields) == cell]


# ---- the table ----------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The longest rows, in Markdown; ? where a search has not ended."""
    lines = [f"| model | weights | {' | '.join(HEADS)} |", "|---" * (2 + len(HEADS)) + "|"]
    for model, name in itertools.product(SHAPES, SCHEMES):
        cells = [_entry(rows, model, name, device) for device in DEVICES]
        if any(cell != "?" for cell in cells):
            lines.append(f"| {model} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


HEADS = (*(f"{n} GB" for n in GPUS), "v5e")


def _entry(rows: Sequence[dict[str, Any]], model: str, name: str, device: str) -> str:
    found = []
    for saved in SAVED:
        own = of_cell(rows, Cell(model, name, saved, "v5e" if device == "v5e" else "H100"))
        peaks, capacity = known(own, device)
        n = 0 if peaks.get(0, 0) > capacity > 0 else longest(peaks, capacity)
        found.append("?" if n is None else f"{n:,}" if n else "–")
    return found[0] if found[0] == found[1] else "; ".join(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Searches what is asked for, and prints the table of all that is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--weights", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    add("--saved", nargs="+", choices=SAVED, default=list(SAVED), help="where inputs of layers are")
    add("--devices", nargs="+", choices=DEVICES, default=list(GPUS))
    add("--out", type=pathlib.Path, default=HERE / "results" / "home.csv")
    args = parser.parse_args(argv)
    by_compiler = {"H100": [d for d in args.devices if d != "v5e"]}
    by_compiler["v5e"] = [d for d in args.devices if d == "v5e"]
    kinds = itertools.product(by_compiler, args.weights, args.models, args.saved)
    cells = [Cell(model, name, saved, chip) for chip, name, model, saved in kinds]
    for cell in progress([cell for cell in cells if by_compiler[cell.compiler]]):
        search(cell, by_compiler[cell.compiler], args.out)
    print(table(tables.read(args.out)))


if __name__ == "__main__":
    main()
