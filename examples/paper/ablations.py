"""Which matrices, which rank, which directions: section 7 of the LoRA paper on two small models.

    python examples/paper ablations                  # goes on where it stopped
    python examples/paper ablations --tasks movies --seeds 0

MiniLM learns the sentiment of movie reviews, SmolLM2-135M definitions of words as in `chat.py`,
with shorter texts. Each run adapts some of the attention's matrices (query, key, value, out), all
layers alike, in one or two minutes of a core; there are 60. All runs of a task have the same alpha,
learning rate, schedule, steps and held-out texts, and all of a seed see the same texts in the same
order.

Each run adds a row to RESULTS/ablations.csv: the held-out accuracy, or nats a token, with its
standard error over sentences, or over definitions. A run that is there already is skipped; to do
all again, give other folders. RESULTS/movies.npz and RESULTS/definitions.npz have what
`subspaces` computes from the adapters in OUT. `notebooks/section7.ipynb` shows all three, and
RESULTS/ablations.png the most of it; the guides have a copy.
"""

import argparse
import functools
import pathlib
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chat
import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import quickstart
import tables
from conversations import DEFINITIONS, answer_nll, encode, lay, read_jsonl
from jax.tree_util import Partial
from models import bert, llama, smollm2
from progress import progress
from tokenizers import Tokenizer

import jlora
from jlora import analysis, checkpoint

from . import ablation_plots

MATRICES = {"q": 8, "k": 8, "v": 8, "o": 8, "q,k": 4, "q,v": 4, "q,k,v,o": 2}  # and the rank
RANKS = (1, 2, 4, 8, 64)
NAMES = {"q": "query", "k": "key", "v": "value", "o": "out"}
ALPHA = 16.0
SEEDS = (0, 1)
BATCH = {"movies": 32, "definitions": 8}
LEARNING_RATE = quickstart.LEARNING_RATE  # of both; at a third of it SmolLM2 has far to go
LENGTH = 32  # tokens: longer sentences are cut, longer definitions left out
STEPS = {"movies": 128, "definitions": 24}
HELD_OUT = 64  # definitions; of the sentences, all of `data.movie_snippets`
RESULTS = pathlib.Path(__file__).parent / "results"
OUT = pathlib.Path("out/ablations")


class Run(NamedTuple):
    """A training run."""

    task: str
    matrices: str  # keys of NAMES
    rank: int
    seed: int

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        """Where the adapter is kept."""
        return out / f"{self.task}-{self.matrices}-{self.rank}-{self.seed}"


class Score(NamedTuple):
    """The mean over held-out texts and its standard error."""

    value: float
    error: float


class Task(NamedTuple):
    """A model, and how to train and to measure it; its layers are stacked on axis 0.

    Attributes:
        apply: the model's.
        variables: its parameters.
        example: arguments of `apply` after the parameters.
        rules: for what is trained beside the low-rank factors.
        attention: the part of a tree like `variables` that holds the kernels.
        fit: from (lora, base, adapter, seed, steps) to the trained adapter.
        measure: from (lora, base, adapter) to the score.
    """

    apply: Callable[..., Any]
    variables: Any
    example: tuple[Any, ...]
    rules: tuple[Any, ...]
    attention: Callable[[Any], Any]
    fit: Callable[..., Any]
    measure: Callable[..., Score]


# ---- tasks --------------------------------------------------------------------------------------


