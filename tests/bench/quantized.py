"""The step on a base in 4 and 8 bits, over the same step on a base in float32 and in bfloat16."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

import jlora

from . import floor, model, report, steps

SHAPES = (
    model.Shape(layers=4, dim=512, heads=8, batch=4, length=128),
    model.Shape(layers=4, dim=512, heads=8, batch=16, length=128),
)
SCHEMES = {
    "NF4": jlora.NF4(),
    "NF4, plain scales": jlora.NF4(double=False),
    "Int8": jlora.Int8(),
    "Int4": jlora.Int4(group=32),
    "FP8": jlora.FP8(),
}


def run(quick: bool, out: pathlib.Path | None) -> None:
    """A row for each shape, mode and scheme; quick: one model, that it runs."""
    shapes, rounds = ([floor.TINY], 1) if quick else (SHAPES, 15)
    modes = ["scan+remat"] if quick else list(floor.MODES)
    work = [(shape, mode) for shape in shapes for mode in modes]
    rows = []
    for shape, mode in tqdm(work, "quantized", disable=None):
        rows += measure(shape, mode, rounds)
    report.table("quantized: ratios to the same step on float32 and on bfloat16", rows, out)


def measure(shape: model.Shape, mode: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model, all-linear at rank 8."""
    lm = model.LM(shape, **floor.MODES[mode])
    ids, params = model.batch_and_params(lm)
    sites = jlora.transform(lm.apply).sites(params, ids[:, :-1])
    bases = {"float32": params, "bfloat16": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)}
    bases |= {name: jlora.quantize(params, s, sites=sites) for name, s in SCHEMES.items()}
    rules = model.all_linear(8)
    tasks = {name: steps.lora_task(lm.apply, base, rules, ids) for name, base in bases.items()}
    programs = {name: task.compile(ids) for name, task in tasks.items()}
    seconds = steps.interleave(programs, ids, rounds, f"{shape}, {mode}")
    labels, whole = {"model": str(shape), "mode": mode}, programs["float32"]
    return [
        {**labels, "base": name, **ratios}
        | {"over bf16": steps.ratio(seconds[name], seconds["bfloat16"])}
        | {"compile s": programs[name].compile_s / whole.compile_s}
        for name, ratios in steps.compare(programs, seconds, "float32").items()
    ]
