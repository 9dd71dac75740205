"""Step time over the floor: the same step with the weights frozen and only norm scales trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

import jlora

from . import model, report, steps

SHAPES = (
    model.Shape(layers=4, dim=512, heads=8, batch=4, length=128),
    model.Shape(layers=6, dim=384, heads=12, batch=16, length=128),
)
TINY = model.Shape(layers=2, dim=64, heads=2, batch=2, length=32, vocab=128)
MODES = {
    "plain": {},
    "scan": {"scan": True},
    "remat": {"remat": True},
    "scan+remat": {"scan": True, "remat": True},
}


def run(quick: bool) -> None:
    """A row for each shape, mode, choice of sites and rank; quick: one model, that it runs."""
    shapes, ranks, rounds = ([TINY], (8,), 1) if quick else (SHAPES, (8, 64), 15)
    rows = []
    for shape in shapes:
        for mode in ("plain", "scan+remat") if quick else MODES:
            rows += measure(shape, mode, MODES[mode], ranks, rounds)
    report.table("floor: ratios to the frozen step", rows)
    if not quick:
        rest = [row["time"] for row in rows if row["trained"] != "full"]
        print(f"\nmedian {sorted(rest)[len(rest) // 2]:.3f}, largest {max(rest):.3f}")


def measure(
    shape: model.Shape, mode: str, flags: dict, ranks: Sequence[int], rounds: int
) -> list[dict]:
    """The rows of one model: full fine-tuning, q and v, all-linear by LoRA and by DoRA."""
    lm = model.LM(shape, **flags)
    ids, params = model.batch_and_params(lm)
    tasks = choices(lm.apply, params, ids, ranks=ranks) | kept_by_policy(lm, params, ids)
    dora = model.all_linear_dora(ranks[0])
    tasks[f"DoRA, all-linear r={ranks[0]}"] = steps.lora_task(lm.apply, params, dora, ids)
    return compare(tasks, ids, rounds, {"model": str(shape), "mode": mode})


def kept_by_policy(lm: model.LM, params: Any, batch: Any) -> dict[str, steps.Task]:
    """All-linear with `jlora.remat_policy` on each layer, where it has no other policy."""
    if lm.remat:
        return {}
    apply = lm.clone(remat=True, policy=jlora.remat_policy).apply
    task = steps.lora_task(apply, params, model.all_linear(8), batch)
    return {"all-linear r=8, policy": task}


def choices(
    apply: Callable[..., jax.Array],
    params: Any,
    batch: Any,
    *loss_and_inputs: Any,
    ranks: Sequence[int],
) -> dict[str, steps.Task]:
    """What may be trained: the norms ("floor"), everything, q and v, all-linear."""
    loss = loss_and_inputs[:1]
    tasks = {
        "floor": steps.leaves_task(apply, params, "norm", *loss),
        "full": steps.leaves_task(apply, params, "", *loss),
    }
    for name, rules in {"q, v": model.attention, "all-linear": model.all_linear}.items():
        for rank in ranks:
            task = steps.lora_task(apply, params, rules(rank), batch, *loss_and_inputs)
            tasks[f"{name} r={rank}"] = task
    return tasks


def compare(
    tasks: Mapping[str, steps.Task], batch: Any, rounds: int, labels: Mapping[str, str]
) -> list[dict]:
    """A row for each task but the one named "floor", which the ratios are to."""
    programs = {name: task.compile(batch) for name, task in tasks.items()}
    seconds = steps.interleave(programs, batch, rounds, ", ".join(labels.values()))
    ms = {"floor ms": steps.median(seconds["floor"])}
    found = steps.compare(programs, seconds, "floor")
    return [{**labels, "trained": name, **ratios, **ms} for name, ratios in found.items()]
