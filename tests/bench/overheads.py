"""What is paid once: tracing and compiling a step, merging, and merging files."""

import functools
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jlora
from jlora._progress import progress

from . import model, report, steps

SHAPE = model.Shape(layers=12, dim=256, heads=4, batch=4, length=64)
TINY = model.Shape(layers=2, dim=64, heads=2, batch=2, length=16, vocab=128)
WIDE = model.Shape(layers=12, dim=768, heads=12, batch=1, length=8)


def run(quick: bool) -> None:
    """A table each for compilation, `merge` and files; targets: 1.3 times, 0.8, half of `cp`."""
    modes = {"plain": False} if quick else {"plain": False, "scan": True}
    rows = compilation(TINY if quick else SHAPE, modes, rounds=1 if quick else 5)
    report.table("compilation: seconds, and the ratio to the frozen step", rows)
    rows = merging(TINY if quick else WIDE, rounds=2 if quick else 9)
    report.table("merge: under jit with donation, beside a copy of the tree", rows)
    sides = (256, 688, 1000) if quick else (4096, 11008, 32000)
    rows = [files(kind, *sides, rounds=1 if quick else 5) for kind in ("bfloat16", "FP8")]
    report.table("jlora merge of files, beside cp -r of their folder", rows)


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


# ---------------------------------------------------------------------------- merge of files


MERGE = """
import pathlib, re, time
from jlora import peft
start, processor = time.perf_counter(), time.process_time()
peft.export_merged("base", "adapter", "out")
print(time.perf_counter() - start, time.process_time() - processor)
print(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""


def files(kind: str, dim: int, hidden: int, vocab: int, rounds: int) -> dict:
    """MB/s of a merge, from its imports on, and of `cp`, in turn; the peak of its process."""
    spent: dict[str, list[float]] = {"merge": [], "cp": []}
    processor: dict[str, list[float]] = {"merge": [], "cp": []}
    with tempfile.TemporaryDirectory() as name:
        folder, peak, written = pathlib.Path(name), 0.0, 0
        _write_llama(folder, kind, dim, hidden, vocab)
        read = sum(x.stat().st_size for x in (folder / "base").iterdir())
        commands = {"merge": [sys.executable, "-c", MERGE], "cp": ["cp", "-r", "base", "out"]}
        for _ in progress(range(rounds), f"files, {kind}", leave=False):
            for what, command in commands.items():
                before, start = _children(), time.perf_counter()
                done = subprocess.run(command, cwd=folder, check=True, capture_output=True)
                took = [time.perf_counter() - start, _children() - before]
                if what == "merge":
                    *took, peak = map(float, done.stdout.split())
                    written = sum(x.stat().st_size for x in (folder / "out").iterdir())
                shutil.rmtree(folder / "out")
                spent[what].append(took[0])
                processor[what].append(took[1])
    seconds = {what: float(np.median(x)) for what, x in spent.items()}
    return {
        "checkpoint": kind,
        "read, MB/s": read / 1e6 / seconds["merge"],
        "written, MB/s": written / 1e6 / seconds["merge"],
        "cp, MB/s": read / 1e6 / seconds["cp"],
        "of cp speed": steps.ratio(*map(np.array, (spent["cp"], spent["merge"]))),
        "processor s": float(np.median(processor["merge"])),
        "cp's": float(np.median(processor["cp"])),
        "peak GB": peak / 1e6,
    }


def _children() -> float:
    """The seconds of processors that the ended processes took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _write_llama(folder: pathlib.Path, kind: str, dim: int, hidden: int, vocab: int) -> None:
    """Writes three layers of a Llama in two shards, and an adapter of rank 16 on all of them."""
    draw, base, adapter = np.random.default_rng(0), folder / "base", folder / "adapter"
    ends = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (dim, dim))
    ends |= {"self_attn.o_proj": (dim, dim), "mlp.down_proj": (dim, hidden)}
    ends |= {"mlp.gate_proj": (hidden, dim), "mlp.up_proj": (hidden, dim)}
    shapes = {f"model.layers.{i}.{n}": shape for i in range(3) for n, shape in ends.items()}
    tables = {"model.embed_tokens": (vocab, dim), "lm_head": (vocab, dim)}
    noise = draw.standard_normal(2**16, np.float32) / 50
    shards: tuple[dict[str, Any], ...] = ({}, {})
    low: dict[str, np.ndarray] = {}
    for i, (name, shape) in enumerate((tables | shapes).items()):
        w, own = np.resize(noise, shape), shards[i % 2]
        own[f"{name}.weight"] = w.astype(jnp.bfloat16)
        if name in shapes:
            for end, size in (("lora_A", (16, shape[1])), ("lora_B", (shape[0], 16))):
                low[f"base_model.model.{name}.{end}.weight"] = np.resize(noise, size)
        if name in shapes and kind == "FP8":
            own[f"{name}.weight"] = (w * 1000).astype(jnp.float8_e4m3fn)
            grid = [-(-n // 128) for n in shape]
            own[f"{name}.weight_scale_inv"] = np.full(grid, 1e-3, np.float32)
    base.mkdir()
    adapter.mkdir()
    places = {n: f"{i}.safetensors" for i, own in enumerate(shards) for n in own}
    for i, own in enumerate(shards):
        save_file(own, base / f"{i}.safetensors")
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    save_file(low, adapter / "adapter_model.safetensors")
    texts = {
        base / "config.json": fp8 if kind == "FP8" else {},
        base / "model.safetensors.index.json": {"weight_map": places},
        adapter / "adapter_config.json": {
            "peft_type": "LORA",
            "r": 16,
            "lora_alpha": 32,
            "target_modules": [n.rpartition(".")[2] for n in ends],
        },
    }
    for path, value in texts.items():
        path.write_text(json.dumps(value))
