"""Does the one rule for the learning rate find the best of a grid? On six data sets of its own.

    python examples/rates_trial.py                    # all six, in minutes of a CPU
    python examples/rates_trial.py --sets diabetes    # this one only

The procedure was written before the first run:

- The rule: start at the rate that the formula of `regret.py --advise` gives for the model's width
  and the batch, rounded to a half decade. Try a factor of three more and a factor of three less. Go
  on in the better direction until the loss gets worse. It sees the validation loss of seed 0 alone.
- The grid: ten half decades from 1e-5 to 3e-1. Each rate runs with five seeds, which draw A and the
  batches. The best of the grid has the lowest mean validation loss over all seeds. A rate outside
  of the grid counts as worse than all.
- The result: the held-out loss at the rule's rate less that at the best of the grid, seed for seed;
  the mean and its standard error over the seeds. The rule is as good if the mean is not above its
  standard error. The strict result takes the rate with the lowest held-out loss as the best.
- Each model is pretrained here: on other text, another system, another photograph, or the features
  of the rows without what is to be learned. Then LoRA() learns the set in 96 steps of 16 rows, with
  AdamW, a gradient clipped to the norm 1, warm-up and cosine decay. A new head is trained in full.
- Nothing is changed after a result was seen. A set that fails stays.

All rates of a seed train in one program. A seed adds ten rows to OUT, and is not repeated.

Letters in the shapes: B rows in a batch, L places of a row.
"""

import argparse
import functools
import inspect
import pathlib
import pydoc_data.topics
import re
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import advice
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
import trials

import jlora
from jlora import many

GRID = range(-10, 0)  # half decades
SEEDS = range(5)
STEPS, BATCH = 96, 16
PRETRAINING = 400  # steps
LENGTH = 48  # bytes of a text
OUT = pathlib.Path(__file__).with_name("results") / "rates_trial.csv"
Rows = tuple[np.ndarray, np.ndarray]  # inputs, and what is to be learned


class Problem(NamedTuple):
    """A pretrained model and what it learns.

    Attributes:
        model: of flax.
        params: its pretrained weights.
        head: the rule of a new head, if there is one.
        loss: of outputs and what is to be learned.
        rows: for training, for validation and held out.
    """

    model: nn.Module
    params: Any
    head: tuple[Any, ...]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    rows: Sequence[Rows]


# ---- models -------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A causal one: of bytes, or of the values of a series."""

    width: int
    outputs: int
    vocabulary: int = 0  # none of a series
    pooled: bool = False

    @nn.compact
    def __call__(self, x):
        """The outputs: at each place, or one for a row."""
        embed = nn.Embed(self.vocabulary, self.width) if self.vocabulary else nn.Dense(self.width)
        start = nn.initializers.normal(0.02)
        h = embed(x) + self.param("positions", start, (x.shape[1], self.width))
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        for _ in range(2):
            h += nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(h), mask=mask)
            h += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        h = nn.LayerNorm()(h)
        return nn.Dense(self.outputs, name="head")(h.mean(1) if self.pooled else h)


class MLP(nn.Module):
    """Of features."""

    width: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        """The outputs of rows."""
        for _ in range(2):
            x = nn.gelu(nn.Dense(self.width)(x))
        return nn.Dense(self.outputs, name="head")(x)


class ConvNet(nn.Module):
    """Of patches of a photograph."""

    width: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        """The outputs of rows."""
        for _ in range(3):
            x = nn.gelu(nn.Conv(self.width, (3, 3), 2)(x))
        return nn.Dense(self.outputs, name="head")(x.reshape(len(x), -1))


