"""Compare variants of LoRA on three tasks, each with a learning rate of its own.

    taskset -c 0 python examples/variants.py            # hours of a core; goes on where it ended
    python examples/variants.py --tasks movies --variants lora_all dora    # these runs only
    python examples/variants_table.py                                      # table and picture

Tasks: whether a sentence of a movie review is positive (MiniLM), whether two words of one have
changed places (MiniLM), and definitions of words (SmolLM2-135M). Variants train about as many
parameters as LoRA of rank 2 on all dense layers, but for those whose names say otherwise. First the
learning rate is chosen, among half decades, by the loss on rows set aside from training; then more
seeds run at it. Each run adds one line to OUT/variants_runs.csv and is not repeated, so several
processes can share the work.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
import trials
from quickstart import WEIGHT_DECAY, Batch
from trials import TASKS, Runner, Task

import jlora
from jlora import initializers as starts

RANK, SCALE = 2, 2.0  # of all dense layers; s of every variant that does not change it
SEEDS = 5
SKETCHED = 8  # batches that starts from data and ranks are found by
OUT = pathlib.Path(__file__).parent / "results"


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


def make_sketch(task: Task, kind: str, components: int) -> jlora.types.Sketch:
    """What some batches tell of all linear sites.

    The head of zeros, from which no gradient comes, is one drawn at random here.
    """

    def loss(params: Any, rows: Batch) -> jax.Array:
        total, _, count = task.score(task.apply(params, *task.inputs(rows)), rows)
        return total / count

    def draw_head(path: Any, x: jax.Array) -> jax.Array:
        is_head = "classifier" in jax.tree_util.keystr(path) and x.ndim == 2
        return jax.random.normal(jax.random.key(0), x.shape) * 0.05 if is_head else x

    params = jax.tree_util.tree_map_with_path(draw_head, task.params)
    batches = trials.draw_batches(task, SKETCHED, seed=SEEDS)  # a seed of no run
    rules = *task.head, lora(None, RANK)
    return jlora.sketch(loss, params, rules, batches, kind=kind, components=components)


def sketched(task: Task, init: Callable[[Any], Any], *args: Any) -> jlora.LoRA:
    """A, or A and B, from what batches tell."""
    return lora(None, RANK, init=init(make_sketch(task, *args)))


def allocate_ranks(task: Task) -> Setup:
    """Ranks of up to 8 by the gradient, with the parameters of one rank for all."""
    sketch = make_sketch(task, "gradient", 4 * RANK)
    rules = jlora.allocate(sketch, (*task.head, lora(None, RANK)), max_rank=4 * RANK)
    print({rule.pattern: rule.rank for rule in rules if isinstance(rule, jlora.LoRA)})
    return Setup(rules)


VARIANTS = {
    "lora_all": Variant("LoRA, all linear", simple(lambda t: lora(None, RANK))),
    "lora_qv": Variant("LoRA, q and v", simple(lambda t: lora(QV, t.rank))),
    "head": Variant("the head alone", lambda t: Setup(t.head)),
    "full": Variant("full fine-tuning", simple(lambda t: jlora.Full("params")), -3),
    "rslora": Variant(
        "rsLoRA, all linear", simple(lambda t: jlora.LoRA(rank=RANK, alpha=16, rslora=True))
    ),
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
    "paca": Variant("PaCA", simple(lambda t: lora(None, 2 * RANK, init=starts.paca))),
    "eva": Variant("EVA", simple(lambda t: sketched(t, starts.eva, "inputs", RANK)), -1),
    "lora_ga": Variant(  # PEFT takes 2·r components
        "LoRA-GA", simple(lambda t: sketched(t, starts.lora_ga, "gradient", 2 * RANK)), -1
    ),
    "allocated": Variant("ranks by the gradient", allocate_ranks),
    "nf4": Variant(
        "LoRA on NF4", simple(lambda t: lora(None, RANK), schemes=(jlora.NF4(KERNELS),))
    ),
    "nf4_loftq": Variant(
        "LoRA on NF4, by LoftQ", simple(lambda t: lora(None, RANK, init=starts.loftq(jlora.NF4())))
    ),
    "qv_scaled": Variant("q and v, s = 8", simple(lambda t: lora(QV, t.rank, 8.0))),
    "qv_wide": Variant("q and v, 4 times the rank", simple(lambda t: lora(QV, 4 * t.rank))),
}


# ---- all runs -----------------------------------------------------------------------------------


def make_runner(task: Task, variant: Variant) -> Runner:
    """Runs of a variant on a task."""
    own = variant.setup(task)
    if own.schemes:
        task = task._replace(params=jlora.quantize(task.params, *own.schemes))
    lora = jlora.transform(task.apply, *own.rules)
    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(WEIGHT_DECAY, decays))
    tx = jlora.optimizer(optax.chain(*own.before, adam, *own.after))

    # An adapter of `Full` leaves alone does not say that it is one: `Params` does.
    def update(updates: Any, state: Any, adapter: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jlora.Params({}, updates), state, jlora.Params({}, adapter))
        return updates.adapter, state

    own = optax.GradientTransformation(lambda adapter: tx.init(jlora.Params({}, adapter)), update)
    return Runner(task, lora.init, lora.apply, own)


def decays(tree: Any) -> Any:
    """All but the magnitudes of DoRA, which start as norms."""
    return jax.tree.map(lambda label: label != "m", jlora.labels(tree))


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
            train = make_runner(task, VARIANTS[variant])
            columns = {"task": name, "variant": variant}
            loss = functools.partial(trials.run_once, path, train, columns)
            best = trials.best_rate(loss, task.rate + VARIANTS[variant].shift)
            for seed in range(1, args.seeds):
                loss(best, seed)


if __name__ == "__main__":
    main()
