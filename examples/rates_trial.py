"""Does the one rule for the learning rate find the best of a grid? On data sets of its own.

    python examples/rates_trial.py                  # all sets, in minutes of a CPU
    python examples/rates_trial.py --sets spring    # this one only

The first rule compared rates by one seed. On the six sets of `DESIGN` it was within one standard
error of the best on four. Their rows then served to choose the rule below, among 28 that were tried
on them. So they say little about it, and it has new sets, `TRIAL`. No experiment had used them. The
procedure was written before the first run on them:

- The rule: start at the rate that the formula of `regret.py --advise` gives for the model's width
  and the batch, rounded to a half decade. Try a factor of three more and a factor of three less. Go
  on in the better direction until the loss gets worse. The loss is the mean validation loss of
  three seeds: 0, 1 and 2. One that diverged makes it infinite.
- The grid: ten half decades from 1e-5 to 3e-1. Each rate runs with five seeds, which draw A and the
  batches. The best of the grid has the lowest mean validation loss over all seeds. A rate outside
  of the grid counts as worse than all.
- The result: the held-out loss at the rule's rate less that at the best of the grid, seed for seed;
  the mean and its standard error over the seeds. The rule is as good if the mean is not above its
  standard error. The strict result takes the rate with the lowest held-out loss as the best.
- Each model is pretrained here: on other text, another system, another photograph, or the features
  of the rows without what is to be learned. Then LoRA() learns the set in 96 steps of 16 rows, with
  AdamW, a gradient clipped to the norm 1, warm-up and cosine decay. A new head is trained in full.
- Each seed is also taken as the first of three, so that each set tries the rule five times.
- Nothing is changed after a result was seen. A set that fails stays. One set was added: on
  `portrait` no rate had learned anything, so `uniform` is a second one of images.

All rates of a seed train in one program. A seed adds ten rows to OUT, and is not repeated.

Letters in the shapes: B rows in a batch, L places of a row.
"""

import argparse
import ast
import collections
import functools
import inspect
import pathlib
import pydoc_data.topics
import re
import sys
import tarfile
import typing
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
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
SEEN = 3  # seeds that the rule sees
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


# ---- sets ---------------------------------------------------------------------------------------


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
def reader(width: int) -> tuple[Transformer, Any]:
    """A model of the language of Python's reference."""
    model = Transformer(width, 128, 128)
    rows = as_rows(" ".join(pydoc_data.topics.topics.values()))
    return model, pretrain(model, entropy, (rows[:, :-1], rows[:, 1:]))


def next_bytes(text: str, width: int) -> Problem:
    """What follows in a text."""
    rows = as_rows(text)
    parts = split((rows[:, :-1], rows[:, 1:]), 2000, 256)
    parts[2] = parts[2][0][:512], parts[2][1][:512]
    return Problem(*reader(width), (), entropy, parts)