def squared(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error."""
    return ((outputs - y) ** 2).mean()


def entropy(outputs: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()


def draw(rows: Rows, size: int, steps: int, seed: int) -> Rows:
    """The batches of a run: ``(steps, B, ...)``."""
    index = np.random.default_rng(seed).integers(len(rows[0]), size=(steps, size))
    return rows[0][index], rows[1][index]


def pretrain(model: nn.Module, loss: Any, rows: Rows) -> Any:
    """Weights after full training."""
    params = model.init(jax.random.key(0), rows[0][:1])
    schedule = trials.warm_up(PRETRAINING)
    tx = optax.adamw(lambda step: 2e-3 * schedule(step))

    @jax.jit
    def fit(params, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(lambda p: loss(model.apply(p, batch[0]), batch[1]))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

    return fit(params, draw(rows, 32, PRETRAINING, 0))


def give_head(model: nn.Module, params: Any, x: np.ndarray) -> Any:
    """The pretrained weights with the new head of another model."""
    new = model.init(jax.random.key(1), x[:1])["params"]
    return {"params": params["params"] | {"head": new["head"]}}


def split(rows: Rows, train: int, validation: int) -> list[Rows]:
    """Rows for training, for validation and held out, after one shuffle."""
    order = np.random.default_rng(0).permutation(len(rows[0]))
    parts = np.split(order, [train, train + validation])
    return [(rows[0][part], rows[1][part]) for part in parts]


# ---- six sets -----------------------------------------------------------------------------------


def as_rows(text: str) -> np.ndarray:
    """Bytes of ASCII in rows, one after the other: ``(N, LENGTH + 1)``."""
    found = np.frombuffer(re.sub(r"\s+", " ", text).encode("ascii", "ignore"), np.uint8)
    size = LENGTH + 1
    return found[: len(found) // size * size].reshape(-1, size).astype(np.int32)


def docstrings(*modules: ModuleType) -> str:
    """Of all public functions and classes."""
    things = [getattr(m, name) for m in modules for name in sorted(dir(m)) if name[0] != "_"]
    return " ".join(inspect.getdoc(x) or "" for x in things if callable(x))


@functools.cache
def reader() -> tuple[Transformer, Any]:
    """A model of the language of Python's reference."""
    model = Transformer(64, 128, 128)
    rows = as_rows(" ".join(pydoc_data.topics.topics.values()))
    return model, pretrain(model, entropy, (rows[:, :-1], rows[:, 1:]))


def docs() -> Problem:
    """Text: the next byte in the documentation of SciPy."""
    from scipy import linalg, optimize, signal, stats

    rows = as_rows(docstrings(linalg, optimize, signal, stats))
    parts = split((rows[:, :-1], rows[:, 1:]), 2000, 256)
    parts[2] = parts[2][0][:512], parts[2][1][:512]
    return Problem(*reader(), (), entropy, parts)


def libraries() -> Problem:
    """Text: which of three libraries a piece of documentation is from."""
    import nltk
    import sklearn.decomposition
    import sklearn.linear_model
    from matplotlib import axes, pyplot

    own = (np,), (sklearn.decomposition, sklearn.linear_model), (axes, pyplot, nltk)
    rows = [as_rows(docstrings(*modules))[:800, :-1] for modules in own]
    labels = np.repeat(np.arange(len(own)), [len(x) for x in rows])
    parts = split((np.concatenate(rows), labels), len(labels) // 2, len(labels) // 5)
    model = Transformer(64, len(own), 128, pooled=True)
    params = give_head(model, reader()[1], parts[0][0])
    return Problem(model, params, (jlora.Full("head"),), entropy, parts)


def of_features(x: np.ndarray, y: np.ndarray, outputs: int, loss: Any) -> Problem:
    """A table: the model first learns to fill in features."""
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    parts = split((x, y), len(x) // 2, len(x) // 5)
    full = np.tile(parts[0][0], (20, 1))
    hidden = np.random.default_rng(1).random(full.shape) < 1 / 3
    params = pretrain(MLP(128, x.shape[1]), squared, (np.where(hidden, 0, full), full))
    model = MLP(128, outputs)
    params = give_head(model, params, x)
    return Problem(model, params, (jlora.Full("head"),), loss, parts)


def breast_cancer() -> Problem:
    """A table: whether a tumor is malignant."""
    from sklearn import datasets

    return of_features(*datasets.load_breast_cancer(return_X_y=True), 2, entropy)


def diabetes() -> Problem:
    """A table: how a disease goes on, in standard deviations."""
    from sklearn import datasets

    x, y = datasets.load_diabetes(return_X_y=True)
    y = ((y - y.mean()) / y.std()).astype(np.float32)[:, None]
    return of_features(x, y, 1, squared)


def photograph() -> Problem:
    """An image: the color in the middle of a gray patch, in another photograph."""
    from sklearn import datasets

    def patches(name: str, every: int) -> Rows:
        image = datasets.load_sample_image(name).astype(np.float32) / 255
        gray = image.mean(2)
        at = [
            (i, j)
            for i in range(0, gray.shape[0] - 15, every)
            for j in range(0, gray.shape[1] - 15, every)
        ]
        x = np.stack([gray[i : i + 16, j : j + 16, None] for i, j in at])
        color = np.stack([image[i + 6 : i + 10, j + 6 : j + 10].mean((0, 1)) for i, j in at])
        return 4 * x - 2, 10 * (color - color.mean(1, keepdims=True))

    model = ConvNet(48, 3)
    params = pretrain(model, squared, patches("flower.jpg", 8))
    return Problem(model, params, (), squared, split(patches("china.jpg", 16), 600, 200))


def series() -> Problem:
    """A sequence: the next value of Roessler's system; the model knows that of Lorenz."""

    def lorenz(v):
        x, y, z = v
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    def roessler(v):
        x, y, z = v
        return np.array([-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)])

    def simulate(slope: Any, time: float, n: int) -> Rows:
        v, found = np.random.default_rng(1).random((3, n)), []
        for i in range(500 + 33):  # the first are on the way to the attractor
            for _ in range(10):  # Runge and Kutta's midpoint
                v = v + time / 10 * slope(v + time / 20 * slope(v))
            found += [v[0]] * (i >= 500)
        values = np.array(found).T
        values = (values - values.mean()) / values.std()
        values += 0.1 * np.random.default_rng(0).standard_normal(values.shape)
        rows = values.astype(np.float32)[..., None]
        return rows[:, :-1], rows[:, 1:]

    model = Transformer(32, 1)
    params = pretrain(model, squared, simulate(lorenz, 0.1, 1000))
    return Problem(model, params, (), squared, split(simulate(roessler, 0.4, 900), 500, 150))


SETS = {
    "docs": (docs, 64),
    "libraries": (libraries, 64),
    "breast_cancer": (breast_cancer, 128),
    "diabetes": (diabetes, 128),
    "photograph": (photograph, 48),
    "series": (series, 32),
}  # with their widths


# ---- runs ---------------------------------------------------------------------------------------


def make_train(problem: Problem) -> Callable[[int], Iterator[tuple[int, float, float]]]:
    """Training of all rates at once: of a seed to half decades, and their two losses.

    The losses are of validation and of held-out rows.
    """
    lora = jlora.transform(problem.model.apply, jlora.LoRA(), *problem.head)
    schedule = trials.warm_up(STEPS)

    def make(rate: jax.Array) -> optax.GradientTransformation:
        each = optax.adamw(lambda step: rate * schedule(step))
        return optax.chain(optax.clip_by_global_norm(1.0), each)

    tx = many.optimizer(make, rate=jnp.array([trials.to_rate(n) for n in GRID]))

    @jax.jit
    def run(key: jax.Array, params: Any, batches: Rows, tests: Sequence[Rows]) -> Any:
        keys = jnp.stack([key] * len(GRID))
        base, table = many.init(lora, keys, params, batches[0][0, :1])

        def loss(adapter: Any, rows: Rows) -> jax.Array:
            return problem.loss(lora.apply(base, adapter, rows[0]), rows[1])

        def step(carry: Any, rows: Rows) -> tuple[Any, None]:
            table, state = carry
            grads = jax.vmap(jax.grad(loss), (0, None))(table, rows)
            updates, state = tx.update(grads, state, table)
            return (optax.apply_updates(table, updates), state), None

        table, state = jax.lax.scan(step, (table, tx.init(table)), batches)[0]
        scores = [jax.lax.map(lambda x, rows=rows: loss(x, rows), table) for rows in tests]
        return [jnp.where(state.running, x, jnp.inf) for x in scores]

    def train(seed: int) -> Iterator[tuple[int, float, float]]:
        batches = draw(problem.rows[0], BATCH, STEPS, seed)
        found = run(jax.random.key(seed), problem.params, batches, problem.rows[1:])
        return zip(GRID, *(x.tolist() for x in found), strict=True)

    return train


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what has not been run; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)
    for name in args.sets:
        make, width = SETS[name]
        done = {row["seed"] for row in tables.read(args.out) if row["set"] == name}
        if left := [seed for seed in SEEDS if seed not in done]:
            train = make_train(make())
            for seed in left:
                for n, validation, held_out in train(seed):
                    row = {"set": name, "width": width, "seed": seed, "rate": trials.to_rate(n)}
                    scores = {"validation": validation, "held_out": held_out}
                    tables.append(args.out, row | {k: f"{x:.6g}" for k, x in scores.items()})
    print(markdown(tables.read(args.out)))


# ---- what comes of them -------------------------------------------------------------------------


class Result(NamedTuple):
    """What the rule found on a set; the differences are of held-out losses, seed for seed."""

    start: float
    rule: float
    best: float
    loss: float  # held out, at the best of the grid
    difference: float
    error: float
    runs: int
    strict: bool  # whether it is as good as the rate with the lowest held-out loss

    @property
    def is_as_good(self) -> bool:
        """Whether the rule is within one standard error."""
        return self.difference <= self.error


def judge(rows: Sequence[tables.Row]) -> Result:
    """Follows the rule through the rows of a set."""
    grid = {trials.to_rate(n): n for n in GRID}
    loss = {(grid[row["rate"]], row["seed"]): row for row in rows}
    start = advice.start(tables.read(advice.TABLE), rows[0]["width"], BATCH)
    asked = set()

    def ask(n: int, seed: int) -> float:
        asked.add(n)
        return loss[n, seed]["validation"] if n in GRID else np.inf

    rule = trials.best_rate(ask, start, most=len(GRID))

    def lowest(column: str) -> int:
        return min(GRID, key=lambda n: np.mean([loss[n, seed][column] for seed in SEEDS]))

    def compare(best: int) -> tuple[float, float]:
        each = [loss[rule, seed]["held_out"] - loss[best, seed]["held_out"] for seed in SEEDS]
        return tables.mean(each)

    best = lowest("validation")
    strict = compare(lowest("held_out"))
    rates = map(trials.to_rate, (start, rule, best))
    loss_of_best = np.mean([loss[best, seed]["held_out"] for seed in SEEDS])
    return Result(*rates, float(loss_of_best), *compare(best), len(asked), strict[0] <= strict[1])


def markdown(rows: Sequence[tables.Row]) -> str:
    """The table of the guide."""
    lines = [
        "| data set | width | start | rate by the rule | best of the grid | its loss "
        "| difference | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    results = []
    for name in SETS:
        if own := [row for row in rows if row["set"] == name]:
            x = judge(own)
            results.append(x)
            rates = " | ".join(advice.shown(rate) for rate in (x.start, x.rule, x.best))
            difference = f"{x.difference:.4f} ± {x.error:.4f}"
            cells = name, own[0]["width"], rates, f"{x.loss:.3f}", difference, x.runs
            lines.append(f"| {' | '.join(map(str, cells))} |")
    good, strict = sum(x.is_as_good for x in results), sum(x.strict for x in results)
    lines.append(
        f"\nWithin one standard error: {good} of {len(results)}. Of the rate with the lowest "
        f"held-out loss: {strict} of {len(results)}."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
