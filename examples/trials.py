"""Many training runs of one task: batches of one width, the best learning rate, a table of runs.

    runner = Runner(movies(), lora.init, lora.apply, tx)
    loss = functools.partial(run_once, path, runner, {"variant": "dora"})
    rate = best_rate(loss, middle=-5)

Each run adds one line to the table and is not repeated, so several processes can share the work.

Letters in the shapes: N rows, B rows in a batch, L tokens.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import data
import jax
import numpy as np
import optax
import quickstart
import tables
from conversations import DEFINITIONS, Text, encode, lay, read
from models import bert, llama, onnx_bert, smollm2
from progress import progress
from quickstart import WARMUP, Batch, take
from tokenizers import Tokenizer

import jlora

WIDTHS = (16, 24, 32, 40, 48, 64)  # tokens that batches are padded to
VALIDATION = 1000  # of the training sentences
MOST_RATES = 5


def warm_up(steps: int) -> optax.Schedule:
    """A warm-up to 1, and half a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(0, 1, int(WARMUP * steps), steps)


class Task(NamedTuple):
    """A model and what it learns.

    Attributes:
        apply: the model.
        params: its weights.
        inputs: the model's arguments, from rows.
        score: from logits and rows to three sums over all that is to be learned: of the negative
            log-likelihoods, of the right predictions, and of ones.
        head: rules of what is trained besides.
        rank: of LoRA on queries and values, for the parameters of rank 2 on all dense layers.
        rate: the middle of the learning rates, in half decades.
        steps: of a run.
        batch: B.
        train: rows.
        validation: rows by which a rate is chosen.
        held_out: rows by which nothing is chosen.
        widths: tokens that batches are padded to.
        schedule: of so many steps, by which the learning rate is multiplied.
    """

    apply: Callable[..., jax.Array]
    params: Any
    inputs: Callable[[Batch], tuple[Any, ...]]
    score: Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array, Any]]
    head: tuple[Any, ...]
    rank: int
    rate: int
    steps: int
    batch: int
    train: Batch
    validation: Batch
    held_out: Batch
    widths: Sequence[int] = WIDTHS
    schedule: Callable[[int], optax.Schedule] = warm_up


# ---- tasks --------------------------------------------------------------------------------------


