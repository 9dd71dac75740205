"""Compare variants of LoRA on three tasks, each with a learning rate of its own.

    taskset -c 0 python examples/variants.py            # hours of a core; goes on where it ended
    python examples/variants.py --tasks movies --variants lora_all dora    # these runs only
    python examples/variants_table.py                                      # table and picture

Tasks: whether a sentence of a movie review is positive (MiniLM), whether two words of one have
changed places (MiniLM), and definitions of words (SmolLM2-135M). Variants train about as many
parameters as LoRA of rank 2 on all dense layers, but for those whose names say otherwise. The
learning rate is the one, among half decades, of the lowest loss on rows set aside from the training
ones; then come more seeds. A run is one line of OUT/variants_runs.csv, and done once, so that
several processes can share the work.

Letters in the shapes: N rows, B rows in a batch, L tokens.
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import compare
import compare_table
import data
import finetune_lm
import jax
import numpy as np
import optax
import quickstart
import tables
from models import llama
from quickstart import WARMUP, WEIGHT_DECAY
from tqdm import tqdm

import jlora
from jlora import initializers as starts

RANK, SCALE = 2, 2.0  # of all dense layers; s of every variant that does not change it
SEEDS = 5
SKETCHED = 8  # batches that starts from data and ranks are found by
MOST_RATES = 5
WIDTHS = np.array([16, 24, 32, 40, 48, 64])  # tokens that batches are padded to
OUT = pathlib.Path(__file__).parent / "results"


# ---- tasks --------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of text, and what is to be learnt: classes, ``(N,)``, or tokens marked, ``(N, L)``."""

    ids: np.ndarray  # (N, L)
    mask: np.ndarray  # (N, L)
    labels: np.ndarray


class Task(NamedTuple):
    """A model and what it learns.

    Attributes:
        apply: the model.
        params: its weights.
        inputs: what the model is given of rows.
        score: of logits and rows: the sums of negative log-likelihoods, of what is right, and of
            ones, over all that is to be learnt.
        head: rules of what is trained beside.
        rank: of LoRA on queries and values, for the parameters of `RANK` on all dense layers.
        rate: the middle of the learning rates, in half decades.
        steps: of a run.
        batch: B.
        train: rows.
        validation: rows by which a rate is chosen.
        held_out: rows by which nothing is chosen.
    """

    apply: Callable[..., jax.Array]
    params: Any
    inputs: Callable[[Rows], tuple[Any, ...]]
    score: Callable[[jax.Array, Rows], tuple[jax.Array, jax.Array, Any]]
    head: tuple[Any, ...]
    rank: int
    rate: int
    steps: int
    batch: int
    train: Rows
    validation: Rows
    held_out: Rows


def take(rows: Rows, index: Any) -> Rows:
    """The chosen rows."""
    return Rows(*(x[index] for x in rows))


def narrow(rows: Rows, width: int) -> Rows:
    """The rows without the padding beyond `width`."""
    return Rows(*(x[:, :width] if x.ndim == 2 else x for x in rows))


def widths(rows: Rows) -> np.ndarray:
    """The width that each row is padded to: ``(N,)``."""
    return WIDTHS[np.searchsorted(WIDTHS, rows.mask.sum(1))]


def score_classes(logits: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array, Any]:
    """Of classes, with logits ``(B, classes)``."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels)
    return nll.sum(), (logits.argmax(-1) == rows.labels).sum(), nll.size


def score_tokens(logits: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array, Any]:
    """Of the marked tokens, with logits ``(B, L, vocab)``, each for the token after."""
    logits, ids, marks = logits[:, :-1], rows.ids[:, 1:], rows.labels[:, 1:]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    right = logits.argmax(-1) == ids
    return (nll * marks).sum(), (right * marks).sum(), marks.sum()


def minilm(
    train: Sequence[data.Snippet], test: Sequence[data.Snippet], length: int, **sizes: Any
) -> Task:
    """MiniLM with a new head on texts of two classes, of at most `length` tokens."""
    model, variables, tokenizer = quickstart.load()
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=length)

    def encode(examples: Sequence[data.Snippet]) -> Rows:
        found = zip(tokenizer.encode_batch([x.text for x in examples]), examples, strict=True)
        short = [(e.ids, e.attention_mask, x.label) for e, x in found if len(e.ids) == length]
        return Rows(*(np.array(x, np.int32) for x in zip(*short, strict=True)))

    rows = encode(train)
    return Task(
        model.apply,
        {"params": variables["params"]},
        lambda rows: (rows.ids, rows.mask),
        score_classes,
        (jlora.Full("classifier"),),
        rank=9,
        rate=-5,
        train=take(rows, slice(compare.VALIDATION, None)),
        validation=take(rows, slice(compare.VALIDATION)),
        held_out=encode(test),
        **sizes,
    )


def movies() -> Task:
    """The quickstart's sentences."""
    return minilm(*data.movie_snippets(quickstart.MARGIN), length=48, steps=128, batch=16)


