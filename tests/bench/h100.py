"""Tokens a second of LoRA on one H100: Llama 3 8B's shapes, beside its floor, a form by hand, PEFT.

    python -m tests.bench h100                       # all rows, each printed when it is there
    python -m tests.bench.h100 jlora floor PEFT      # some of them
    python -m tests.bench h100 --quick               # tiny, anywhere

Random weights in bfloat16, 2 × 4,096 tokens, r = 16 on seven projections, factors and AdamW in
float32, cuDNN's attention, a scan over the layers, and in JAX a loss whose logits are never whole,
which takes no operation more. Each step is measured with products kept for
the backward pass, all else computed again (`jlora.remat_policy`), and with each layer computed
again. TFLOP/s are by 4·N·tokens: N parameters, forward and the gradients of activations.

On a machine that has a driver and nothing else, in the root of the repository:

    python3 -m venv jax && jax/bin/pip install "jax[cuda13]" -e .
    python3 -m venv torch && torch/bin/pip install torch peft transformers
    export PYTORCH_PYTHON=$PWD/torch/bin/python
    jax/bin/python -m tests.bench h100 --quick
    jax/bin/python -m tests.bench.h100 jlora floor "by hand"
    jax/bin/python -m tests.bench.h100 PEFT "torch's floor"
    jax/bin/python -m tests.bench.h100 DoRA NF4

With a driver below 580 it is `jax[cuda12]`; where one Python has all of it, `PYTORCH_PYTHON` is not
needed. The lines take 1, 8, 4 and 6 minutes by estimate, most of it compilation, and 20 in all: a
row that would start later than that is left out.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chunked
import jax
import jax.numpy as jnp
import optax
from models import llama
from tqdm import tqdm

import jlora

from . import report, steps, tpu
from .peers import llama_work

LIMIT = 20 * 60  # seconds, after which no step starts
KEPT = {  # for the backward pass: whether layers are computed again, and what is kept nevertheless
    "products": {"remat": True, "policy": jlora.remat_policy},
    "inputs of layers": {"remat": True},
}
BY_TORCH = {"PEFT": "lora", "torch's floor": "floor"}
KEPT_BY_TORCH = {"everything": (), "inputs of layers": ("again",)}
PROJECTIONS = r"w/(q|k|v|o|gate|up|down)"


def run(quick: bool, names: Sequence[str] = ()) -> None:
    """A row for each step of these names, or of all, and for what is kept."""
    if not quick and shutil.which("nvidia-smi") is None:
        print("\nh100: left out, as there is no GPU; with --quick it runs anywhere.")
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    began = time.monotonic()
    work = llama_work.QUICK if quick else llama_work.LLAMA
    names = names or [*TASKS, *BY_TORCH]
    rows: list[dict[str, Any]] = []
    # PyTorch first: JAX, once it has begun, has the device's memory.
    for row in itertools.chain(by_torch(work, names), in_jax(work, names)):
        rows.append(row)
        if not quick:
            tqdm.write(json.dumps(row))
        if time.monotonic() - began > LIMIT:
            print("\nThe steps that are left are left out: the time is over.")
            break
    report.table(f"h100: {work.tokens} tokens a step", over_the_floor(rows))
    counts = {row["trained"] for row in rows if row["step"] in ("jlora", "by hand", "PEFT", "NF4")}
    assert len(counts - {None}) <= 1, f"these train as many parameters: {counts}"


def over_the_floor(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the ratio to the floor by the same library that keeps the same."""
    floors = {(row["step"], row["kept"]): row["ms"] for row in rows}
    found = []
    for row in rows:
        floor = "torch's floor" if row["step"] in BY_TORCH else "floor"
        ratio = row["ms"] / floors.get((floor, row["kept"]), math.nan)
        found.append({**row, "over the floor": ratio})
    return found