def movies() -> Task:
    """MiniLM on sentences of movie reviews."""
    folder = data.minilm()
    config, variables = bert.load(folder, scan=True)
    model = bert.Bert(config, classes=2, scan=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train_set, test_set = (
        quickstart.encode(tokenizer, part, LENGTH)
        for part in data.movie_snippets(quickstart.MARGIN)
    )

    def fit(lora, base, adapter, seed, steps):
        plan = quickstart.draw(len(train_set.labels), steps, BATCH["movies"], seed)
        return quickstart.train(lora, base, adapter, train_set, plan)[0]

    def measure(lora, base, adapter):
        apply = functools.partial(jax.jit(lora.apply), base, adapter)
        value = quickstart.accuracy(quickstart.outputs(apply, test_set), test_set.labels)
        return Score(value, (value * (1 - value) / len(test_set.labels)) ** 0.5)

    example = jax.ShapeDtypeStruct((BATCH["movies"], LENGTH), jnp.int32)
    return Task(
        model.apply,
        bert.add_head(variables, classes=2),
        (example, example),
        (jlora.Full("classifier"),),
        lambda tree: tree["params"]["encoder"]["layer"]["attention"],
        fit,
        measure,
    )


def definitions() -> Task:
    """SmolLM2-135M on WordNet's definitions of words, without a system prompt."""
    config, variables, tokenizer = smollm2.load(data.smollm2())
    found = read_jsonl(DEFINITIONS)
    random.Random(0).shuffle(found)
    bare = [{"role": "system", "content": ""}]
    texts = [encode(bare + messages, tokenizer) for messages in found]
    parts = texts[:HELD_OUT], texts[HELD_OUT:]
    held_out, rows = (lay([[x] for x in part if len(x.ids) <= LENGTH]) for part in parts)

    def fit(lora, base, adapter, seed, steps):
        warmup = min(chat.WARMUP, steps // 2)
        schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, warmup, steps)
        tx = jlora.optimizer(optax.adamw(schedule))
        plan = quickstart.draw(len(rows.ids), steps, BATCH["definitions"], seed)
        step, state = chat.make_step(lora.apply, tx), chat.State(adapter, tx.init(adapter))
        for index in progress(plan, leave=False):
            state, _ = step(state, base, quickstart.take(rows, index))
        return state.adapter

    def measure(lora, base, adapter):
        nll = jax.jit(jax.vmap(answer_nll, in_axes=(None, 0)))
        model_fn = Partial(lora.apply, base, adapter)
        n, size = len(held_out.ids), BATCH["definitions"]
        chunks = np.array_split(np.arange(n), -(-n // size))
        each = [nll(model_fn, quickstart.take(held_out, chunk[:, None])) for chunk in chunks]
        return mean_a_token(*np.concatenate(each, axis=1).astype(np.float64))

    return Task(
        llama.Llama(config).apply,
        variables,
        (rows.ids[:1],),
        (),
        lambda tree: tree["params"]["layers"]["attention"],
        fit,
        measure,
    )


TASKS: dict[str, Callable[[], Task]] = {"movies": movies, "definitions": definitions}


def mean_a_token(totals: np.ndarray, counts: np.ndarray) -> Score:
    """The ratio of two sums over texts, and its standard error by the delta method."""
    value, n = totals.sum() / counts.sum(), len(totals)
    residual = totals - value * counts
    return Score(float(value), float((n / (n - 1) * (residual**2).sum()) ** 0.5 / counts.sum()))


# ---- runs ---------------------------------------------------------------------------------------


def pictured_runs(task: str) -> list[Run]:
    """The runs whose adapters are looked at."""
    runs = [(rank, SEEDS[0]) for rank in (4, 8, 64)] + [(64, SEEDS[1])]
    return [Run(task, "q,v", rank, seed) for rank, seed in runs]


def all_runs(tasks: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """All runs, those first that say most."""
    few = [*MATRICES.items(), *(("q,v", rank) for rank in RANKS)]
    more = [*few, *(("q,k,v,o", rank) for rank in RANKS)]
    runs = [run for task in tasks for run in pictured_runs(task) if run.seed in seeds]
    for seed in seeds:
        runs += [Run(task, *kind, seed) for task in tasks for kind in few]
        runs += [Run(task, *kind, seed) for task in tasks for kind in more]
    return list(dict.fromkeys(runs))


def rules(task: Task, run: Run) -> tuple[Any, ...]:
    """What is trained in a run."""
    names = "|".join(NAMES[letter] for letter in run.matrices.split(","))
    return jlora.LoRA(rf"attention/({names})/kernel", rank=run.rank, alpha=ALPHA), *task.rules


def execute(task: Task, run: Run, steps: int, out: pathlib.Path) -> dict[str, Any]:
    """Trains, keeps the adapter of a run that is pictured, and gives the row of the table."""
    start = time.perf_counter()
    lora = jlora.transform(task.apply, *rules(task, run))
    base, adapter = lora.init(jax.random.key(run.seed), task.variables, *task.example)
    adapter = task.fit(lora, base, adapter, run.seed, steps)
    score = task.measure(lora, base, adapter)
    if run in pictured_runs(run.task):
        shutil.rmtree(run.folder(out), ignore_errors=True)  # of a run that was stopped here
        checkpoint.save(run.folder(out), adapter, rules(task, run), step=steps, base=base)
    return {
        **run._asdict(),
        "steps": steps,
        "batch": BATCH[run.task],
        "parameters": jlora.count(task.attention(adapter)),
        "score": f"{score.value:.5f}",
        "standard_error": f"{score.error:.5f}",
        "seconds": f"{time.perf_counter() - start:.0f}",
    }


def read(path: pathlib.Path) -> dict[Run, tables.Row]:
    """The rows of the table by run."""
    return {Run(*(row[name] for name in Run._fields)): row for row in tables.read(path)}


# ---- directions ---------------------------------------------------------------------------------


def subspaces(task: Task, folders: Sequence[pathlib.Path]) -> Iterator[tuple[str, Any]]:
    """What the pictures of a task show, from the adapters of `pictured_runs`, by name.

    Of queries and of values, under `query/…` and `value/…`: `a/…` has the similarities of A,
    `delta/…` of ΔW, both of the middle layer: `ranks` of r = 8 and 64, `seeds` of two of r = 64.
    `norms` has a row for r = 4 and 64: the norm of ΔW, and of W between the directions of ΔW, of W
    and of random ones; `intruders` has the numbers in each layer, for r = 4, 8 and 64;
    `spectrum/…` the singular values of ΔW, all layers.
    """
    adapters = [task.attention(checkpoint.restore(folder)) for folder in folders]
    for part in ("query", "value"):
        w = task.attention(task.variables)[part]["kernel"]  # (layers, inputs, outputs)
        r4, r8, r64, other = (adapter[part]["kernel"] for adapter in adapters)
        middle = len(w) // 2
        for kind, (x, y) in {"ranks": (r8, r64), "seeds": (r64, other)}.items():
            yield f"{part}/a/{kind}", analysis.subspace_similarity(x.a, y.a)[middle]
            yield f"{part}/delta/{kind}", analysis.subspace_similarity(x, y)[middle]
        rows = [norms(w[middle], at(site, middle)) for site in (r4, r64)]
        yield f"{part}/norms", np.array(rows)
        counts = [analysis.intruder_dimensions(w, site).sum(-1) for site in (r4, r8, r64)]
        yield f"{part}/intruders", np.array(counts)
        for site in (r8, r64):
            spectrum = analysis.delta_spectrum(site)
            yield f"{part}/spectrum/{site.a.shape[-1]}", spectrum


def at(site: jlora.types.LowRank, layer: int) -> jlora.types.LowRank:
    """A site of one layer of a stack."""
    return site._replace(
        a=site.a[layer], b=site.b[layer], layout=jlora.types.Layout((), (0,), (1,))
    )


def norms(w: jax.Array, site: jlora.types.LowRank) -> list[float]:
    """The norm of ΔW, and of W between directions of ΔW, its own first, and random ones."""
    rank = site.a.shape[-1]
    u, _, vt = np.linalg.svd(w)
    rng = np.random.default_rng(0)
    x, y = (np.linalg.qr(rng.normal(size=(n, rank)))[0] for n in w.shape)
    size = analysis.norm(site)
    within = size / analysis.amplification(w, site, rank)
    own = np.linalg.norm(u[:, :rank].T @ w @ vt[:rank].T)
    return [float(n) for n in (size, within, own, np.linalg.norm(x.T @ w @ y))]


# ---- all of it ----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Does the runs that are missing; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, help=f"of each run, in place of {STEPS}")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="for adapters")
    args = parser.parse_args(argv)

    table = args.results / "ablations.csv"
    steps = {task: args.steps or STEPS[task] for task in args.tasks}
    for run, row in read(table).items():
        done, wanted = f"{row['steps']} steps of {row['batch']}", steps.get(run.task)
        if wanted and done != f"{wanted} steps of {BATCH[run.task]}":
            parser.error(
                f"{table} has runs of {done} for {run.task}, and {wanted} of {BATCH[run.task]} are "
                "asked for: give another folder as --results and another as --out"
            )
    load = functools.cache(lambda name: TASKS[name]())
    for run in all_runs(args.tasks, args.seeds):
        if run not in read(table):
            row = execute(load(run.task), run, steps[run.task], args.out)
            progress.write(" ".join(str(x) for x in row.values()))
            tables.append(table, row)
    for task in args.tasks:
        path, shown = args.results / f"{task}.npz", pictured_runs(task)
        if path.exists() or not read(table).keys() >= set(shown):
            continue
        for run in shown:
            if not run.folder(args.out).exists():
                execute(load(task), run, steps[task], args.out)
        folders = [run.folder(args.out) for run in shown]
        part = path.with_suffix(".part.npz")
        np.savez_compressed(part, **dict(subspaces(load(task), folders)))
        part.replace(path)
    found = {task: args.results / f"{task}.npz" for task in TASKS}
    if all(path.exists() for path in found.values()):
        arrays = {task: np.load(path) for task, path in found.items()}
        path = args.results / "ablations.png"
        ablation_plots.overview(path, read(table), arrays, list(MATRICES.items()), RANKS)
