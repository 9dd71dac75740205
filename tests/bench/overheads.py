"""What is paid once: tracing and compiling a step, and merging."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora._progress import progress

from . import model, report, steps

SHAPE = model.Shape(layers=12, dim=256, heads=4, batch=4, length=64)
TINY = model.Shape(layers=2, dim=64, heads=2, batch=2, length=16, vocab=128)
WIDE = model.Shape(layers=12, dim=768, heads=12, batch=1, length=8)


def run(quick: bool) -> None:
    """A table each for compilation and `merge`; targets: 1.3 times, 0.8 times."""
    modes = {"plain": False} if quick else {"plain": False, "scan": True}
    rows = compilation(TINY if quick else SHAPE, modes, rounds=1 if quick else 5)
    report.table("compilation: seconds, and the ratio to the frozen step", rows)
    rows = merging(TINY if quick else WIDE, rounds=2 if quick else 9)
    report.table("merge: under jit with donation, beside a copy of the tree", rows)


# ------------------------------------------------------------------------ tracing and compiling


def _with_leaves(task: steps.Task, leaves: Any) -> steps.Task:
    """`task`, which also updates `leaves` that its loss does not use: what the optimizer costs."""

    def loss(frozen: Any, trained: tuple[Any, Any], batch: Any) -> jax.Array:
        return task.loss(frozen, trained[0], batch)

    return steps.Task(loss, task.frozen, (task.trained, leaves))


def compilation(shape: model.Shape, modes: Mapping[str, bool], rounds: int) -> list[dict]:
    """Seconds of tracing and compiling, each program in turn in each round."""
    rows = []
    for mode, scan in modes.items():
        lm = model.LM(shape, scan=scan)
        ids, params = model.batch_and_params(lm)
        floor = steps.leaves_task(lm.apply, params, "norm")
        attention = steps.lora_task(lm.apply, params, model.attention(8), ids)
        linear = steps.lora_task(lm.apply, params, model.all_linear(8), ids)
        tasks = {
            "floor": floor,
            "floor, as many leaves": _with_leaves(floor, linear.trained),
            "q, v": attention,
            "all-linear": linear,
        }
        spent: dict[str, list[float]] = {name: [] for name in tasks}
        for i in progress(range(rounds + 1), f"{shape}, {mode}", leave=False):
            for name, task in tasks.items():
                seconds = task.compile_cold(ids).compile_s
                if i >= 1:  # one round loads the compiler
                    spent[name].append(seconds)
        rows += [
            {
                "mode": mode,
                "trained": name,
                "leaves": len(jax.tree.leaves(task.trained)),
                "seconds": float(np.median(spent[name])),
                "over the floor": steps.ratio(*map(np.array, (spent[name], spent["floor"]))),
            }
            for name, task in tasks.items()
        ]
    return rows


# --------------------------------------------------------------------------------------- merge


def merging(shape: model.Shape, rounds: int) -> list[dict]:
    """GB/s of the base tree through `merge` and through a copy; temporary memory in leaves.

    Asserted is that the base is updated in place, and that no more than two of the largest leaves
    are beside it.
    """
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        for mode, scan in {"plain": False, "scan": True}.items():
            lm = model.LM(shape, scan=scan)
            ids, params = model.batch_and_params(lm)
            params = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
            task = steps.lora_task(lm.apply, params, model.all_linear(8), ids)
            rows.append({"dtype": dtype.__name__, "mode": mode, **_merge_row(task, rounds)})
    return rows


def _merge_row(task: steps.Task, rounds: int) -> dict:
    base, adapter = task.frozen, task.trained
    merge = jax.jit(jlora.merge, donate_argnums=0).lower(base, adapter).compile()
    copy = jax.jit(functools.partial(jax.tree.map, jnp.copy)).lower(base).compile()
    memory = merge.memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    leaf = max(x.nbytes for x in jax.tree.leaves(base))
    assert memory.alias_size_in_bytes >= size, "the base is not updated in place"
    assert memory.temp_size_in_bytes <= 2 * leaf, f"{memory.temp_size_in_bytes} temporary bytes"
    plain, merged = base, jax.tree.map(jnp.copy, base)
    seconds = {"merge": [], "copy": []}
    for _ in progress(range(rounds + 1), "merge", leave=False):
        start = time.perf_counter()
        merged = jax.block_until_ready(merge(merged, adapter))
        middle = time.perf_counter()
        plain = jax.block_until_ready(copy(plain))
        seconds["merge"].append(middle - start)
        seconds["copy"].append(time.perf_counter() - middle)
    spent = {name: np.array(values[1:]) for name, values in seconds.items()}
    return {
        "MB": size / 1e6,
        "of copy speed": steps.ratio(spent["copy"], spent["merge"]),
    }
