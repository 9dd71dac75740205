"""Which rate, scale, rank, layers and batch? "LoRA Without Regret", measured on small models.

    export JAX_COMPILATION_CACHE_DIR=/tmp/compiled    # what one process compiles, others take
    # Memory that is kept when it is freed: with glibc, a quarter less time.
    export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1
    GLIBC_TUNABLES+=:glibc.malloc.trim_threshold=100000000000
    taskset -c 0 python examples/regret.py            # hours of a core; goes on where it ended
    python examples/regret.py --experiments first     # this one only
    python examples/regret_figures.py                 # table and pictures
    python examples/regret.py --advise --width 576 --batch 16    # what to try

    first      0.5 hours   the first 20 steps of SmolLM2-135M at all ranks, with s = 32/r and s = 2
    capacity   1.5 hours   how many bits a tiny GPT learns by heart, by rank
    long       2.0 hours   the same with 1,024 strings, in 8,000 steps
    rates      1.3 hours   the best rate of full fine-tuning, and of LoRA, by rank and scale
    layers     1.3 hours   all layers, attention or feed-forward alone, with as many parameters
    batches    1.3 hours   batches of 4 to 256 at equally many examples
    sentences  3.6 hours   as `batches`, on 2,000 held-out sentences and five seeds
    third      0.5 hours   the best rates of another model: a BERT of three layers
    forgetting 4.0 hours   what is learned and what is forgotten, by rank and method
    parts      3.8 hours   as `layers`, on four tasks and more held-out rows
    optimizers 4.0 hours   Adam, LoRA+ and preconditioning, by rank, on three tasks
    widths     5.0 hours   the best rate by width and depth: GPTs pretrained here learn the Bible
    reinforce  1.5 hours   SmolLM2-135M learns sums from right or wrong, at ranks of 1 to 128

The first seed's rates are half decades from the middle outward, as long as the loss falls, so that
the best one has a worse one on either side; further seeds run at these three. Those of `reinforce`
run at the best and the one above, those of `long`, `parts` and `sentences` at the better two. All
seeds of `forgetting` run at the best and at three below. In `reinforce` the loss is the share of
wrong answers in the last ten steps, so that no held-out sum chooses a rate. All settings have the
first seed before any has the second. A run adds a row to OUT/regret_runs.csv, or to its
experiment's own table, and is not repeated.
Several processes share the work: what one of them has taken, the others leave alone; at the end run
it once more. Runs that train together in one step took longer here than one after another: one is
large enough for a core.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import pathlib
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import data
import flax.linen as nn
import grpo
import jax
import numpy as np
import optax
import small_gpts
import tables
import trials
import variants
from advice import ADVISED, ALPHA, advise, sizes_of
from conversations import Text, lay
from models import gpt, smollm2
from progress import progress
from quickstart import Batch, take
from trials import Task

import jlora
from jlora import analysis
from jlora import initializers as starts

SCALE = 2.0  # s is this, or ALPHA / r
RATES = 7  # that are tried at most
EXAMPLES = 4096  # that a run with any batch sees
BEFORE = {"gpt": 512, "glosses": 256}  # rows of the text that a model has learned before
LOWER = 3  # rates of `forgetting` below the best
LONG = 8000  # steps of `long`
FIRST, REWARDED = 20, 32  # steps of `first`, and of `reinforce`
SHORT = 24  # tokens of its sentences, so that all batches are alike
ALPHABET, LENGTH = 64, 16  # of random strings
LAYERS = {
    "all": None,
    "attention": r"((encoder|layers)/.*(query|key|value|out)|h/attn/.*)/kernel",
    "feed-forward": r"((encoder|layers)/.*(gate|up|down)|h/mlp/.*)/kernel",
    "blocks": "h/.*kernel",  # of the tiny GPT, also for full fine-tuning
}
OUT = variants.OUT
OWN = "first", "forgetting", "reinforce"  # whose tables have other columns


class Setting(NamedTuple):
    """What the runs of a setting have in common; rank 0 is full fine-tuning."""

    experiment: str
    task: str
    rank: int
    layers: str
    scale: float
    batch: int
    method: str = "lora"  # with Adam; or what is otherwise: an optimizer, ranks, no KL term


# ---- the experiments ----------------------------------------------------------------------------


def scaled(experiment: str, task: str, rank: int, batch: int, layers: str = "all") -> Setting:
    """A setting with s = 32/r."""
    return Setting(experiment, task, rank, layers, round(ALPHA / (rank or ALPHA), 6), batch)


def rates(experiment: str) -> dict[Setting, int]:
    """All ranks with both scales, and full fine-tuning."""
    found = {}
    for rank in (16, 1, 256, 4, 64):
        own = scaled(experiment, "definitions", rank, 4)
        middle = round(-6 - 2 * np.log10(SCALE * rank / ALPHA))  # Adam's first ΔW: s·r·rate
        found |= {own: -6, own._replace(scale=SCALE): middle}
    return found | {scaled(experiment, "definitions", 0, 4): -8}


def layers() -> dict[Setting, int]:
    """All layers, and parts of them with ranks of equally many parameters."""
    ranks = ("definitions", 4, (8, 21, 13)), ("order", 16, (9, 20, 16))
    return {
        scaled("layers", task, rank, batch, name): -6
        for task, batch, each in ranks
        for name, rank in zip(LAYERS, each, strict=False)
    }


def batches(experiment: str, task: str) -> dict[Setting, int]:
    """Two ranks and full fine-tuning, with batches of all sizes; larger ones take larger steps."""
    middles = (4, -7), (64, -7), (0, -9)
    sizes = enumerate((4, 16, 64, 256))
    return {scaled(experiment, task, r, n): m + i for i, n in sizes for r, m in middles}


def capacity() -> dict[Setting, int]:
    """Ranks and full fine-tuning, with few strings and with many."""
    # Low ones: where all three rates diverge, none of them says which way to go.
    middles = (1, -5), (4, -5), (16, -5), (0, -5), (2, -5), (8, -5)
    return {
        scaled("capacity", f"strings-{n}", rank, min(n, 64), "blocks"): middle
        for n in (64, 256, 1024, 16, 128, 512)
        for rank, middle in middles
    }


def widths() -> dict[Setting, int]:
    """Two ranks and full fine-tuning, at all widths and depths."""
    sizes = (128, 4), (64, 4), (256, 4), (128, 2), (128, 8), (512, 4)
    return {
        scaled("widths", f"gpt-{width}x{depth}", rank, 16): -5 if rank else -6
        for width, depth in sizes
        for rank in (8, 64, 0)
    }


OPTIMIZERS = {"lora": -6, "lora_plus": -7, "preconditioned": -6}


def optimizers(task: str, batch: int) -> dict[Setting, int]:
    """Three optimizers at four ranks."""
    return {
        scaled("optimizers", task, rank, batch)._replace(method=method): middle
        for rank in (8, 2, 32, 128)
        for method, middle in OPTIMIZERS.items()
    }


def forgetting() -> dict[Setting, int]:
    """Ranks and full fine-tuning of two models, and two methods on the smaller one."""
    small, large = ("gpt-256x4", 16), ("glosses", 4)
    found = {
        scaled("forgetting", task, rank, batch): -5 if rank else -7
        for task, batch in (small, large)
        for rank in (8, 1, 64, 256, 0)
    }
    eight = scaled("forgetting", small[0], 8, small[1])
    return found | {eight._replace(method="dora"): -5, eight._replace(method="pissa"): -7}


def parts() -> dict[Setting, int]:
    """As `layers`, on four tasks, with 500 to 2,200 held-out rows."""
    ranks = {
        ("gpt-256x4", 16): (8, 21, 13),
        ("order", 16): (9, 20, 16),
        ("sentences", 16): (9, 20, 16),
        ("glosses", 4): (8, 21, 13),
    }
    return {
        scaled("parts", task, rank, batch, name): -6
        for (task, batch), each in ranks.items()
        for name, rank in zip(LAYERS, each, strict=False)
    }


def long() -> dict[Setting, int]:
    """Ranks and full fine-tuning with the most strings, in four times as many steps."""
    ranks = 8, 1, 32, 0, 2, 4, 16
    return {scaled("long", "strings-1024", rank, 64, "blocks"): -5 for rank in ranks}


REWARDS = {"free": "--beta=0", "allocated": "--allocate"}  # methods of `reinforce`
PLANS = {  # the settings of an experiment, each with the middle of its rates, and the seeds
    "first": ({x: -6 if x.rank else -8 for x in rates("first")}, 3),
    "capacity": (capacity(), 5),
    "long": (long(), 5),
    "rates": (rates("rates"), 3),
    "layers": (layers(), 5),
    "batches": (batches("batches", "movies"), 2),
    "third": ({scaled("third", "paraphrase", r, 16): -6 if r else -8 for r in (8, 64, 0)}, 5),
    "sentences": (batches("sentences", "sentences"), 5),
    "widths": (widths(), 3),
    "optimizers": (
        optimizers("movies", 16) | optimizers("order", 16) | optimizers("gpt-128x4", 16),
        2,
    ),
    "forgetting": (forgetting(), 2),
    "parts": (parts(), 5),
    "reinforce": (
        {scaled("reinforce", "sums", r, 32): -8 if r else -10 for r in (8, 1, 128, 0)}
        | {scaled("reinforce", "sums", 8, 32)._replace(method=x): -8 for x in REWARDS},
        3,
    ),
}


def strings(count: int, batch: int) -> Task:
    """Random strings of `LENGTH` letters to learn by heart, each after two that number it."""
    numbers = np.stack(np.divmod(np.arange(count), ALPHABET), 1)
    letters = np.random.default_rng(count).integers(ALPHABET, size=(count, LENGTH))
    ids = np.concatenate([numbers, letters], 1).astype(np.int32)
    marks = np.broadcast_to(np.arange(ids.shape[1]) > 1, ids.shape).astype(np.float32)
    rows, size = Batch(ids, np.ones_like(ids), marks), ids.shape[1]
    model = gpt.GPT(gpt.Config(ALPHABET, size, layers=2, dim=32, heads=2))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids[:1]))
    params["params"]["ln_f"]["scale"] *= 4  # else no logit, of a frozen table, is large enough
    return Task(
        model.apply, params, lambda rows: (rows.ids,), trials.score_tokens, (), rank=4, rate=-5,
        steps=2000, batch=batch, train=rows, validation=rows, held_out=rows, widths=(size,),
    )  # fmt: skip


def bible(width: int, depth: int) -> Task:
    """The Bible, by a GPT that has seen other English."""
    config, variables = small_gpts.load(width, depth)
    train, test = map(_as_batch, small_gpts.bible())
    return Task(
        gpt.GPT(config).apply, variables, lambda rows: (rows.ids,), trials.score_tokens, (),
        rank=8, rate=-5, steps=128, batch=16, train=take(train, slice(512, None)),
        validation=take(train, slice(512)), held_out=take(test, slice(1024)),
        widths=(small_gpts.LENGTH,),
    )  # fmt: skip


def before(setting: Setting) -> Batch:
    """The text that a task's model has learned before: glosses, or English sentences."""
    if setting.task.startswith("gpt"):
        return take(_as_batch(small_gpts.glosses()[1]), slice(BEFORE["gpt"]))
    *_, tokenizer = smollm2.load(data.smollm2())
    sentences = data.snippets("editorials")[1][: BEFORE[setting.task]]
    found = [np.array(tokenizer(x.text)["input_ids"][:64], np.int32) for x in sentences]
    rows = lay([[Text([], ids, np.ones(len(ids), np.float32))] for ids in found])
    return Batch(rows.ids, rows.segments, rows.counts)


