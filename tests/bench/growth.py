"""How a step's time and its compilation grow: with layers, tokens and rank."""

import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import jlora

from . import model, report, steps

DIM, HEADS, LENGTH, RANK = 256, 4, 128, 8
LAYERS = (2, 4, 8, 16, 32)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
LEAVES = (1_000, 10_000, 100_000)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def run(quick: bool) -> None:
    """A table for each axis, all-linear; quick: what is exact, asserted."""
    if quick:
        check()
        return
    shape, rules = (
        model.Shape(4, DIM, HEADS, batch=4, length=LENGTH),
        {RANK: model.all_linear(RANK)},
    )
    rows = [
        {"layers": n, "scan": scan, **row}
        for scan in (False, True)
        for n in LAYERS
        for row in measure(shape._replace(layers=n, batch=2), rules, scan=scan)
    ]
    report.table("growth-layers: ratios to the frozen step, 256 tokens", rows)
    rows = [
        {"tokens": n, **row}
        for n in TOKENS
        for row in measure(shape._replace(batch=n // LENGTH), rules)
    ]
    report.table("growth-tokens: ratios to the frozen step, four layers", rows)
    rows = measure(shape, {r: model.all_linear(r) for r in RANKS}, rounds=15)
    report.table("growth-rank: ratios to the frozen step, four layers, 512 tokens", rows)
    rows = [{"leaves": n, **search(n)} for n in LEAVES]
    report.table("growth-leaves: finding the sites, over tracing the model", rows)
    rows = [{"tensors": n, **read(n)} for n in LEAVES]
    report.table("growth-tensors: peft.read, which `jlora inspect` prints", rows)


def search(leaves: int) -> dict[str, float]:
    """CPU time of `sites` and `init` over that of `jax.make_jaxpr`, of a model with many leaves."""
    params = {
        f"g{i}": {f"w{j}": np.zeros((2, 2)) for j in range(100)} for i in range(leaves // 100)
    }
    x, key = jnp.ones((1, 2)), jax.random.key(0)

    def seconds(make: Callable[[Any], Callable[..., Any]], *args: Any) -> float:
        """The least of three functions, each new, as JAX remembers what it has traced."""
        found = []
        for _ in range(3):
            call = make(lambda p, x: x @ p["g0"]["w0"])
            start = time.process_time()
            call(*args)
            found.append(time.process_time() - start)
        return min(found)

    def lora(f: Any) -> jlora.types.Transformed:
        return jlora.transform(f, jlora.LoRA("g0/w0", rank=1))

    floor = seconds(jax.make_jaxpr, params, x)
    found = {
        "sites": seconds(lambda f: lora(f).sites, params, x),
        "init": seconds(lambda f: lora(f).init, key, params, x),
    }
    return {"make_jaxpr s": floor} | {name: x / floor for name, x in found.items()}


def read(tensors: int) -> dict[str, float]:
    """CPU time of `peft.read` over that of copying each array to the device, of tiny matrices."""
    low = {}
    for i in range(tensors // 2):
        low[f"base_model.model.layers.{i}.q_proj.lora_A.weight"] = np.ones((1, 2), np.float32)
        low[f"base_model.model.layers.{i}.q_proj.lora_B.weight"] = np.ones((2, 1), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
        pathlib.Path(folder, "adapter_config.json").write_text(json.dumps(fields))
        save_file(low, f"{folder}/adapter_model.safetensors")
        start = time.process_time()
        jlora.peft.read(folder)
        middle = time.process_time()
        jax.block_until_ready(
            [jax.device_put(x) for x in load_file(f"{folder}/adapter_model.safetensors").values()]
        )
        floor = time.process_time() - middle
    return {"device_put s": floor, "read": (middle - start) / floor}


def measure(
    shape: model.Shape,
    rules: Mapping[int, list[jlora.LoRA]],
    rounds: int = 9,
    scan: bool = False,
) -> list[dict]:
    """A row for each rank, all beside the same floor."""
    lm = model.LM(shape, scan=scan)
    ids, params = model.batch_and_params(lm)
    tasks: dict[Any, steps.Task] = {"floor": steps.leaves_task(lm.apply, params, "norm")}
    tasks |= {n: steps.lora_task(lm.apply, params, rule, ids) for n, rule in rules.items()}
    programs = {n: task.compile_cold(ids) for n, task in tasks.items()}
    seconds = steps.interleave(programs, ids, rounds, str(shape))
    found = steps.compare(programs, seconds, "floor")
    return [
        {
            "rank": n,
            "time": ratios["time"],
            "FLOPs": ratios["FLOPs"],
            "compile s": programs[n].compile_s,
            "floor compile s": programs["floor"].compile_s,
        }
        for n, ratios in found.items()
    ]


# ---------------------------------------------------------------------------------------- exact


class Size(NamedTuple):
    """What is counted of a compiled program: FLOPs, and instructions of its HLO."""

    flops: float
    instructions: int


def check() -> None:
    """Asserts how the adapted step grows, on small models with few tokens."""
    few = model.Shape(layers=2, dim=64, heads=2, batch=2, length=8, vocab=128)
    rules = model.all_linear
    by_axis = {
        "rank": {r: count(few, rules(r)) for r in (8, 32, 64)},
        "rows": {n: count(few._replace(batch=n), rules(4)) for n in (1, 2, 4)},
        "layers": {n: count(few._replace(layers=n), rules(4)) for n in (1, 2, 3)},
        "scanned-layers": {n: count(few._replace(layers=n), rules(4), True) for n in (2, 8)},
    }
    for axis, sizes in by_axis.items():
        rows = [{axis: n, **size._asdict()} for n, size in sizes.items()]
        report.table(f"growth-{axis}: the adapted step, as counted", rows)
        if axis != "scanned-layers":
            _assert_affine({n: size.flops for n, size in sizes.items()})
    _assert_affine({n: size.instructions for n, size in by_axis["layers"].items()})
    scanned = {size.instructions for size in by_axis["scanned-layers"].values()}
    assert len(scanned) == 1, scanned


def count(shape: model.Shape, rules: list[jlora.LoRA], scan: bool = False) -> Size:
    """Sizes of the adapted step, from shapes alone."""
    lm = model.LM(shape, scan=scan)
    ids = jnp.zeros((shape.batch, shape.length + 1), jnp.int32)
    params = jax.eval_shape(lm.init, jax.random.key(0), ids[:, :-1])
    program = steps.lora_task(lm.apply, params, rules, ids).compile(ids)
    return Size(program.flops, program.compiled.as_text().count(" = "))


def _assert_affine(values: Mapping[int, float]) -> None:
    """Within 1% of the straight line through the first and the last point."""
    (x0, y0), *between, (x1, y1) = values.items()
    for x, y in between:
        line = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        assert abs(y - line) <= 0.01 * line, f"{y} at {x}, where a line has {line}"