def order() -> Task:
    """Whether two words have changed places, of which a probe of frozen features knows nothing."""
    return minilm(*data.word_order(), length=32, steps=192, batch=16)


def definitions() -> Task:
    """Those of `finetune_lm.py`."""
    config, variables, tokenizer = llama.load_gguf(data.smollm2())
    pairs = finetune_lm.read_jsonl(finetune_lm.DATA)
    found = finetune_lm.encode(pairs, tokenizer, int(WIDTHS[-1]))
    ends = found.ids.shape[1] - found.counts[:, ::-1].argmax(1)
    mask = (np.arange(found.ids.shape[1]) < ends[:, None]).astype(np.int32)
    rows = Rows(found.ids, mask, found.counts)
    return Task(
        llama.Llama(config).apply,
        variables,
        lambda rows: (rows.ids,),
        score_tokens,
        (),
        rank=11,
        rate=-6,
        steps=40,
        batch=4,
        train=take(rows, slice(64, None)),
        validation=take(rows, slice(32)),
        held_out=take(rows, slice(32, 64)),
    )


TASKS = {"movies": movies, "order": order, "definitions": definitions}


# ---- variants -----------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What a variant trains.

    Attributes:
        rules: what is adapted, and how.
        before: transformations of the gradients, before Adam.
        after: transformations of the updates, after Adam.
        schemes: of the base's weights.
    """

    rules: tuple[Any, ...]
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    schemes: tuple[Any, ...] = ()


def lora(pattern: str | None, rank: int, scale: float = SCALE, **fields: Any) -> jlora.LoRA:
    """LoRA of a scale."""
    return jlora.LoRA(pattern, rank=rank, alpha=scale * rank, **fields)


QV, KERNELS = r"(query|value)/kernel", r"(encoder|layers)/.*kernel"


class Variant(NamedTuple):
    """A variant of LoRA, or a rival.

    Attributes:
        label: its name in the table.
        setup: of a task.
        shift: of the middle learning rate, in half decades.
    """

    label: str
    setup: Callable[[Task], Setup]
    shift: int = 0


def simple(rule: Callable[[Task], Any], **options: Any) -> Callable[[Task], Setup]:
    """One rule beside the head."""
    return lambda task: Setup((*task.head, rule(task)), **options)


def sketched(task: Task, kind: str, components: int) -> jlora.types.Sketch:
    """What some batches tell of all linear sites.

    The head of zeros, from which no gradient comes, is one drawn at random here.
    """

    def loss(params: Any, rows: Rows) -> jax.Array:
        total, _, count = task.score(task.apply(params, *task.inputs(rows)), rows)
        return total / count

    def drawn(path: Any, x: jax.Array) -> jax.Array:
        is_head = "classifier" in jax.tree_util.keystr(path) and x.ndim == 2
        return jax.random.normal(jax.random.key(0), x.shape) * 0.05 if is_head else x

    params = jax.tree_util.tree_map_with_path(drawn, task.params)
    width = widths(task.train)
    plan = compare.draw(width, SKETCHED, task.batch, seed=SEEDS)  # a seed of no run
    batches = [narrow(take(task.train, index), width[index[0]]) for index in plan]
    rules = *task.head, lora(None, RANK)
    return jlora.sketch(loss, params, rules, batches, kind=kind, components=components)


def eva(task: Task) -> jlora.LoRA:
    """A from the principal components of the inputs."""
    return lora(None, RANK, init=starts.eva(sketched(task, "inputs", RANK)))


def lora_ga(task: Task) -> jlora.LoRA:
    """A and B from the gradient, which PEFT takes 2·r components of."""
    return lora(None, RANK, init=starts.lora_ga(sketched(task, "gradient", 2 * RANK)))


def allocated(task: Task) -> Setup:
    """Ranks of up to 8 by the gradient, with the parameters of one rank for all."""
    sketch = sketched(task, "gradient", 4 * RANK)
    rules = jlora.allocate(sketch, (*task.head, lora(None, RANK)), max_rank=4 * RANK)
    print(rules)
    return Setup(tuple(rules))


VARIANTS = {
    "lora_all": Variant("LoRA, all linear", simple(lambda t: lora(None, RANK))),
    "lora_qv": Variant("LoRA, q and v", simple(lambda t: lora(QV, t.rank))),
    "head": Variant("the head alone", lambda t: Setup(t.head)),
    "full": Variant("full fine-tuning", simple(lambda t: jlora.Full("params")), -3),
    "rslora": Variant("rsLoRA, all linear", simple(lambda t: jlora.LoRA(rank=RANK, rslora=True))),
    "lora_plus": Variant(
        "LoRA+, λ = 16", simple(lambda t: lora(None, RANK), after=(jlora.lora_plus(16.0),)), -1
    ),
    "dora": Variant(
        "DoRA, +25% parameters", simple(lambda t: jlora.DoRA(rank=RANK, alpha=SCALE * RANK))
    ),
    "preconditioned": Variant(
        "LoRA, preconditioned",
        simple(lambda t: lora(None, RANK), before=(jlora.precondition(1e-6),)),
    ),
    "pissa": Variant("PiSSA", simple(lambda t: lora(None, RANK, init=starts.pissa_niter(16))), -1),
    "miss": Variant("MiSS", simple(lambda t: lora(None, 2 * RANK, 1.0, init=starts.miss)), -1),
    "eva": Variant("EVA", simple(eva), -1),
    "lora_ga": Variant("LoRA-GA", simple(lora_ga), -1),
    "allocated": Variant("ranks by the gradient", allocated),
    "nf4": Variant(
        "LoRA on NF4", simple(lambda t: lora(None, RANK), schemes=(jlora.NF4(KERNELS),))
    ),
    "nf4_loftq": Variant(
        "LoRA on NF4, by LoftQ", simple(lambda t: lora(None, RANK, init=starts.loftq(jlora.NF4())))
    ),
    "qv_scaled": Variant("q and v, s = 8", simple(lambda t: lora(QV, t.rank, 8.0))),
    "qv_wide": Variant("q and v, 4 times the rank", simple(lambda t: lora(QV, 4 * t.rank))),
}


# ---- one run ------------------------------------------------------------------------------------


class Runner:
    """Runs of one variant on one task, compiled once."""

    def __init__(self, task: Task, variant: Variant) -> None:
        """Compiles nothing yet."""
        own = variant.setup(task)
        self.task = task
        self.params = jlora.quantize(task.params, *own.schemes) if own.schemes else task.params
        self.lora = jlora.transform(task.apply, *own.rules)
        adam = optax.scale_by_adam(), optax.add_decayed_weights(WEIGHT_DECAY, decayed)
        self.tx = jlora.optimizer(optax.chain(*own.before, *adam, *own.after))

        def score(adapter: Any, base: Any, rows: Rows) -> tuple[jax.Array, jax.Array, Any]:
            return task.score(self.lora.apply(base, adapter, *task.inputs(rows)), rows)

        def loss(adapter: Any, base: Any, rows: Rows) -> jax.Array:
            total, _, count = score(adapter, base, rows)
            return total / count

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(adapter: Any, state: Any, base: Any, rows: Rows, rate: Any) -> tuple[Any, ...]:
            value, grads = jax.value_and_grad(loss)(adapter, base, rows)
            updates, state = self.tx.update(as_adapter(grads), state, as_adapter(adapter))
            updates = jax.tree.map(lambda u: -rate * u, updates.adapter)
            return optax.apply_updates(adapter, updates), state, value

        self.step, self.score = step, jax.jit(score)

    def __call__(self, rate: float, seed: int) -> dict[str, float]:
        """Trains and evaluates."""
        start, task = time.monotonic(), self.task
        example = task.inputs(take(task.train, slice(task.batch)))
        base, adapter = self.lora.init(jax.random.key(seed), self.params, *example)
        trained = jlora.count(adapter)
        state, losses, width = self.tx.init(as_adapter(adapter)), [], widths(task.train)
        schedule = optax.warmup_cosine_decay_schedule(0, rate, int(WARMUP * task.steps), task.steps)
        plan = compare.draw(width, task.steps, task.batch, seed)
        for i, index in enumerate(tqdm(plan, leave=False, disable=None)):
            rows = narrow(take(task.train, index), width[index[0]])
            adapter, state, loss = self.step(adapter, state, base, rows, schedule(i))
            losses.append(loss)
        found = {"trained": trained, "loss": float(np.mean(losses[-20:]))}
        for name in ("validation", "held_out"):
            nll, right = self.evaluate(adapter, base, getattr(task, name))
            found |= {name: nll, f"{name}_right": right}
        return found | {"seconds": round(time.monotonic() - start, 1)}

    def evaluate(self, adapter: Any, base: Any, rows: Rows) -> tuple[float, float]:
        """The mean negative log-likelihood and the share of what is right, each at its width."""
        sums, width = np.zeros(3), widths(rows)
        for w in np.unique(width):
            some = narrow(take(rows, width == w), int(w))
            for i in range(0, len(some.ids), 64):
                sums += [float(x) for x in self.score(adapter, base, take(some, slice(i, i + 64)))]
        return sums[0] / sums[2], sums[1] / sums[2]


def as_adapter(adapter: Any) -> jlora.Params:
    """Says that it is an adapter, which one of `Full` leaves alone does not say of itself."""
    return jlora.Params({}, adapter)


def decayed(tree: Any) -> Any:
    """All but the magnitudes of DoRA, which start as norms."""
    return jax.tree.map(lambda label: label != "m", jlora.labels(tree))


# ---- all runs -----------------------------------------------------------------------------------

KEY = "task", "variant", "rate", "seed"


def run(path: pathlib.Path, runner: Runner, task: str, variant: str, rate: int, seed: int) -> float:
    """The validation loss of a run at `rate` half decades, which takes place once."""
    key = task, variant, compare.to_rate(rate), seed
    for row in compare_table.read(path):
        if tuple(row[name] for name in KEY) == key:
            return row["validation"]
    found = runner(*key[2:])
    row = dict(zip(KEY, key, strict=True)) | {k: float(f"{v:.6g}") for k, v in found.items()}
    tables.append(path, row)
    tqdm.write(", ".join(f"{k} {v}" for k, v in row.items()))
    return found["validation"]


def best_rate(loss: Callable[[int, int], float], middle: int) -> int:
    """The best rate in half decades with seed 0: of three, and of further ones beside the best."""
    found = {rate: loss(rate, 0) for rate in (middle, middle - 1, middle + 1)}
    while True:
        best = min(found, key=lambda rate: (np.nan_to_num(found[rate], nan=np.inf), rate))
        further = {min(found): best - 1, max(found): best + 1}.get(best)
        if further is None or len(found) == MOST_RATES:
            return best
        found[further] = loss(further, 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what has not been run; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at the best rate")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)
    path = args.out / "variants_runs.csv"
    for name in args.tasks:
        task = TASKS[name]()
        for variant in args.variants:
            if variant == "head" and not task.head:
                continue
            runner = Runner(task, VARIANTS[variant])
            loss = functools.partial(run, path, runner, name, variant)
            best = best_rate(loss, task.rate + VARIANTS[variant].shift)
            for seed in range(1, args.seeds):
                loss(best, seed)


if __name__ == "__main__":
    main()