def _as_batch(ids: np.ndarray) -> Batch:
    """Rows of text of which every token counts."""
    return Batch(ids, np.ones_like(ids), np.ones(ids.shape, np.float32))


SENTENCES = {  # tasks of all batches
    "movies": trials.movies,
    "sentences": trials.sentences,
    "paraphrase": functools.partial(trials.sentences, load=trials.paraphrase),
}


@functools.lru_cache(1)
def make_task(setting: Setting) -> Task:
    """What a setting learns, in the steps and batches that it does."""
    batch = setting.batch
    if setting.task in SENTENCES:
        return SENTENCES[setting.task](SHORT, EXAMPLES // batch, batch, widths=(SHORT,))
    if setting.task.startswith("strings"):
        steps = LONG if setting.experiment == "long" else 2000
        return strings(int(setting.task.partition("-")[2]), batch)._replace(steps=steps)
    if setting.task.startswith("gpt"):
        return bible(*sizes_of(setting.task))
    if setting.task == "glosses":
        return trials.glosses()
    task = trials.TASKS[setting.task]()
    if setting.experiment == "first":
        task = task._replace(steps=FIRST, schedule=lambda steps: optax.constant_schedule(1.0))
    return task


def make_setup(setting: Setting, task: Task) -> variants.Setup:
    """What a setting trains, and how."""
    pattern, rank = LAYERS[setting.layers], setting.rank
    rule = variants.lora(pattern, rank, setting.scale) if rank else jlora.Full(pattern or "params")
    how = {
        "lora": {},
        "lora_plus": {"after": (jlora.lora_plus(16.0),)},
        "preconditioned": {"before": (jlora.precondition(1e-6),)},
    }
    if setting.method == "dora":
        rule = jlora.DoRA(pattern, rank=rank, alpha=setting.scale * rank)
    elif setting.method == "pissa":
        rule = variants.lora(pattern, rank, setting.scale, init=starts.pissa_niter(16))
    return variants.Setup((*task.head, rule), **how.get(setting.method, {}))


# ---- runs ---------------------------------------------------------------------------------------


def processor() -> str:
    """The widest instructions of the processor."""
    path = pathlib.Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.exists() else []
    return next((x for x in ("amx_tile", "avx512f", "avx2") if x in flags), platform.machine())


@functools.lru_cache(1)
def make_train(setting: Setting) -> Callable[[float, int], dict[str, Any]]:
    """Runs of a setting, a function of rate and seed to columns of the table."""
    if setting.experiment == "reinforce":
        return functools.partial(reinforce, setting)
    task = make_task(setting._replace(rank=0, layers="all", scale=1.0, method="lora"))
    variant = variants.Variant("", functools.partial(make_setup, setting))
    runner = variants.make_runner(task, variant)

    def train(rate: float, seed: int) -> dict[str, Any]:
        found = {"steps": task.steps, **runner(rate, seed), "processor": processor()}
        return found | numbered("loss", runner.curve if setting.experiment == "first" else ())

    return forget(setting, task, runner) if setting.experiment == "forgetting" else train


def forget(setting: Setting, task: Task, runner: trials.Runner) -> Callable[..., dict[str, Any]]:
    """Runs of a setting, with the losses on the text of before and, untrained, on the new one."""
    old, untrained = before(setting), {}

    def train(rate: float, seed: int) -> dict[str, Any]:
        found = {}

        def watch(step: int, trained: Any, base: Any) -> None:
            loss = lambda rows: round(runner.evaluate(trained, base, rows)[0], 5)  # noqa: E731
            if not untrained:
                untrained.update(new_before=loss(task.held_out), old_before=loss(old))
            if step == task.steps:
                found["old_after"] = loss(old)
                found["intruders"] = count_intruders(task.params, jlora.merge(base, trained))

        columns = {"steps": task.steps, **runner(rate, seed, watch)}
        return columns | untrained | found | {"processor": processor()}

    return train


def count_intruders(before: Any, after: Any) -> float:
    """Of the ten largest directions of a weight, how many are none of its own; the mean."""

    def count(path: Any, old: Any, new: Any) -> list[int]:
        if "kernel" not in str(path[-1]):
            return []
        flat = lambda x: x.reshape(*x.shape[:2], -1) if x.ndim > 2 else x  # noqa: E731
        found = analysis.intruder_dimensions(flat(old), flat(new - old))
        return np.asarray(found).sum(-1).ravel().tolist()

    counts = jax.tree_util.tree_map_with_path(count, before, after)
    return float(np.mean(jax.tree.leaves(counts)))


def numbered(name: str, curve: Any) -> dict[str, float]:
    """A column for each step."""
    return {f"{name}_{i}": round(float(x), 5) for i, x in enumerate(curve, 1)}


def rewarded(options: Sequence[str], *known: Any) -> tuple[int, tables.Row, list[tables.Row]]:
    """A run of `grpo.py`: how many parameters train, its result and its steps."""
    with tempfile.TemporaryDirectory() as out:
        state = grpo.main([f"--out={out}", *options], *known)
        result, steps = (tables.read(pathlib.Path(out) / f"{x}.csv") for x in ("result", "steps"))
    return jlora.count(state.adapter), result[0], steps


@functools.cache
def untrained() -> tuple[Any, dict[str, float]]:
    """The model, and its score before training, which is that of all ranks."""
    model = smollm2.load(data.smollm2())
    _, result, _ = rewarded(["--steps=0"], model)
    return model, {name: x for name, x in result.items() if name.endswith("_before")}


def reinforce(setting: Setting, rate: float, seed: int) -> dict[str, Any]:
    """Columns of a run on rewards; `validation` is the share of wrong answers at its end."""
    (model, before), start = untrained(), time.process_time()
    rank = f"--rank={setting.rank}" if setting.rank else "--full"
    sizes = f"--groups={setting.batch // 8}", f"--steps={REWARDED}"
    options = (
        rank,
        *(option for method, option in REWARDS.items() if method == setting.method),
        f"--rate={rate}",
        f"--seed={seed}",
        *sizes,
        f"--save-every={REWARDED + 1}",
    )
    trained, result, steps = rewarded(options, model, before)
    rewards, kl = np.array([(row["reward"], row["kl"]) for row in steps]).T
    found = {"steps": REWARDED, "trained": trained, "validation": 1 - rewards[-10:].mean()}
    found |= {k: x for k, x in result.items() if k.endswith(("_before", "_after"))}
    found |= {"kl": kl.max(), "seconds": round(time.process_time() - start, 1)}
    found = {name: round(x, 6) for name, x in found.items()}
    return found | {"processor": processor()} | numbered("reward", rewards)


# ---- all runs -----------------------------------------------------------------------------------


def run(path: pathlib.Path, setting: Setting, middle: int, seed: int) -> None:
    """Runs what has not been run of a setting with a seed; see the module."""
    train = lambda *args: make_train(setting)(*args)  # noqa: E731
    loss = functools.partial(trials.run_once, path, train, setting._asdict())
    if setting.experiment == "first":
        loss(middle, seed)
        return
    best = trials.best_rate(loss, middle, RATES)
    rates = {"reinforce": (best, best + 1), "forgetting": range(best, best - LOWER - 1, -1)}
    if setting.experiment in ("long", "parts", "sentences"):
        score = lambda rate: np.nan_to_num(loss(rate, 0), nan=np.inf)  # noqa: E731
        rates[setting.experiment] = best, min((best + 1, best - 1), key=score)
    for rate in rates.get(setting.experiment, (best, best + 1, best - 1)):
        loss(rate, seed)


@contextlib.contextmanager
def claim(path: pathlib.Path, setting: Setting) -> Iterator[bool]:
    """Whether no other process of this machine has a setting of a table; then this one has it."""
    name = hashlib.sha256(f"{path.resolve()} {setting}".encode()).hexdigest()
    folder = pathlib.Path(tempfile.gettempdir()) / "jlora-regret"
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what has not been run; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiments", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--seeds", type=int, default=5, help="at most")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--advise", action="store_true", help="runs nothing, says what to try")
    for name, what in ADVISED.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what}; for --advise")
    args = parser.parse_args(argv)
    if args.advise:
        sizes = {name: getattr(args, name) for name in ADVISED}
        if absent := [
            f"--{name} ({what})" for name, what in ADVISED.items() if sizes[name] is None
        ]:
            parser.error(f"--advise knows no model: give {' and '.join(absent)}")
        if small := [f"--{name}={n}" for name, n in sizes.items() if n < 1]:
            parser.error(f"{', '.join(small)}: expected 1 or more")
        print(advise(tables.read(args.out / "regret.csv"), **sizes), end="")
        return
    for name in args.experiments:
        path = args.out / f"regret_{name if name in OWN else 'runs'}.csv"
        settings, seeds = PLANS[name]
        progress.write("\n".join(re.findall(rf"^ +({name} .*)", __doc__ or "", re.M)))
        for seed in range(min(args.seeds, seeds)):
            for setting, middle in settings.items():
                with claim(path, setting) as is_free:
                    if is_free:
                        run(path, setting, middle, seed)


if __name__ == "__main__":
    main()
