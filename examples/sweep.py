"""Sweep learning rates, ranks and seeds of LoRA: all runs in one training step, on one base.

    python examples/sweep.py                          # MiniLM on movie reviews, 8 runs
    python examples/sweep.py --learning-rates 1e-3 3e-3 1e-2 --ranks 2 8 --seeds 0 1 2
    python examples/sweep.py --model smollm2          # SmolLM2-135M on definitions, 4 runs
    python examples/sweep.py --together 8             # all at once: for an accelerator

Every run gives what it would give alone, with the same batches; a run that diverges stops where it
was. After a quarter of the steps, and again after half, the worse half of the runs, by their loss
on held-out rows, is stopped and taken out of the table, so that it costs nothing more. The sweep
writes to OUT: runs.csv with a row for each run, curves.csv with the training losses, and `best`,
the adapter of the lowest held-out loss, with its own rank, as an Orbax checkpoint.

Without arguments: four minutes on two CPU cores, and as many with SmolLM2.
"""

import argparse
import functools
import itertools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tables
import trials
from progress import progress
from quickstart import draw, take
from trials import Task

import jlora
from jlora import checkpoint, many

HELD_OUT = 256  # rows by which runs are judged, at most
SCALE = 2.0  # s of every rank: alpha is s·r
WEIGHT_DECAY = 0.01
CLIP = 1.0  # the norm of a run's gradient
RUNGS = (0.25, 0.5)  # of the steps: where the worse half stops
TOGETHER = 2  # runs that are computed together: on a CPU more of this size are slower
OUT = pathlib.Path("out/sweep")


class Grid(NamedTuple):
    """What is swept.

    Attributes:
        task: makes the task, of a batch size and a number of steps.
        pattern: the sites of LoRA.
        batch: rows in a step.
        steps: steps of a run that is not stopped.
        learning_rates: of the runs.
        ranks: of the runs.
        seeds: of the runs.
    """

    task: Callable[..., Task]
    pattern: str | None
    batch: int
    steps: int
    learning_rates: Sequence[float]
    ranks: Sequence[int]
    seeds: Sequence[int]

    def rules(self, task: Task, rank: int) -> tuple[Any, ...]:
        """What is trained in a run."""
        return jlora.LoRA(self.pattern, rank=rank, alpha=SCALE * rank), *task.head


short = functools.partial(trials.movies, length=32)
MODELS = {
    "minilm": Grid(short, r"(query|value)/kernel", 16, 160, (1e-3, 3e-3), (2, 8), (0, 1)),
    "smollm2": Grid(trials.definitions, None, 8, 40, (3e-4, 1e-3), (2, 8), (0,)),
}


# ---- the sweep ----------------------------------------------------------------------------------


class Run(NamedTuple):
    """What differs between runs."""

    learning_rate: float
    rank: int
    seed: int

    def __str__(self) -> str:
        """As the list names it."""
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


def sweep(grid: Grid, task: Task, runs: Sequence[Run], together: int = TOGETHER) -> Result:
    """Trains all runs at once, and stops the worse half at each rung."""
    largest = max(run.rank for run in runs)
    lora = jlora.transform(task.apply, *grid.rules(task, largest))
    example = task.inputs(take(task.train, slice(task.batch)))
    keys = jnp.stack([jax.random.key(run.seed) for run in runs])
    ranks = [run.rank for run in runs]
    base, table = many.init(lora, keys, task.params, *example, ranks=ranks)
    print(f"{len(runs)} runs, {jlora.count(table):,} parameters; {jlora.count(base):,} frozen")

    schedule = task.schedule(task.steps)

    def make(learning_rate: jax.Array) -> optax.GradientTransformation:
        rate = lambda step: learning_rate * schedule(step)  # noqa: E731
        return optax.chain(
            optax.clip_by_global_norm(CLIP), optax.adamw(rate, weight_decay=WEIGHT_DECAY)
        )

    tx = many.optimizer(make, learning_rate=jnp.array([run.learning_rate for run in runs]))
    state = tx.init(table)

    def nll(adapter: Any, base: Any, rows: Any) -> tuple[jax.Array, Any]:
        total, _, count = task.score(lora.apply(base, adapter, *task.inputs(rows)), rows)
        return total, count

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
        held_out = take(task.validation, slice(HELD_OUT))
        starts = range(0, len(held_out[0]), task.batch)
        batches = (take(held_out, slice(i, i + task.batch)) for i in starts)
        totals, counts = np.sum([each_nll(table, base, rows) for rows in batches], axis=0)
        losses = totals / counts
        return np.where(running & np.isfinite(losses), losses, np.inf)

    plan = draw(len(task.train[0]), task.steps, task.batch, seed=0)
    rungs = {int(share * task.steps) for share in RUNGS}
    kept = np.arange(len(runs))  # the runs that are in the table
    curves = np.full((task.steps, len(runs)), np.nan)
    scores, stopped = np.full(len(runs), np.inf), np.full(len(runs), task.steps)
    with progress(plan) as bar:
        for i, rows in enumerate(bar, 1):
            table, state, losses = step(table, state, base, take(task.train, rows))
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
    adapter = of_rank(grid, task, many.take(table, best), runs[kept[best]])
    return Result(curves, scores, stopped, int(kept[best]), adapter)


def of_rank(grid: Grid, task: Task, adapter: Any, run: Run) -> Any:
    """The adapter of a run without the zeros beyond its rank."""
    lora = jlora.transform(task.apply, *grid.rules(task, run.rank))
    example = task.inputs(take(task.train, slice(task.batch)))
    like = jax.eval_shape(lora.init, jax.random.key(0), task.params, *example)[1]
    pairs = zip(jax.tree.leaves(adapter), jax.tree.leaves(like), strict=True)
    leaves = [x[tuple(map(slice, y.shape))] for x, y in pairs]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# ---- what is written ----------------------------------------------------------------------------


def write(out: pathlib.Path, grid: Grid, task: Task, runs: Sequence[Run], result: Result) -> None:
    """Writes the tables and the best adapter in the place of an earlier sweep's."""
    rows = [
        run._asdict() | {"steps": steps, "held_out_loss": f"{score:.5f}", "best": i == result.best}
        for i, (run, steps, score) in enumerate(
            zip(runs, result.stopped, result.scores, strict=True)
        )
    ]
    tables.write(out / "runs.csv", rows)
    names = ",".join(f"{r.learning_rate:g}/{r.rank}/{r.seed}" for r in runs)
    np.savetxt(out / "curves.csv", result.curves, "%.5f", ",", header=names, comments="")
    shutil.rmtree(out / "best", ignore_errors=True)
    rules = grid.rules(task, runs[result.best].rank)
    checkpoint.save(out / "best", result.adapter, rules, step=task.steps, base=task.params)


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
    given = {k: v for k, v in vars(args).items() if k in Grid._fields and v is not None}
    grid = MODELS[args.model]._replace(**given)
    task = grid.task(steps=grid.steps, batch=grid.batch)
    runs = list(itertools.starmap(Run, itertools.product(*grid[4:])))
    result = sweep(grid, task, runs, args.together)
    write(args.out, grid, task, runs, result)
    for i in np.argsort(result.scores):
        steps = f"{result.stopped[i]} steps"
        print(f"  {runs[i]!s:<28} {steps:>9}  held-out loss {result.scores[i]:.3f}")
    print(f"best: {runs[result.best]}, saved as {args.out / 'best'}")
    return result


if __name__ == "__main__":
    main()
