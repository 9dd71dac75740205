"""What a method costs: bytes, memory and time of a training step, and latency of inference.

`compare` calls `measure`, which writes OUT/methods_costs.csv and OUT/methods_latency.csv unless
they are there, of the same methods and sizes. Times are of rounds in which everything takes its
turn, so that what else a machine does meets all alike; a quotient is taken within each round, and
the median is reported. A process that has one core, as under `taskset -c 0`, counts its own time on
that core alone.
"""

import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tables
from progress import progress
from quickstart import LENGTH, Batch
from safetensors.numpy import save

import jlora

BATCH = 32  # of the training step
STEPS = 5  # that are timed
SETTINGS = {(32, 512): 3, (16, 256): 7, (1, 128): 101}  # the paper's (batch, tokens): rounds
BASE = "full"  # whose latency is 1


def measure(
    out: pathlib.Path,
    model: Any,
    variables: Any,
    runners: Mapping[str, Any],
    settings: Mapping[tuple[int, int], int] = SETTINGS,
) -> None:
    """Writes the two tables, unless they are there for the methods at their sizes.

    Args:
        out: the folder.
        model: whose latency, with `variables`, is that of full fine-tuning and of merged LoRA.
        variables: the model's.
        runners: by the method's name, each a `trials.Runner`.
        settings: batch and tokens, and how many rounds.
    """
    trained = {name: trained_by(runner, variables) for name, runner in runners.items()}
    path, latency = out / "methods_costs.csv", out / "methods_latency.csv"
    if trained != {row["method"]: row["trained"] for row in tables.read(path)}:
        latency.unlink(missing_ok=True)  # it is of other sizes
        tables.write(path, costs(variables, runners))
    if not latency.exists():
        tables.write(latency, latencies(model, variables, runners, settings))


def trained_by(runner: Any, variables: Any) -> int:
    """The number of parameters that a method trains."""
    init, ids = functools.partial(runner.init, jax.random.key(0)), jnp.ones((1, 8), jnp.int32)
    return jlora.count(jax.eval_shape(init, variables, ids)[1])


def rounds(calls: Mapping[str, Callable[[], Any]], count: int) -> dict[str, np.ndarray]:
    """Seconds of each call, compiled, in rounds of another order each: ``(count,)`` by name."""
    rng, names = np.random.default_rng(0), list(calls)
    seconds = {name: np.zeros(count) for name in names}
    one_core = len(getattr(os, "sched_getaffinity", lambda _: ())(0)) == 1
    clock = time.process_time if one_core else time.perf_counter
    for i in progress(range(count), "rounds", leave=False):
        for name in rng.permutation(names):
            start = clock()
            jax.block_until_ready(calls[name]())
            seconds[name][i] = clock() - start
    return seconds


# ---- training -----------------------------------------------------------------------------------


def costs(variables: Any, runners: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each method: parameters, bytes, and the training step at full length."""
    ids = np.random.default_rng(0).integers(1000, 20000, (BATCH, LENGTH), np.int32)
    batch = Batch(ids, np.ones_like(ids), np.arange(BATCH, dtype=np.int32) % 2)
    rows, calls = {}, {}
    for name, runner in runners.items():
        base, trained = runner.init(jax.random.key(0), variables, ids, ids)
        state, rate = runner.tx.init(trained), jnp.float32(1e-3)
        step = runner.step.lower(trained, state, base, batch, rate).compile()
        used = step.memory_analysis()
        rows[name] = {
            "method": name,
            "trained": jlora.count(trained),
            "head": jlora.count(variables["params"]["classifier"]),
            "file_bytes": file_bytes(trained),
            "trained_bytes": size(trained),
            "optimizer_bytes": size(state),
            "argument_bytes": used.argument_size_in_bytes,
            # What is returned lies where what is replaced lay.
            "temp_bytes": used.temp_size_in_bytes
            + used.output_size_in_bytes
            - used.alias_size_in_bytes,
        }
        calls[name] = stepping(step, trained, state, base, batch, rate)
    seconds = rounds(calls, STEPS)
    for name, row in rows.items():
        row["step_ms"] = round(1e3 * float(np.median(seconds[name])), 1)
        row["step_ratio"] = round(float(np.median(seconds[name] / seconds[BASE])), 3)
    return list(rows.values())


def stepping(step: Any, trained: Any, state: Any, *rest: Any) -> Callable[[], Any]:
    """A call that takes the next training step; `step` reuses the memory of what it replaces."""

    def call() -> Any:
        nonlocal trained, state
        trained, state, loss = step(trained, state, *rest)
        return loss

    return call


def size(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def file_bytes(trained: Any) -> int:
    """Bytes of a safetensors file of what is trained."""
    flat = jax.tree_util.tree_leaves_with_path(trained)
    return len(save({jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}))


# ---- inference ----------------------------------------------------------------------------------


def latencies(
    model: Any,
    variables: Any,
    runners: Mapping[str, Any],
    settings: Mapping[tuple[int, int], int] = SETTINGS,
) -> list[dict[str, Any]]:
    """A row for each setting and method; methods whose weights can be merged are so in the base."""
    ids = jnp.ones((1, 8), jnp.int32)
    programs = {BASE: (jax.jit(model.apply), (variables,))}
    for name, runner in runners.items():
        base, trained = runner.init(jax.random.key(0), variables, ids, ids)
        if name == "lora":
            programs["lora_merged"] = programs[BASE][0], (jlora.merge(base, trained),)
        if name not in (BASE, "bitfit"):
            programs[name] = jax.jit(runner.apply), (base, trained)
    return [row for shape, n in settings.items() for row in latency(programs, shape, n)]


def latency(
    programs: Mapping[str, tuple[Any, Sequence[Any]]], shape: tuple[int, int], count: int
) -> list[dict[str, Any]]:
    """The rows of one setting."""
    ids = np.random.default_rng(0).integers(1000, 20000, shape, np.int32)
    ids, mask = jnp.asarray(ids), jnp.ones(shape, jnp.int32)

    def bind(fn, args):
        return functools.partial(fn.lower(*args, ids, mask).compile(), *args, ids, mask)

    seconds = rounds({name: bind(*program) for name, program in programs.items()}, count)
    rows = []
    for name, taken in seconds.items():
        low, ratio, high = np.percentile(taken / seconds[BASE], [25, 50, 75])
        row = {"method": name, "batch": shape[0], "tokens": shape[1], "rounds": count}
        row |= {"ms": round(1e3 * float(np.median(taken)), 2), "ratio": round(float(ratio), 4)}
        rows.append(row | {"low": round(float(low), 4), "high": round(float(high), 4)})
    return rows
