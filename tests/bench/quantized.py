"""The step on a base in 4 and 8 bits, over the same step on a base in float32."""

from typing import Any

import jlora
from jlora._progress import progress

from . import floor, model, report, steps

SHAPE = model.Shape(layers=4, dim=512, heads=8, batch=16, length=128)
SCHEMES = {
    "NF4": jlora.NF4(),
    "NF4, plain scales": jlora.NF4(double=False),
    "Int8": jlora.Int8(),
    "Int4": jlora.Int4(group=32),
    "FP8": jlora.FP8(),
}


def run(quick: bool) -> None:
    """A row for each mode and scheme; quick: one model, that it runs."""
    shape, rounds = (floor.TINY, 1) if quick else (SHAPE, 15)
    modes = progress(["scan+remat"] if quick else list(floor.MODES), "quantized")
    rows = [row for mode in modes for row in measure(shape, mode, rounds)]
    report.table("quantized: ratios to the same step on float32", rows)


def measure(shape: model.Shape, mode: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one model, all-linear at rank 8."""
    lm = model.LM(shape, **floor.MODES[mode])
    ids, params = model.batch_and_params(lm)
    sites = jlora.transform(lm.apply).sites(params, ids[:, :-1])
    bases = {name: jlora.quantize(params, s, sites=sites) for name, s in SCHEMES.items()}
    bases |= {"float32": params}
    rules, labels = model.all_linear(8), {"model": str(shape), "mode": mode}
    tasks = {name: steps.lora_task(lm.apply, base, rules, ids) for name, base in bases.items()}
    programs = {name: task.compile(ids) for name, task in tasks.items()}
    seconds = steps.interleave(programs, ids, rounds, f"{shape}, {mode}")
    found = steps.compare(programs, seconds, "float32")
    return [{**labels, "base": name, **ratios} for name, ratios in found.items()]
