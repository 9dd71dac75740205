"""Bytes that XLA allocates for the same steps, over the floor's; programs are compiled only."""

import jax

from jlora._progress import progress

from . import floor, model, report, steps

LARGE = model.Shape(layers=8, dim=1024, heads=16, batch=1, length=128, vocab=2048)
DORA = "all-linear DoRA r=8"
LIMITS = {  # of temp over the floor's
    ("plain", "all-linear r=8"): 1.25,
    ("plain", "all-linear r=8, policy"): 1.15,
    ("scan", "all-linear r=8"): 1.25,
    ("scan", "all-linear r=8, policy"): 0.7,
    ("scan+remat", "all-linear r=8"): 1.15,
    ("plain", DORA): 1.4,  # an activation more where the model does not keep the result
    ("scan", DORA): 1.35,
    ("scan+remat", DORA): 1.25,
}
# Under remat the results of all sites are computed again, which their magnitudes' gradients need.
FLOPS = {"scan+remat": {DORA: 1.12}}


def run(quick: bool) -> None:
    """A row for each shape and mode; asserts what the all-linear step of `LARGE` may take.

    Quick: only what that needs.
    """
    shapes = [LARGE] if quick else [*floor.SHAPES, LARGE]
    bounded = {mode for mode, _ in LIMITS}
    modes = {k: v for k, v in floor.MODES.items() if k in bounded or not quick}
    work = [(shape, mode, flags, quick) for shape in shapes for mode, flags in modes.items()]
    rows = [row for args in progress(work, "memory") for row in measure(*args)]
    report.table("memory: XLA's temporary bytes over the frozen step's", rows)
    for row in rows:
        limit = LIMITS.get((row["mode"], row["trained"]))
        if limit is not None and row["model"] == str(LARGE):
            name = f"{row['mode']}, {row['trained']}"
            assert row["temp"] <= limit, f"{name}: temp {row['temp']:.3f} over {limit}"
            limit = FLOPS.get(row["mode"], {}).get(row["trained"], 1.01)
            assert row["over FLOPs"] <= limit, f"{name}: FLOPs {row['over FLOPs']:.3f}"


def measure(shape: model.Shape, mode: str, flags: dict, bounded: bool) -> list[dict]:
    """Rows of one model: full fine-tuning, q and v, all-linear; or only those with a limit."""
    lm = model.LM(shape, **flags)
    ids = model.token_ids(shape)
    params = jax.eval_shape(lm.init, jax.random.key(0), ids[:, :-1])
    tasks = floor.choices(lm.apply, params, ids, ranks=(8,))
    tasks |= {DORA: steps.lora_task(lm.apply, params, model.all_linear_dora(8), ids)}
    tasks |= floor.kept_by_policy(lm, params, ids)
    if bounded:
        tasks = {k: task for k, task in tasks.items() if k == "floor" or (mode, k) in LIMITS}
    programs = {name: task.compile(ids) for name, task in tasks.items()}
    base, found = programs["floor"].flops, steps.compare(programs, None, "floor")
    once = "scan" in flags
    return [
        {"model": str(shape), "mode": mode, "trained": name}
        | {"temp MB": programs[name].temp / 2**20, **ratios}
        | {"over FLOPs": programs[name].flops / (base + low_rank_flops(shape, once, name))}
        for name, ratios in found.items()
    ]


def low_rank_flops(shape: model.Shape, once: bool, trained: str) -> float:
    """Operations of six thin products for each site; XLA counts the body of a scan once."""
    widths = {"q, v r=8": 2 * 2, "all-linear r=8": 4 * 2 + 2 * 5}  # of dim
    layers = 1 if once else shape.layers
    width = widths.get(trained.removesuffix(", policy").replace("DoRA ", ""), 0)
    products = 6.0 * shape.batch * shape.length * 8 * width * shape.dim * layers
    # DoRA's norms: the squares of W and AᵀW, of all layers at once.
    return products + (trained == DORA) * (2 + 2 * 8) * 12 * shape.dim**2 * shape.layers
