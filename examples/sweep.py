"""Sweep learning rates, ranks and seeds of LoRA: all runs in one training step, on one base.

    python examples/sweep.py                          # MiniLM on movie reviews, 8 runs
    python examples/sweep.py --learning-rates 1e-3 3e-3 1e-2 --ranks 2 8 --seeds 0 1 2
    python examples/sweep.py --model smollm2          # SmolLM2-135M on definitions, 4 runs
    python examples/sweep.py --together 8             # all at once: for an accelerator

Every run is the one that it would be alone, with the same batches; one that diverges stops where it
was. After a quarter of the steps, and again after half, the half of the runs whose loss on
held-out rows is worse is stopped, and taken out of the table, so that it costs nothing more. OUT
then holds runs.csv with a row for each run, curves.csv and curves.png with the training losses, and
`best`, the adapter of the lowest held-out loss, of its own rank, as an Orbax checkpoint.

Without arguments: four minutes on two CPU cores, and as many with SmolLM2.
"""

import argparse
import csv
import functools
import itertools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import data
import finetune_lm
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import quickstart
from models import llama
from tqdm import tqdm

import jlora
from jlora import checkpoint, many

LENGTH = 32  # of MiniLM's sentences, in tokens
HELD_OUT = 256  # sentences
SCALE = 2.0  # s of every rank: alpha is s·r
WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 0.01
CLIP = 1.0  # the norm of a run's gradient
RUNGS = (0.25, 0.5)  # of the steps: where the worse half stops
TOGETHER = 2  # runs that are computed together: on a CPU more of this size are slower
SMOOTH = 10  # steps of which the picture shows the mean
OUT = pathlib.Path("out/sweep")


class Work(NamedTuple):
    """A model and what it learns.

    Attributes:
        apply: the model.
        params: its weights.
        rules: of a rank.
        nll: of a function from the model's inputs to logits, and rows: the sum of the negative
            log-likelihoods, and their number.
        inputs: the model's inputs in rows.
        train: rows, a NamedTuple of arrays.
        held_out: rows, by which runs are judged.
        batch: rows in a step.
        steps: steps of a run that is not stopped.
        learning_rates: of the sweep.
        ranks: of the sweep.
        seeds: of the sweep.
    """

    apply: Callable[..., Any]
    params: Any
    rules: Callable[[int], tuple[Any, ...]]
    nll: Callable[[Any, Any], tuple[jax.Array, Any]]
    inputs: Callable[[Any], tuple[Any, ...]]
    train: Any
    held_out: Any
    batch: int
    steps: int
    learning_rates: Sequence[float]
    ranks: Sequence[int]
    seeds: Sequence[int]


def minilm() -> Work:
    """The quickstart's encoder and sentences; its test sentences are not looked at."""
    model, variables, tokenizer = quickstart.load()
    snippets, _ = data.movie_snippets(quickstart.MARGIN)
    rows = quickstart.encode(tokenizer, snippets, LENGTH)

    def rules(rank: int) -> tuple[Any, ...]:
        sites = r"(query|value)/kernel"
        return jlora.LoRA(sites, rank=rank, alpha=SCALE * rank), jlora.Full("classifier")

    def nll(logits_fn: Callable[..., jax.Array], rows: Any) -> tuple[jax.Array, Any]:
        logits = logits_fn(rows.ids, rows.mask)  # (B, 2)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels)
        return each.sum(), rows.labels.size

    return Work(
        model.apply,
        variables,
        rules,
        nll,
        lambda rows: (rows.ids, rows.mask),
        take(rows, slice(HELD_OUT, None)),
        take(rows, slice(HELD_OUT)),
        batch=16,
        steps=160,
        learning_rates=(1e-3, 3e-3),
        ranks=(2, 8),
        seeds=(0, 1),
    )


def smollm2() -> Work:
    """The language model of `finetune_lm.py`, and its definitions."""
    config, variables, tokenizer = llama.load_gguf(data.smollm2())
    pairs = finetune_lm.read_jsonl(finetune_lm.DATA)
    rows = finetune_lm.encode(pairs, tokenizer, finetune_lm.LENGTH)
    return Work(
        llama.Llama(config).apply,
        variables,
        lambda rank: (jlora.LoRA(rank=rank, alpha=SCALE * rank),),
        finetune_lm.answer_nll,
        lambda rows: (rows.ids[:, :-1],),
        take(rows, slice(finetune_lm.HELD_OUT, None)),
        take(rows, slice(finetune_lm.HELD_OUT)),
        batch=8,
        steps=40,
        learning_rates=(3e-4, 1e-3),
        ranks=(2, 8),
        seeds=(0,),
    )