def to_row(step: str, kept: str, work: llama_work.Work, found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table; `found` has the seconds of the steps, or a note why there are none."""
    middle = statistics.median(found.get("seconds", [math.nan]))
    return {
        "step": step,
        "kept": kept,
        "ms": 1e3 * middle,
        "tokens/s": work.tokens / middle,
        "TFLOP/s": 4e-12 * work.parameters * work.tokens / middle,
        "trained": None,
        **{k: v for k, v in found.items() if k != "seconds"},
    }


# ------------------------------------------------------------------------------------------- JAX


def in_jax(work: llama_work.Work, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Those of the steps that are JAX's."""
    if not set(names) & set(TASKS):
        return
    ids = jax.random.randint(jax.random.key(1), (work.batch, work.length + 1), 0, work.vocab)
    params = jax.jit(functools.partial(start, work))(jax.random.key(0))
    for kept, how in KEPT.items():
        apply = functools.partial(model, shape_of(work)._replace(**how))
        for name in TASKS if kept == "products" or work != llama_work.QUICK else ["jlora"]:
            if name in names:
                yield to_row(name, kept, work, measure(TASKS[name], apply, params, ids, work))
                gc.collect()


def measure(
    make: Callable[..., steps.Task], apply: Any, params: Any, ids: jax.Array, work: llama_work.Work
) -> dict[str, Any]:
    """Compiles and times a step."""
    try:
        task = make(apply, params, ids)
        trained = jlora.count(task.trained)
        program = task.compile(ids, optax.adamw(1e-4))
        del task
        seconds = [program.run(ids) for _ in range(work.warm_up + work.steps)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"note": "does not fit"}
    memory = program.compiled.memory_analysis()
    return {
        "seconds": seconds[work.warm_up :],
        "trained": trained,
        "GB": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
        "compile s": program.compile_s,
    }


def shape_of(work: llama_work.Work) -> tpu.Layer:
    """The layers."""
    sizes = {k: getattr(work, k) for k in ("dim", "hidden", "heads", "groups", "batch", "length")}
    return tpu.Layer(**sizes, layers=work.layers, attention=attention)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Rotates queries and keys, and mixes values, by cuDNN where there is a GPU."""
    how = "cudnn" if jax.default_backend() == "gpu" else None
    return jax.nn.dot_product_attention(*rotate(q, k), v, is_causal=True, implementation=how)


def rotate(*heads: jax.Array) -> list[jax.Array]:
    """By their positions."""
    _, length, _, dim = heads[0].shape
    frequencies = llama_work.ROPE ** (-jnp.arange(0, dim, 2, jnp.float32) / dim)
    return [llama.rope(x, jnp.arange(length)[None], frequencies) for x in heads]


def start(work: llama_work.Work, key: jax.Array) -> dict[str, Any]:
    """Random weights."""
    layer = {k: (work.layers, *s) for k, s in shape_of(work).weights().items()}
    ends = {"embed": (work.vocab, work.dim), "norm": (work.dim,), "head": (work.dim, work.vocab)}
    keys = iter(jax.random.split(key, len(layer) + len(ends)))

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        if "norm" in name:
            return jnp.ones(shape, jnp.bfloat16)
        return jax.random.normal(next(keys), shape, jnp.bfloat16) / math.sqrt(work.dim)

    return {"w": {k: draw(k, s) for k, s in layer.items()}, **{k: draw(k, ends[k]) for k in ends}}


def model(
    shape: tpu.Layer,
    params: dict[str, Any],
    ids: jax.Array,
    log_probs: Callable[..., jax.Array] = chunked.log_probs,
) -> jax.Array:
    """Log-probabilities (batch, length) of ids (batch, length + 1), each after those before it."""
    weights = {k: params[k] for k in ("w", "ab") if k in params}
    x = tpu.model(weights, params["embed"][ids[:, :-1]], shape)
    x = tpu.norm(x, params["norm"])
    return log_probs(lambda x: x @ params["head"], x, ids[:, 1:])


def mean_loss(apply: Any, params: Any, ids: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return -apply(params, ids).mean()


def floor(apply: Any, params: Any, ids: jax.Array) -> steps.Task:
    """The norms are trained."""
    return steps.leaves_task(apply, params, "norm", mean_loss)


def adapted(rule: Any, apply: Any, params: Any, ids: jax.Array) -> steps.Task:
    """By jlora."""
    return steps.lora_task(apply, params, [rule], ids, mean_loss, lambda ids: (ids,))


def by_hand(apply: Any, params: Any, ids: jax.Array) -> steps.Task:
    """x·W + s·(x·A)·B, differentiated by JAX."""
    nodes = adapted(LORA, apply, params, ids).trained["w"]

    def loss(frozen: Any, factors: Any, ids: jax.Array) -> jax.Array:
        ab = jax.tree.map(lambda x: x.astype(jnp.bfloat16), factors)
        return mean_loss(apply, {**frozen, "ab": ab}, ids)

    return steps.Task(loss, params, {k: (node.a, node.b) for k, node in nodes.items()})


def on_nf4(apply: Any, params: Any, ids: jax.Array) -> steps.Task:
    """By jlora, on a base in four bits."""
    sites = jlora.transform(apply, LORA).sites(params, ids)
    return adapted(LORA, apply, jlora.quantize(params, jlora.NF4(PROJECTIONS), sites=sites), ids)


SIZES = {"rank": llama_work.RANK, "alpha": llama_work.ALPHA}
LORA = jlora.LoRA(PROJECTIONS, **SIZES, dtype=jnp.float32)
DORA = jlora.DoRA(PROJECTIONS, **SIZES, dtype=jnp.float32)
TASKS = {
    "jlora": functools.partial(adapted, LORA),
    "floor": floor,
    "by hand": by_hand,
    "DoRA": functools.partial(adapted, DORA),
    "NF4": on_nf4,
}

# --------------------------------------------------------------------------------------- PyTorch


def by_torch(work: llama_work.Work, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Those of the steps that are PyTorch's, each in a process; without it, rows that say so."""
    python = os.environ.get("PYTORCH_PYTHON", sys.executable)
    options = ["quick"] if work == llama_work.QUICK else []
    for kept, again in KEPT_BY_TORCH.items():
        for name in [name for name in BY_TORCH if name in names]:
            command = [python, "-m", "tests.bench.peers.llama_torch", BY_TORCH[name], *again]
            done = subprocess.run([*command, *options], capture_output=True, text=True)
            said = (done.stderr if done.returncode else done.stdout).strip().splitlines()
            found = {"note": said[-1]} if done.returncode else json.loads(said[-1])
            yield to_row(name, kept, work, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.h100")
    parser.add_argument("names", nargs="*", choices=[*TASKS, *BY_TORCH, []], help="default: all")
    run(False, parser.parse_args().names)
