"""Step time over the floor: the same step with the weights frozen and only norm scales trained."""

import pathlib

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


def run(quick: bool, out: pathlib.Path | None) -> None:
    """A row for each shape, mode, choice of sites and rank."""
    rows = []
    for shape in [TINY] if quick else SHAPES:
        for mode, flags in MODES.items():
            rows += measure(shape, mode, flags, rounds=3 if quick else 15)
    report.table("floor: ratios to the frozen step", rows, out)
    if not quick:
        rest = [row["time"] for row in rows if row["trained"] != "full"]
        print(f"\nmedian {sorted(rest)[len(rest) // 2]:.3f}, largest {max(rest):.3f}")


def measure(shape: model.Shape, mode: str, flags: dict, rounds: int) -> list[dict]:
    """The rows of one model: full fine-tuning, q and v, all-linear, at rank 8 and 64."""
    lm = model.LM(shape, **flags)
    ids, params = model.batch_and_params(lm)
    tasks = {
        "floor": steps.leaves_task(lm.apply, params, "norm"),
        "full": steps.leaves_task(lm.apply, params, ""),
    }
    for name, rules in {"q, v": model.attention, "all-linear": model.all_linear}.items():
        for rank in (8, 64):
            tasks[f"{name} r={rank}"] = steps.lora_task(lm.apply, params, rules(rank), ids)
    programs = {name: task.compile(ids) for name, task in tasks.items()}
    seconds = steps.interleave(programs, ids, rounds, f"{shape}, {mode}")
    floor = programs["floor"]
    return [
        {
            "model": str(shape),
            "mode": mode,
            "trained": name,
            "time": steps.ratio(seconds[name], seconds["floor"]),
            "FLOPs": program.flops / floor.flops,
            "temp": program.temp / floor.temp,
            "floor ms": 1e3 * float(sorted(seconds["floor"])[rounds // 2]),
        }
        for name, program in programs.items()
        if name != "floor"
    ]