MODELS = {"minilm": minilm, "smollm2": smollm2}


def take(rows: Any, index: Any) -> Any:
    """The chosen rows."""
    return type(rows)(*(x[index] for x in rows))


# ---- the sweep ----------------------------------------------------------------------------------


class Run(NamedTuple):
    """What differs between runs."""

    learning_rate: float
    rank: int
    seed: int

    def __str__(self) -> str:
        """As the picture and the list name it."""
        return f"lr {self.learning_rate:g}, r {self.rank}, seed {self.seed}"


class Result(NamedTuple):
    """What a sweep found.

    Attributes:
        curves: training losses, ``(steps, runs)``; NaN after a run was stopped.
        scores: the last held-out loss of each run, ``(runs,)``; infinite for one that diverged.
        stopped: the step after which each run was stopped, ``(runs,)``.
        best: the run of the lowest held-out loss among those that were not stopped.
        adapter: its adapter, of its own rank.
    """

    curves: np.ndarray
    scores: np.ndarray
    stopped: np.ndarray
    best: int
    adapter: Any


def sweep(work: Work, runs: Sequence[Run], together: int = TOGETHER) -> Result:
    """Trains all runs at once, and stops the worse half at each rung."""
    largest = max(run.rank for run in runs)
    lora = jlora.transform(work.apply, *work.rules(largest))
    example = work.inputs(take(work.train, slice(work.batch)))
    keys = jnp.stack([jax.random.key(run.seed) for run in runs])
    ranks = [run.rank for run in runs]
    base, table = many.init(lora, keys, work.params, *example, ranks=ranks)
    print(f"{len(runs)} runs, {jlora.count(table):,} parameters; {jlora.count(base):,} frozen")

    schedule = optax.warmup_cosine_decay_schedule(0, 1, int(WARMUP * work.steps), work.steps)

    def make(learning_rate: jax.Array) -> optax.GradientTransformation:
        rate = lambda step: learning_rate * schedule(step)  # noqa: E731
        return optax.chain(
            optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=WEIGHT_DECAY)
        )

    tx = many.optimizer(make, learning_rate=jnp.array([run.learning_rate for run in runs]))
    state = tx.init(table)

    def nll(adapter: Any, base: Any, rows: Any) -> tuple[jax.Array, Any]:
        return work.nll(functools.partial(lora.apply, base, adapter), rows)

    def loss(adapter: Any, base: Any, rows: Any) -> jax.Array:
        total, count = nll(adapter, base, rows)
        return total / count

    @jax.jit
    def step(table: Any, state: Any, base: Any, rows: Any) -> tuple[Any, Any, jax.Array]:
        each = lambda adapter: jax.value_and_grad(loss)(adapter, base, rows)  # noqa: E731
        losses, grads = jax.lax.map(each, table, batch_size=together)  # jax.vmap(each)(table)
        updates, state = tx.update(grads, state, table)
        return optax.apply_updates(table, updates), state, losses  # (runs,)

    @jax.jit
    def each_nll(table: Any, base: Any, rows: Any) -> tuple[jax.Array, Any]:
        return jax.lax.map(lambda x: nll(x, base, rows), table, batch_size=together)

    def judge(table: Any, running: jax.Array) -> np.ndarray:
        """The held-out loss of each run, infinite where it diverged."""
        count = len(work.held_out[0])
        batches = (
            take(work.held_out, slice(i, i + work.batch)) for i in range(0, count, work.batch)
        )
        totals, counts = np.sum([each_nll(table, base, rows) for rows in batches], axis=0)
        return np.where(running, totals / counts, np.inf)

    plan = quickstart.draw(len(work.train[0]), work.steps, work.batch, seed=0)
    rungs = {int(share * work.steps) for share in RUNGS}
    kept = np.arange(len(runs))  # the runs that are in the table
    curves = np.full((work.steps, len(runs)), np.nan)
    scores, stopped = np.full(len(runs), np.inf), np.full(len(runs), work.steps)
    with tqdm(plan, disable=None) as bar:  # None: no bar where nobody looks
        for i, rows in enumerate(bar, 1):
            table, state, losses = step(table, state, base, take(work.train, rows))
            curves[i - 1, kept] = losses
            bar.set_postfix(runs=len(kept), best=f"{np.nanmin(losses):.3f}")
            if i in rungs and len(kept) > 1:
                scores[kept] = judge(table, state.running)
                better = np.sort(np.argsort(scores[kept])[: (len(kept) + 1) // 2])
                stopped[np.delete(kept, better)] = i
                kept = kept[better]
                # A smaller table is compiled anew; a run that is stopped in it would cost as ever.
                table, state = jax.tree.map(lambda x, at=better: x[at], (table, state))
    scores[kept] = judge(table, state.running)
    best = int(np.argmin(scores[kept]))
    if not np.isfinite(scores[kept[best]]):
        raise SystemExit("Every run diverged: lower --learning-rates.")
    adapter = of_rank(work, many.take(table, best), runs[kept[best]])
    return Result(curves, scores, stopped, int(kept[best]), adapter)


def of_rank(work: Work, adapter: Any, run: Run) -> Any:
    """The adapter of a run without the zeros beyond its rank."""
    lora = jlora.transform(work.apply, *work.rules(run.rank))
    example = work.inputs(take(work.train, slice(work.batch)))
    like = jax.eval_shape(lora.init, jax.random.key(0), work.params, *example)[1]
    pairs = zip(jax.tree.leaves(adapter), jax.tree.leaves(like), strict=True)
    leaves = [x[tuple(map(slice, y.shape))] for x, y in pairs]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# ---- what is written ----------------------------------------------------------------------------


def write(out: pathlib.Path, work: Work, runs: Sequence[Run], result: Result) -> None:
    """The tables, the picture and the best adapter; what an earlier sweep left is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "runs.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*Run._fields, "steps", "held_out_loss", "best"])
        for i, run in enumerate(runs):
            rows.writerow([*run, result.stopped[i], f"{result.scores[i]:.5f}", i == result.best])
    names = ",".join(f"{r.learning_rate:g}/{r.rank}/{r.seed}" for r in runs)
    np.savetxt(out / "curves.csv", result.curves, "%.5f", ",", header=names, comments="")
    draw(out / "curves.png", runs, result)
    shutil.rmtree(out / "best", ignore_errors=True)
    rules, steps = work.rules(runs[result.best].rank), work.steps
    checkpoint.save(out / "best", result.adapter, rules, step=steps, base=work.params)


def draw(path: pathlib.Path, runs: Sequence[Run], result: Result) -> None:
    """Training losses by step: a color for each learning rate, a style for each rank."""
    rates, ranks = (sorted({run[k] for run in runs}) for k in (0, 1))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    width = min(SMOOTH, len(result.curves))
    for i, run in enumerate(runs):
        smooth = np.convolve(result.curves[:, i], np.ones(width) / width, "valid")
        axis.plot(
            np.arange(len(smooth)) + width,
            smooth,
            color=f"C{rates.index(run.learning_rate)}",
            linestyle=("-", "--", ":", "-.")[ranks.index(run.rank) % 4],
            linewidth=2.5 if i == result.best else 1,
            label=f"{run}{', best' if i == result.best else ''}",
        )
    axis.set(xlabel="step", ylabel=f"training loss, mean of {width} steps")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the example; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--learning-rates", type=float, nargs="+")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--together", type=int, default=TOGETHER, help="runs, of those in a step")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in Work._fields and v is not None}
    work = MODELS[args.model]()._replace(**given)
    runs = list(
        itertools.starmap(Run, itertools.product(work.learning_rates, work.ranks, work.seeds))
    )
    result = sweep(work, runs, args.together)
    write(args.out, work, runs, result)
    for i in np.argsort(result.scores):
        steps = f"{result.stopped[i]} steps"
        print(f"  {runs[i]!s:<28} {steps:>9}  held-out loss {result.scores[i]:.3f}")
    print(f"best: {runs[result.best]}, saved as {args.out / 'best'}")
    return result


if __name__ == "__main__":
    main()
