"""How a step's time and its compilation grow: with layers, tokens, rank and adapted sites."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import jlora

from . import model, report, steps

DIM, HEADS, LENGTH, RANK = 256, 4, 128, 8
LAYERS = (2, 4, 8, 16, 32)
TOKENS = (128, 256, 512, 1024, 2048, 4096)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SITES = (1, 2, 4, 8, 16, 24)  # of four layers of six kernels


def run(quick: bool, out: pathlib.Path | None) -> None:
    """A table for each axis; quick: what is exact, asserted."""
    if quick:
        check()
        return
    axes = {"layers": layers, "tokens": tokens, "rank": ranks, "sites": sites}
    for axis, measured in axes.items():
        report.table(f"growth-{axis}: ratios to the frozen step", measured(), out)


# ---------------------------------------------------------------------------------------- axes


def layers(rounds: int = 9) -> list[dict]:
    """By the number of layers, scanned and one by one: 256 tokens, all-linear, rank 8."""
    rows = []
    for scan in (False, True):
        for n in LAYERS:
            shape = model.Shape(n, DIM, HEADS, batch=2, length=LENGTH)
            mode = "scan" if scan else "plain"
            [row] = measure(shape, {n: model.all_linear(RANK)}, "layers", rounds, scan=scan)
            rows.append({"mode": mode, **row})
    return rows


def tokens(rounds: int = 9) -> list[dict]:
    """By the number of tokens in a batch: four layers, all-linear, rank 8."""
    rows = []
    for n in TOKENS:
        shape = model.Shape(4, DIM, HEADS, batch=n // LENGTH, length=LENGTH)
        rows += measure(shape, {n: model.all_linear(RANK)}, "tokens", rounds)
    return rows


def ranks(rounds: int = 15) -> list[dict]:
    """By the rank of every site: four layers, 512 tokens, all-linear."""
    shape = model.Shape(4, DIM, HEADS, batch=4, length=LENGTH)
    return measure(shape, {r: model.all_linear(r) for r in RANKS}, "rank", rounds)


def sites(rounds: int = 15) -> list[dict]:
    """By the number of adapted kernels, from the first layer on: four layers, 512 tokens."""
    shape = model.Shape(4, DIM, HEADS, batch=4, length=LENGTH)
    _, params = model.batch_and_params(model.LM(shape))
    kernels = [k for k in flatten_dict(params, sep="/") if k.endswith("/kernel")]
    rules = {n: [jlora.LoRA(_any(kernels[:n]), rank=RANK, alpha=16)] for n in SITES}
    return measure(shape, rules, "sites", rounds)


def _any(paths: Sequence[str]) -> str:
    return "^(" + "|".join(map(re.escape, paths)) + ")$"


def measure(
    shape: model.Shape,
    rules: Mapping[int, list[jlora.LoRA]],
    axis: str,
    rounds: int,
    scan: bool = False,
) -> list[dict]:
    """A row for each choice of rules, all beside the same floor."""
    lm = model.LM(shape, scan=scan)
    ids, params = model.batch_and_params(lm)
    tasks: dict[Any, steps.Task] = {"floor": steps.leaves_task(lm.apply, params, "norm")}
    tasks |= {n: steps.lora_task(lm.apply, params, rule, ids) for n, rule in rules.items()}
    programs = {n: task.compile_cold(ids) for n, task in tasks.items()}
    seconds = steps.interleave(programs, ids, rounds, f"{axis}: {shape}")
    floor = programs["floor"]
    return [
        {
            axis: n,
            "time": steps.ratio(seconds[n], seconds["floor"]),
            "ms": 1e3 * float(np.median(seconds[n])),
            "floor ms": 1e3 * float(np.median(seconds["floor"])),
            "FLOPs": programs[n].flops / floor.flops,
            "trace s": programs[n].trace_s,
            "compile s": programs[n].compile_s,
            "floor trace s": floor.trace_s,
            "floor compile s": floor.compile_s,
        }
        for n in rules
    ]


# ---------------------------------------------------------------------------------------- exact


class Size(NamedTuple):
    """What is counted of a compiled program: FLOPs, and instructions of its HLO."""

    flops: float
    instructions: int


def check() -> None:
    """Asserts how the adapted step grows, on small models with few tokens."""
    few = model.Shape(layers=2, dim=64, heads=2, batch=2, length=8, vocab=128)
    by_rank = {r: count(few, model.all_linear(r)) for r in (8, 32, 64)}
    _show("rank", by_rank)
    _assert_affine({r: size.flops for r, size in by_rank.items()})

    by_rows = {n: count(few._replace(batch=n), model.all_linear(4)) for n in (1, 2, 4)}
    _show("rows", by_rows)
    _assert_affine({n: size.flops for n, size in by_rows.items()})

    by_layers = {n: count(few._replace(layers=n), model.all_linear(4)) for n in (1, 2, 3)}
    _show("layers", by_layers)
    _assert_affine({n: size.flops for n, size in by_layers.items()})
    _assert_affine({n: size.instructions for n, size in by_layers.items()})

    scanned = {n: count(few._replace(layers=n), model.all_linear(4), True) for n in (2, 8)}
    _show("scanned-layers", scanned)
    assert len({size.instructions for size in scanned.values()}) == 1, scanned

    rules = {n: [jlora.LoRA(f"layer_[0-{n - 1}]/up/kernel", rank=4, alpha=16)] for n in (1, 2, 3)}
    by_sites = {n: count(few._replace(layers=3), rule) for n, rule in rules.items()}
    _show("sites", by_sites)
    _assert_affine({n: size.flops for n, size in by_sites.items()})


def count(shape: model.Shape, rules: list[jlora.LoRA], scan: bool = False) -> Size:
    """Sizes of the adapted step, from shapes alone."""
    lm = model.LM(shape, scan=scan)
    ids = jnp.zeros((shape.batch, shape.length + 1), jnp.int32)
    params = jax.eval_shape(lm.init, jax.random.key(0), ids[:, :-1])
    program = steps.lora_task(lm.apply, params, rules, ids).compile(ids)
    return Size(program.flops, program.compiled.as_text().count(" = "))


def _show(axis: str, sizes: Mapping[int, Size]) -> None:
    rows = [{axis: n, **size._asdict()} for n, size in sizes.items()]
    report.table(f"growth-{axis}: the adapted step, as counted", rows, None)


def _assert_affine(values: Mapping[int, float]) -> None:
    """Within 1% of the straight line through the first and the last point."""
    (x0, y0), *between, (x1, y1) = values.items()
    for x, y in between:
        line = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        assert abs(y - line) <= 0.01 * line, f"{y} at {x}, where a line has {line}"
