"""Step time over the floor: the same step with the weights frozen and only norm scales trained."""

import pathlib

import jax

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
    size = (shape.batch, shape.length + 1)
    ids = jax.random.randint(jax.random.key(1), size, 0, shape.vocab)
    params = jax.jit(lm.init)(jax.random.key(0), ids[:, :-1])
    programs = {
        "floor": steps.train_leaves(lm.apply, params, "norm", ids),
        "full": steps.train_leaves(lm.apply, params, "", ids),
    }
    for name, rules in {"q, v": model.attention, "all-linear": model.all_linear}.items():
        for rank in (8, 64):
            programs[f"{name} r={rank}"] = steps.train_lora(lm.apply, params, rules(rank), ids)
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
