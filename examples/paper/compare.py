"""Compare LoRA with its rivals on movie reviews: accuracy, memory, time and latency.

    taskset -c 0 python examples/paper compare         # 2.5 hours of a core; goes on where it ended
    python examples/paper compare --methods lora full  # these only: processes can share the work

MiniLM learns the sentiment of the reviews, by each of `methods.METHODS`, with a head trained in
full. Every method sees the same number of sentences. Its learning rate is the one, among half
decades, whose accuracy is best on sentences set aside from the training ones; then come more seeds.
A run is one line of OUT/methods_runs.csv and takes place once. When all have run, `compare_costs`
measures the rest, and `compare_table` puts everything into OUT/methods.csv and OUT/methods.png.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import optax
import quickstart
import trials
from quickstart import LENGTH, WEIGHT_DECAY
from trials import Runner, Task

import jlora

from . import compare_costs, compare_table
from .methods import METHODS, Method

STEPS = 128
BATCH = 32
SEEDS = 5
OUT = pathlib.Path(__file__).parent / "results"


class Setting(NamedTuple):
    """How a method is run.

    Attributes:
        sizes: of the method; the budget is that of LoRA on queries and values with r = 8, 73,728
            parameters, for those that can have it.
        rate: the middle of the learning rates, in half decades; see `trials.to_rate`.
    """

    sizes: Mapping[str, Any]
    rate: int


SETTINGS = {  # what matters most comes first
    "lora": Setting({"rank": 8}, -5),
    "full": Setting({}, -8),
    "adapter_h": Setting({"bottleneck": 8}, -5),
    "pre_layer": Setting({"l_p": 32}, -4),
    "bitfit": Setting({}, -5),
    "lora_all": Setting({"rank": 2, "alpha": 4.0}, -5),
    "adapter_l": Setting({"bottleneck": 16}, -5),
    "pre_embed": Setting({"l_p": 16}, -3),
    "prompt": Setting({"l_p": 16}, -3),
}


def build(model: nn.Module, name: str) -> Method:
    """The method of that name at its sizes, with a head."""
    return METHODS[name](model, jlora.Full("classifier"), **SETTINGS[name].sizes)


def movies() -> Task:
    """Sentences of movie reviews, cut to `LENGTH` tokens, in batches of one width each."""
    return trials.movies(LENGTH, STEPS, BATCH, cut=True, widths=(24, 32, LENGTH))


def make_runner(model: nn.Module, task: Task, name: str) -> Runner:
    """Runs of a method. Its optimizer gets what is trained alone, in which nothing is frozen."""
    method = build(model, name)
    tx = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(WEIGHT_DECAY))
    return Runner(task, method.init, method.apply, tx)


def columns(runner: Runner) -> Callable[[float, int], dict[str, Any]]:
    """A run as the columns of the table; validation and held-out scores are accuracies."""

    def train(rate: float, seed: int) -> dict[str, Any]:
        found, task = runner(rate, seed), runner.task
        scores = {name: found[f"{name}_right"] for name in ("validation", "held_out")}
        row = {"steps": task.steps, "batch": task.batch, **scores, "loss": found["loss"]}
        return {k: round(v, 4) for k, v in row.items()} | {"seconds": found["seconds"]}

    return train


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what has not been run; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, help="only the runs of these")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at the best rate")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)

    model, task = quickstart.load()[0], movies()
    runners = {name: make_runner(model, task, name) for name in args.methods or SETTINGS}
    best = {}
    for name, runner in runners.items():
        score = functools.partial(
            trials.run_once, args.out / "methods_runs.csv", columns(runner), {"method": name}
        )
        rate = trials.best_rate(lambda *run, score=score: -score(*run), SETTINGS[name].rate)
        best[name] = functools.partial(score, rate)
    for seed in range(1, args.seeds):
        for run in best.values():
            run(seed)
    if args.methods is None:
        compare_costs.measure(args.out, model, task.params, runners)
        compare_table.write(args.out)