def score_classes(logits: jax.Array, rows: Batch) -> tuple[jax.Array, jax.Array, Any]:
    """Scores logits ``(B, classes)``; see `Task`."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels)
    return nll.sum(), (logits.argmax(-1) == rows.labels).sum(), nll.size


def score_tokens(logits: jax.Array, rows: Batch) -> tuple[jax.Array, jax.Array, Any]:
    """Scores logits ``(B, L, vocab)`` at the tokens before those that the labels mark."""
    logits, ids, marks = logits[:, :-1], rows.ids[:, 1:], rows.labels[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    right = logits.argmax(-1) == ids
    return (nll * marks).sum(), (right * marks).sum(), marks.sum()


def minilm(
    train: Sequence[data.Snippet],
    test: Sequence[data.Snippet],
    length: int,
    cut: bool = False,
    load: Callable[[], tuple[Any, Any, Tokenizer]] = quickstart.load,
    **fields: Any,
) -> Task:
    """MiniLM with a new head on sentences of two classes.

    Args:
        train: sentences; the first `VALIDATION` are for validation.
        test: held-out sentences.
        length: the most tokens of a sentence.
        cut: whether longer sentences are cut; else they are left out.
        load: the model with a new head, its variables and its tokenizer.
        **fields: of the task.
    """
    model, variables, tokenizer = load()
    tokenizer.enable_padding(length=length)
    if cut:
        tokenizer.enable_truncation(length)
    else:
        tokenizer.no_truncation()

    def encode(examples: Sequence[data.Snippet]) -> Batch:
        found = zip(tokenizer.encode_batch([x.text for x in examples]), examples, strict=True)
        short = [(e.ids, e.attention_mask, x.label) for e, x in found if len(e.ids) == length]
        return Batch(*(np.array(x, np.int32) for x in zip(*short, strict=True)))

    rows = encode(train)
    return Task(
        model.apply,
        {"params": variables["params"]},
        lambda rows: (rows.ids, rows.mask),
        score_classes,
        (jlora.Full("classifier"),),
        rank=9,
        rate=-5,
        train=take(rows, slice(VALIDATION, None)),
        validation=take(rows, slice(VALIDATION)),
        held_out=encode(test),
        **fields,
    )


def movies(
    length: int = 48, steps: int = 128, batch: int = 16, cut: bool = False, **fields: Any
) -> Task:
    """The sentiment of sentences of movie reviews."""
    parts = data.movie_snippets(quickstart.MARGIN)
    return minilm(*parts, length, cut, steps=steps, batch=batch, **fields)


def sentences(length: int, steps: int, batch: int, **fields: Any) -> Task:
    """The sentiment of reviews, tweets and editorials, of which a quarter is held out."""
    parts = data.sentences(quickstart.MARGIN)
    return minilm(*parts, length, steps=steps, batch=batch, **fields)


def paraphrase() -> tuple[bert.Bert, dict[str, Any], Tokenizer]:
    """paraphrase-MiniLM-L3-v2 with a new head, its variables and its tokenizer."""
    return quickstart.load(lambda folder: onnx_bert.load(data.paraphrase(), folder))


def order() -> Task:
    """Whether two words have changed places, of which a probe of frozen features knows nothing."""
    return minilm(*data.word_order(), length=32, steps=192, batch=16)


def definitions(steps: int = 40, batch: int = 4) -> Task:
    """The definitions of words of `chat.py`, by SmolLM2-135M."""
    model = smollm2.load(data.smollm2())
    rows = _as_rows(read([DEFINITIONS], model[2], WIDTHS[-1]))
    parts = take(rows, slice(64, None)), take(rows, slice(32)), take(rows, slice(32, 64))
    return _answer(model, steps, batch, *parts)


def glosses(steps: int = 64, batch: int = 4, held_out: int = 512) -> Task:
    """The meanings of words of WordNet, by SmolLM2-135M."""
    model = smollm2.load(data.smollm2())
    train, test = data.meanings()

    def as_rows(meanings: Sequence[data.Meaning]) -> Batch:
        found = (
            [
                {"role": "user", "content": f'Define the {x.kind} "{x.word.replace("_", " ")}".'},
                {"role": "assistant", "content": x.gloss.partition('; "')[0]},
            ]
            for x in meanings
        )
        texts = (encode(messages, model[2]) for messages in found)
        return _as_rows([text for text in texts if len(text.ids) <= WIDTHS[-1]])

    rows = as_rows(train[: 128 + 2 * steps * batch])
    parts = take(rows, slice(128, None)), take(rows, slice(128)), as_rows(test[:held_out])
    return _answer(model, steps, batch, *parts)


def _as_rows(texts: Sequence[Text]) -> Batch:
    found = lay([[text] for text in texts])
    return Batch(found.ids, found.segments, found.counts)


def _answer(model: Any, steps: int, batch: int, *parts: Batch) -> Task:
    """Answers by SmolLM2-135M; `parts` are for training, for validation and held out."""
    config, variables, _ = model
    train, validation, held_out = parts
    return Task(
        llama.Llama(config).apply,
        variables,
        lambda rows: (rows.ids,),
        score_tokens,
        (),
        rank=11,
        rate=-6,
        steps=steps,
        batch=batch,
        train=train,
        validation=validation,
        held_out=held_out,
    )


TASKS = {"movies": movies, "order": order, "definitions": definitions}


# ---- batches ------------------------------------------------------------------------------------


def narrow(rows: Batch, width: int) -> Batch:
    """The rows without the padding beyond `width`."""
    return Batch(*(x[:, :width] if x.ndim == 2 else x for x in rows))


def widths(task: Task, rows: Batch) -> np.ndarray:
    """The width that each row is padded to: ``(N,)``."""
    return np.array(task.widths)[np.searchsorted(task.widths, rows.mask.sum(1))]


def draw(width: np.ndarray, steps: int, size: int, seed: int) -> list[np.ndarray]:
    """Which rows each step sees, all of one width: one shuffle after the other."""
    rng, batches = np.random.default_rng(seed), []
    while len(batches) < steps:
        order = rng.permutation(len(width))
        alike = [order[width[order] == w] for w in np.unique(width)]
        cuts = [(rows, i) for rows in alike for i in range(0, len(rows) - size + 1, size)]
        if not cuts:
            raise ValueError(f"no {size} rows have the same width: take a smaller batch")
        batches += [cuts[i][0][cuts[i][1] :][:size] for i in rng.permutation(len(cuts))]
    return batches[:steps]


def draw_batches(task: Task, steps: int, seed: int) -> list[Batch]:
    """The batches of `steps` steps, each narrowed to its width."""
    width = widths(task, task.train)
    plan = draw(width, steps, task.batch, seed)
    return [narrow(take(task.train, index), width[index[0]]) for index in plan]


# ---- one run ------------------------------------------------------------------------------------


class Runner:
    """Runs of one way to train on one task, compiled once for all rates and seeds."""

    def __init__(self, task: Task, init: Any, apply: Any, tx: optax.GradientTransformation) -> None:
        """Compiles nothing yet.

        Args:
            task: what is learned.
            init: `(key, params, *inputs) -> (base, trained)`.
            apply: `(base, trained, *inputs) -> logits`.
            tx: the optimizer of `trained` without the learning rate, an argument of the step.
        """
        self.task, self.init, self.apply, self.tx = task, init, apply, tx

        def score(trained: Any, base: Any, rows: Batch) -> tuple[jax.Array, jax.Array, Any]:
            return task.score(apply(base, trained, *task.inputs(rows)), rows)

        def loss(trained: Any, base: Any, rows: Batch) -> jax.Array:
            total, _, count = score(trained, base, rows)
            return total / count

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(trained: Any, state: Any, base: Any, rows: Batch, rate: Any) -> tuple[Any, ...]:
            value, grads = jax.value_and_grad(loss)(trained, base, rows)
            updates, state = tx.update(grads, state, trained)
            updates = jax.tree.map(lambda u: -rate * u, updates)
            return optax.apply_updates(trained, updates), state, value

        self.step, self.score = step, jax.jit(score)
        self.curve = np.zeros(0)  # the losses of the last run's steps

    def __call__(
        self, rate: float, seed: int, watch: Callable[[int, Any, Any], None] = lambda *_: None
    ) -> dict[str, Any]:
        """Trains and evaluates, to six digits; `seconds` are the processor's.

        `watch` is called with the number of steps so far, what is trained and the base.
        """
        start, task, losses = time.process_time(), self.task, []
        example = task.inputs(take(task.train, slice(task.batch)))
        base, trained = self.init(jax.random.key(seed), task.params, *example)
        found = {"trained": jlora.count(trained)}
        state = self.tx.init(trained)
        shape = np.asarray(jax.jit(jax.vmap(task.schedule(task.steps)))(np.arange(task.steps)))
        batches = draw_batches(task, task.steps, seed)
        watch(0, trained, base)
        for i, rows in enumerate(progress(batches, leave=False)):
            trained, state, loss = self.step(trained, state, base, rows, rate * shape[i])
            losses.append(loss)
            watch(i + 1, trained, base)
        self.curve = np.array(jax.device_get(losses))
        found["loss"] = float(self.curve[-20:].mean())
        for name in ("validation", "held_out"):
            nll, right = self.evaluate(trained, base, getattr(task, name))
            found |= {name: nll, f"{name}_right": right}
        found["seconds"] = round(time.process_time() - start, 1)
        return {k: x if isinstance(x, int) else float(f"{x:.6g}") for k, x in found.items()}

    def evaluate(self, trained: Any, base: Any, rows: Batch) -> tuple[float, float]:
        """The mean negative log-likelihood and the share of what is right, each at its width."""
        sums, width = np.zeros(3), widths(self.task, rows)
        for w in np.unique(width):
            some = narrow(take(rows, width == w), int(w))
            for i in range(0, len(some.ids), 64):
                sums += [float(x) for x in self.score(trained, base, take(some, slice(i, i + 64)))]
        return sums[0] / sums[2], sums[1] / sums[2]


# ---- all runs -----------------------------------------------------------------------------------


def to_rate(half_decades: int) -> float:
    """The learning rate 10^(n/2) to one digit: …, 1e-3, 3e-3, 1e-2, …."""
    return float(f"{10 ** (half_decades / 2):.0e}")


def run_once(
    path: pathlib.Path,
    train: Callable[[float, int], Mapping[str, Any]],
    name: Mapping[str, Any],
    half_decades: int,
    seed: int,
) -> float:
    """The validation score in the table at `path`, after a run if it has not taken place yet.

    Args:
        path: the table.
        train: a function of a rate and a seed to the columns of a run, one of them `validation`.
        name: the columns that name the runs of this function.
        half_decades: see `to_rate`.
        seed: of the run.
    """
    key = {**name, "rate": to_rate(half_decades), "seed": seed}
    for row in tables.read(path):
        if key.items() <= row.items():
            return row["validation"]
    row = key | train(key["rate"], seed)
    tables.append(path, row)
    progress.write(", ".join(f"{k} {v}" for k, v in row.items()))
    return row["validation"]


def best_rate(loss: Callable[[int, int], float], middle: int, most: int = MOST_RATES) -> int:
    """The best rate in half decades with seed 0: of three, and of further ones beside the best."""
    found = {rate: loss(rate, 0) for rate in (middle, middle - 1, middle + 1)}
    while True:
        best = min(found, key=lambda rate: (np.nan_to_num(found[rate], nan=np.inf), rate))
        further = {min(found): best - 1, max(found): best + 1}.get(best)
        if further is None or len(found) == most:
            return best
        found[further] = loss(further, 0)