def classes(rows: Sequence[np.ndarray], width: int) -> Problem:
    """Which of several kinds of text a row is from."""
    labels = np.repeat(np.arange(len(rows)), [len(x) for x in rows])
    parts = split((np.concatenate(rows), labels), len(labels) // 2, len(labels) // 5)
    model = Transformer(width, len(rows), 128, pooled=True)
    params = give_head(model, reader(width)[1], parts[0][0])
    return Problem(model, params, (jlora.Full("head"),), entropy, parts)


def docs(width: int) -> Problem:
    """Text: the next byte in the documentation of SciPy."""
    from scipy import linalg, optimize, signal, stats

    return next_bytes(docstrings(linalg, optimize, signal, stats), width)


def source(width: int) -> Problem:
    """Text: the next byte in the source of Python's library."""
    modules = argparse, ast, inspect, tarfile, typing
    return next_bytes(" ".join(map(inspect.getsource, modules)), width)


def libraries(width: int) -> Problem:
    """Text: which of three libraries a piece of documentation is from."""
    import nltk
    import sklearn.decomposition
    import sklearn.linear_model
    from matplotlib import axes, pyplot

    own = (np,), (sklearn.decomposition, sklearn.linear_model), (axes, pyplot, nltk)
    return classes([as_rows(docstrings(*modules))[:800, :-1] for modules in own], width)


def characters(width: int) -> Problem:
    """Text: of which kind the character of a name is, such as "GREEK CAPITAL LETTER PI"."""
    found = collections.defaultdict(list)
    for x in map(chr, range(sys.maxunicode)):
        name = unicodedata.name(x, "CJK")
        if not name.startswith(("CJK", "HANGUL")):  # numbered ones
            found[unicodedata.category(x)].append(name.ljust(LENGTH)[:LENGTH].encode())
    rng, rows = np.random.default_rng(0), []
    for kind in ("Ll", "Lo", "Lu", "Mn", "Sm", "So"):
        own = rng.choice(found[kind], 400, replace=False)
        rows.append(own.view(np.uint8).reshape(400, LENGTH).astype(np.int32))
    return classes(rows, width)


def of_features(x: np.ndarray, y: np.ndarray, width: int) -> Problem:
    """A table of classes or, if `y` has floats, of numbers: it first learns to fill in features."""
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    outputs, loss = int(y.max()) + 1, entropy
    if y.dtype.kind == "f":
        y, outputs, loss = ((y - y.mean()) / y.std()).astype(np.float32)[:, None], 1, squared
    parts = split((x, y), len(x) // 2, len(x) // 5)
    full = np.tile(parts[0][0], (20, 1))
    hidden = np.random.default_rng(1).random(full.shape) < 1 / 3
    params = pretrain(MLP(width, x.shape[1]), squared, (np.where(hidden, 0, full), full))
    model = MLP(width, outputs)
    params = give_head(model, params, x)
    return Problem(model, params, (jlora.Full("head"),), loss, parts)


def breast_cancer(width: int) -> Problem:
    """A table: whether a tumor is malignant."""
    from sklearn import datasets

    return of_features(*datasets.load_breast_cancer(return_X_y=True), width)


def diabetes(width: int) -> Problem:
    """A table: how a disease goes on, in standard deviations."""
    from sklearn import datasets

    return of_features(*datasets.load_diabetes(return_X_y=True), width)


def colors(width: int) -> Problem:
    """A table: which word people have for a color."""
    from matplotlib.colors import XKCD_COLORS, rgb_to_hsv, to_rgb

    words = "green", "blue", "pink", "purple", "brown", "yellow", "red", "grey", "orange"
    last = {name: name.removeprefix("xkcd:").split()[-1] for name in XKCD_COLORS}
    known = [name for name, word in last.items() if word in words]
    rgb = np.array([to_rgb(name) for name in known])
    labels = np.array([words.index(last[name]) for name in known])
    return of_features(np.hstack([rgb, rgb_to_hsv(rgb)]), labels, width)


def spring(width: int) -> Problem:
    """A table: how fast a spring comes to rest, from twelve noisy measurements."""
    rng = np.random.default_rng(0)
    damping, frequency, phase = rng.uniform([[0.1], [1.0], [0.0]], [[0.6], [2.0], [6.3]], (3, 800))
    time = np.linspace(0, 6, 12)[:, None]
    x = np.exp(-damping * time) * np.cos(frequency * time + phase)
    return of_features((x + 0.05 * rng.standard_normal(x.shape)).T, damping, width)


def patches(image: np.ndarray, every: int) -> Rows:
    """Gray patches of a photograph, and the colors in their middles."""
    image = image.astype(np.float32) / 255
    gray = image.mean(2)
    at = [
        (i, j)
        for i in range(0, gray.shape[0] - 15, every)
        for j in range(0, gray.shape[1] - 15, every)
    ]
    x = np.stack([gray[i : i + 16, j : j + 16, None] for i, j in at])
    color = np.stack([image[i + 6 : i + 10, j + 6 : j + 10].mean((0, 1)) for i, j in at])
    return 4 * x - 2, 10 * (color - color.mean(1, keepdims=True))


@functools.cache
def painter(width: int) -> tuple[ConvNet, Any]:
    """A model of the colors of a flower."""
    from sklearn import datasets

    model = ConvNet(width, 3)
    rows = patches(datasets.load_sample_image("flower.jpg"), 8)
    return model, pretrain(model, squared, rows)


def photograph(width: int) -> Problem:
    """An image: the color in the middle of a gray patch, in another photograph."""
    from sklearn import datasets

    rows = patches(datasets.load_sample_image("china.jpg"), 16)
    return Problem(*painter(width), (), squared, split(rows, 600, 200))


def hopper() -> Rows:
    """Patches of a portrait of Grace Hopper."""
    from matplotlib import cbook, image

    file = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return patches(image.imread(file), 16)


def uniform(width: int) -> Problem:
    """An image: the color in the middle of a gray patch of a portrait."""
    return Problem(*painter(width), (), squared, split(hopper(), 600, 200))


def portrait(width: int) -> Problem:
    """An image: by how many quarters a gray patch of a portrait was turned."""
    x, _ = hopper()
    turns = np.random.default_rng(0).integers(4, size=len(x))
    x = np.stack([np.rot90(one, n) for one, n in zip(x, turns, strict=True)])
    model = ConvNet(width, 4)
    params = give_head(model, painter(width)[1], x)
    return Problem(model, params, (jlora.Full("head"),), entropy, split((x, turns), 600, 200))


Slope = Callable[[np.ndarray], np.ndarray]


def simulate(slope: Slope, time: float, n: int) -> Rows:
    """Series of a system with noise, and their next values."""
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


def next_values(slope: Slope, time: float, width: int) -> Problem:
    """What follows in a series; the model knows that of Lorenz."""

    def lorenz(v):
        x, y, z = v
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    model = Transformer(width, 1)
    params = pretrain(model, squared, simulate(lorenz, 0.1, 1000))
    return Problem(model, params, (), squared, split(simulate(slope, time, 900), 500, 150))


def series(width: int) -> Problem:
    """A sequence: the next value of Roessler's system."""

    def roessler(v):
        x, y, z = v
        return np.array([-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)])

    return next_values(roessler, 0.4, width)


def duffing(width: int) -> Problem:
    """A sequence: the next value of Duffing's pendulum, which is pushed."""

    def pushed(v):
        x, speed, phase = v
        push = 0.5 * np.cos(phase) - 0.3 * speed
        return np.array([speed, x - x**3 + push, np.full_like(x, 1.2)])

    return next_values(pushed, 0.4, width)


Make = Callable[[int], Problem]
DESIGN: dict[Make, int] = {
    docs: 64,
    libraries: 64,
    breast_cancer: 128,
    diabetes: 128,
    photograph: 48,
    series: 32,
}
TRIAL: dict[Make, int] = {
    source: 128,
    characters: 64,
    colors: 64,
    spring: 256,
    portrait: 32,
    uniform: 32,
    duffing: 64,
}
SETS = {make.__name__: (make, width) for make, width in (TRIAL | DESIGN).items()}


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
            train = make_train(make(width))
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


def judge(rows: Sequence[tables.Row], seen: Sequence[int] = SEEDS[:SEEN]) -> Result:
    """Follows the rule through the rows of a set; `seen` are the seeds that the rule sees."""
    grid = {trials.to_rate(n): n for n in GRID}
    loss = {(grid[row["rate"]], row["seed"]): row for row in rows}
    start = advice.start(tables.read(advice.TABLE), rows[0]["width"], BATCH)
    asked = set()

    def mean(n: int, column: str, seeds: Sequence[int] = SEEDS) -> float:
        return float(np.mean([loss[n, seed][column] for seed in seeds]))

    def ask(n: int, _: int) -> float:
        asked.add(n)
        return mean(n, "validation", seen) if n in GRID else np.inf

    rule = trials.best_rate(ask, start, most=len(GRID))

    def compare(best: int) -> tuple[float, float]:
        each = [loss[rule, seed]["held_out"] - loss[best, seed]["held_out"] for seed in SEEDS]
        return tables.mean(each)

    best, lowest = (min(GRID, key=lambda n: mean(n, name)) for name in ("validation", "held_out"))
    strict = compare(lowest)
    rates = map(trials.to_rate, (start, rule, best))
    runs = len(seen) * len(asked)
    return Result(*rates, mean(best, "held_out"), *compare(best), runs, strict[0] <= strict[1])


def judge_all(
    rows: Sequence[tables.Row], sets: Iterable[Make], seeds: int
) -> dict[str, list[Result]]:
    """The results of each set, with each seed as the first of those that the rule sees."""
    seen = [[(first + i) % len(SEEDS) for i in range(seeds)] for first in SEEDS]
    own = {make.__name__: [x for x in rows if x["set"] == make.__name__] for make in sets}
    return {name: [judge(x, some) for some in seen] for name, x in own.items() if x}


def markdown(rows: Sequence[tables.Row]) -> str:
    """The tables of the guide: of each new set, and of all sets together."""
    lines = [
        "| data set | width | start | rate by the rule | best of the grid | its loss "
        "| difference | runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, [x, *_] in judge_all(rows, TRIAL, SEEN).items():
        rates = " | ".join(advice.shown(rate) for rate in (x.start, x.rule, x.best))
        difference = f"{x.difference:.4f} ± {x.error:.4f}"
        cells = name, SETS[name][1], rates, f"{x.loss:.3f}", difference, x.runs
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "| sets | seeds | mean runs | as good | strictly | as good, each seed first |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for title, sets in {"new": TRIAL, "of the design": DESIGN}.items():
        for seeds in (SEEN, 1):
            if found := judge_all(rows, sets, seeds):
                lines.append(f"| {title} | {seeds} | {summary(list(found.values()))} |")
    return "\n".join(lines)


def summary(found: Sequence[Sequence[Result]]) -> str:
    """How many runs it took, and how often the rule was as good; of several sets."""
    first, each = [x for x, *_ in found], [x for results in found for x in results]
    good, strict, often = (
        f"{sum(right)} of {len(right)}"
        for right in (
            [x.is_as_good for x in first],
            [x.strict for x in first],
            [x.is_as_good for x in each],
        )
    )
    return f"{np.mean([x.runs for x in each]):.1f} | {good} | {strict} | {often}"


if __name__ == "__main__":
    main()
