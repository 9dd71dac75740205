"""Compare LoRA with its rivals on movie reviews: accuracy, memory, time and latency.

    taskset -c 0 python examples/compare.py         # 2.5 hours of a core; goes on where it ended
    python examples/compare.py --methods lora full  # these only: processes can share the work

MiniLM learns what `quickstart.py` teaches it, by each of `methods.METHODS`, with a head trained in
full. Every method sees the same number of sentences. Its learning rate is the one, among half
decades, whose accuracy is best on sentences set aside from the training ones; then come more seeds.
A run is one line of OUT/methods_runs.csv, and done once. `compare_costs.py` measures the rest when
all have run, and `compare_table.py` puts everything into OUT/methods.csv and OUT/methods.png.

Letters in the shapes: N sentences, B sentences in a batch, L tokens.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import compare_costs
import compare_table
import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import quickstart
from methods import METHODS, Method
from models import bert
from quickstart import LENGTH, MARGIN, WARMUP, WEIGHT_DECAY, Batch, take
from tables import append
from tqdm import tqdm

import jlora

STEPS = 128
BATCH = 32
SEEDS = 5
VALIDATION = 1000  # of the training sentences
WIDTHS = (24, 32, LENGTH)  # tokens that batches are padded to
MOST_RATES = 5
OUT = pathlib.Path(__file__).parent / "results"


class Setting(NamedTuple):
    """How a method is run.

    Attributes:
        sizes: of the method; the budget is that of LoRA on queries and values with r = 8, 73,728
            parameters, for those that can have it.
        rate: the middle of the learning rates, in half decades; see `to_rate`.
    """

    sizes: Mapping[str, Any]
    rate: int


SETTINGS = {  # what matters most comes first
    "lora": Setting({"rank": 8}, -5),
    "full": Setting({}, -8),
    "adapter_h": Setting({"bottleneck": 8}, -5),
    "pre_layer": Setting({"l_p": 16, "l_i": 16}, -4),
    "bitfit": Setting({}, -5),
    "lora_all": Setting({"rank": 2, "alpha": 4.0}, -5),
    "adapter_l": Setting({"bottleneck": 16}, -5),
    "pre_embed": Setting({"l_p": 8, "l_i": 8}, -3),
    "prompt": Setting({"l_p": 16}, -3),
}


def to_rate(half_decades: int) -> float:
    """The learning rate 10^(n/2) to one digit: …, 1e-3, 3e-3, 1e-2, …."""
    return float(f"{10 ** (half_decades / 2):.0e}")


def build(model: bert.Bert, name: str) -> Method:
    """The method of that name at its sizes, with a head."""
    return METHODS[name](model, jlora.Full("classifier"), **SETTINGS[name].sizes)


# ---- data ---------------------------------------------------------------------------------------


class Data(NamedTuple):
    """The sentences."""

    train: Batch
    validation: Batch
    held_out: Batch


def load(held_out: int) -> tuple[bert.Bert, dict[str, Any], Data]:
    """MiniLM with a head of zeros, its variables, and the sentences."""
    model, variables, tokenizer = quickstart.load()
    train, test = (quickstart.encode(tokenizer, part) for part in data.movie_snippets(MARGIN))
    parts = take(train, slice(VALIDATION, None)), take(train, slice(min(held_out, VALIDATION)))
    return model, {"params": variables["params"]}, Data(*parts, take(test, slice(held_out)))


def widths(batch: Batch) -> np.ndarray:
    """The width that each sentence is padded to: ``(N,)``."""
    return np.array(WIDTHS)[np.searchsorted(WIDTHS, batch.mask.sum(1))]


def narrow(batch: Batch, width: int) -> Batch:
    """The batch without the padding beyond `width`."""
    return Batch(batch.ids[:, :width], batch.mask[:, :width], batch.labels)


def draw(width: np.ndarray, steps: int, size: int, seed: int) -> list[np.ndarray]:
    """Which sentences each step sees, all of one width: one shuffle after the other."""
    rng, batches = np.random.default_rng(seed), []
    while len(batches) < steps:
        order = rng.permutation(len(width))
        alike = [order[width[order] == w] for w in np.unique(width)]
        cuts = [(rows, i) for rows in alike for i in range(0, len(rows) - size + 1, size)]
        batches += [cuts[i][0][cuts[i][1] :][:size] for i in rng.permutation(len(cuts))]
    return batches[:steps]


# ---- one run ------------------------------------------------------------------------------------


def make_step(method: Method, tx: optax.GradientTransformation) -> Any:
    """The compiled training step: (trained, state, base, batch, rate) to (trained, state, loss)."""

    def loss_fn(trained, base, batch):
        logits = method.apply(base, trained, batch.ids, batch.mask)  # (B, 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, base, batch, rate):
        loss, grads = jax.value_and_grad(loss_fn)(trained, base, batch)
        updates, state = tx.update(grads, state, trained)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(trained, updates), state, loss

    return step


def make_optimizer() -> optax.GradientTransformation:
    """AdamW with the rate left out, which is an argument of the step: one program for all rates.

    It gets the trained tree alone, in which nothing is frozen.
    """
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(WEIGHT_DECAY))


def accuracy(logits_fn: Any, batch: Batch) -> float:
    """The share of sentences that are classified rightly, each computed at its width."""
    right, width = 0.0, widths(batch)
    for w in np.unique(width):
        part = narrow(take(batch, width == w), w)
        logits = quickstart.outputs(logits_fn, part)
        right += quickstart.accuracy(logits, part.labels) * len(part.labels)
    return right / len(batch.labels)


class Runner:
    """Runs of one method, compiled once."""

    def __init__(self, model: bert.Bert, variables: Any, sentences: Data, name: str) -> None:
        """Compiles nothing yet."""
        self.variables, self.sentences, self.name = variables, sentences, name
        self.method, self.tx = build(model, name), make_optimizer()
        self.step, self.logits = make_step(self.method, self.tx), jax.jit(self.method.apply)

    def __call__(self, half_decades: int, seed: int, steps: int) -> dict[str, Any]:
        """Trains and evaluates: a line of the table of runs."""
        start, train = time.monotonic(), self.sentences.train
        rate, example = to_rate(half_decades), jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
        base, trained = self.method.init(jax.random.key(seed), self.variables, example, example)
        state, losses, width = self.tx.init(trained), [], widths(train)
        schedule = optax.warmup_cosine_decay_schedule(0, rate, int(WARMUP * steps), steps)
        plan = draw(width, steps, BATCH, seed)
        for i, rows in enumerate(tqdm(plan, self.name, leave=False, disable=None)):
            batch = narrow(take(train, rows), width[rows[0]])
            trained, state, loss = self.step(trained, state, base, batch, schedule(i))
            losses.append(loss)
        logits_fn = functools.partial(self.logits, base, trained)
        scores = [accuracy(logits_fn, part) for part in self.sentences[1:]]
        done = self.name, rate, seed, steps, BATCH, *(round(score, 4) for score in scores)
        loss, seconds = float(np.mean(losses[-20:])), time.monotonic() - start
        return dict(zip(FIELDS, (*done, round(loss, 4), round(seconds, 1)), strict=True))


# ---- all runs -----------------------------------------------------------------------------------

FIELDS = "method", "rate", "seed", "steps", "batch", "validation", "held_out", "loss", "seconds"


class Runs:
    """The table of runs, in a file that more than one process may append to."""

    def __init__(self, path: pathlib.Path, steps: int, runner: Any) -> None:
        """`runner` gives the `Runner` of a name."""
        self.path, self.steps, self.runner = path, steps, runner
        done = {(row["steps"], row["batch"]) for row in compare_table.read(path)}
        if other := done - {(steps, BATCH)}:
            raise ValueError(
                f"steps and BATCH must be those of the runs in {path}, {other}; got "
                f"{(steps, BATCH)}. Remove the file, or give another --out."
            )

    def get(self, name: str, half_decades: int, seed: int) -> float:
        """The validation accuracy of a run, which takes place if it has not yet."""
        key, table = (name, to_rate(half_decades), seed), compare_table.read(self.path)
        rows = {(row["method"], row["rate"], row["seed"]): row for row in table}
        if key not in rows:
            rows[key] = self.runner(name)(half_decades, seed, self.steps)
            append(self.path, rows[key])
            tqdm.write(", ".join(f"{k} {v}" for k, v in rows[key].items()))
        return rows[key]["validation"]


def best_rate(runs: Runs, name: str) -> int:
    """The best rate in half decades: of three, and of further ones while it is the outermost."""
    middle = SETTINGS[name].rate
    scores = {rate: runs.get(name, rate, 0) for rate in (middle, middle - 1, middle + 1)}
    while True:
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        further = {min(scores): best - 1, max(scores): best + 1}.get(best)
        if further is None or len(scores) == MOST_RATES:
            return best
        scores[further] = runs.get(name, further, 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what has not been run; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, help="only the runs of these")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at the best rate")
    parser.add_argument("--held-out", type=int, default=1000, help="sentences to test on")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)

    model, variables, sentences = load(args.held_out)
    runner = functools.cache(functools.partial(Runner, model, variables, sentences))
    runs = Runs(args.out / "methods_runs.csv", args.steps, runner)
    best = {name: best_rate(runs, name) for name in args.methods or SETTINGS}
    for seed in range(1, args.seeds):
        for name, rate in best.items():
            runs.get(name, rate, seed)
    if args.methods is None:
        compare_costs.measure(args.out, model, variables, {name: runner(name) for name in SETTINGS})
        compare_table.write(args.out)


if __name__ == "__main__":
    main()
