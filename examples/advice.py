"""Which rank, scale and learning rate to try, from what `regret.py` measured.

The numbers are those of the rows of `results/regret.csv`.
"""

import collections
import pathlib
import textwrap
from collections.abc import Sequence

import numpy as np
import tables

ALPHA = 32.0  # of LoRA's scale, s = ALPHA / r
TABLE = pathlib.Path(__file__).with_name("results") / "regret.csv"
MODELS = {  # of tasks, with their widths; a GPT's task has its own
    "paraphrase": ("MiniLM-L3", 384),
    **dict.fromkeys(("movies", "sentences", "order"), ("MiniLM", 384)),
    **dict.fromkeys(("definitions", "glosses"), ("SmolLM2", 576)),
}
ADVISED = {"width": "channels of the model", "batch": "rows of a step"}
RULE = """\
Start at the calculator's rate. Try a factor of three more and a factor of three less, and go on in
the better direction until the loss gets worse. Train each rate with three seeds, and compare the
mean losses. That is usually nine to fifteen runs."""


def sizes_of(task: str) -> tuple[int, int]:
    """Width and depth of the GPT of a task."""
    width, _, depth = task.removeprefix("gpt-").partition("x")
    return int(width), int(depth)


def is_default(row: tables.Row) -> bool:
    """Whether a row of the table is of LoRA on all layers with s = 32/r and Adam."""
    is_plain = row["layers"] == "all" and row["method"] == "lora" and row["rank"] > 0
    return is_plain and bool(np.isclose(row["scale"] * row["rank"], ALPHA))


def fit(table: Sequence[tables.Row]) -> tuple[dict[str, float], tuple[float, float]]:
    """How the best rate of LoRA with s = 32/r depends on the model, its width and the batch.

    It is level · width^p · batch^q. How a rate differs within one model gives p and q. A rate
    without an interval, such as that of one seed, does not count.

    Returns:
        The decimal logarithm of each model's level; p and q, 0 if no model has two widths or
        batches.
    """
    found = []
    for row in table:
        task = row["task"]
        has_interval = row["best_rate_low"] > 0
        if is_default(row) and has_interval and (task in MODELS or task.startswith("gpt")):
            model, width = MODELS[task] if task in MODELS else ("GPT", sizes_of(task)[0])
            found.append((model, width, row["batch"], row["best_rate"]))
    names, *numbers = zip(*found, strict=True)
    width, batch, rate = np.log10(np.array(numbers))
    mean = np.array([[x == y for y in names] for x in names], float)
    mean /= mean.sum(1, keepdims=True)  # of the rows of a row's model
    sizes = np.stack([width, batch], 1)
    powers = np.linalg.lstsq(sizes - mean @ sizes, rate - mean @ rate, rcond=1e-6)[0]
    return dict(zip(names, mean @ (rate - sizes @ powers), strict=True)), tuple(powers)


def best_rate(table: Sequence[tables.Row], width: int, batch: int) -> float:
    """The best rate of LoRA with s = 32/r on a model that was not measured.

    It is halfway, on a logarithmic scale, between the lowest and the highest that `fit` finds.
    """
    levels, powers = fit(table)
    level = (min(levels.values()) + max(levels.values())) / 2
    return 10 ** (level + np.log10([width, batch]) @ powers)


def gains(table: Sequence[tables.Row]) -> dict[tuple[str, str, int], float]:
    """How much less loss rank 64 ends with than the rank of 4 or more that is next to 8.

    The keys are the experiment, the task and the batch, where both have several rates and seeds.
    """
    found = collections.defaultdict(dict)
    for row in table:
        has_error = row["rates"] > 1 and row["standard_error"] >= 0
        if is_default(row) and has_error and 4 <= row["rank"] <= 64:
            found[row["experiment"], row["task"], row["batch"]][row["rank"]] = row["score"]
    few = lambda ranks: min(ranks, key=lambda rank: abs(rank - 8))  # noqa: E731
    both = {key: each for key, each in found.items() if {64} < each.keys()}
    return {key: each[few(each)] - each[64] for key, each in both.items()}


def start(table: Sequence[tables.Row], width: int, batch: int) -> int:
    """The half decade where a search begins: the one next to `best_rate`."""
    return round(2 * np.log10(best_rate(table, width, batch)))


def shown(rate: float) -> str:
    """A rate in one digit, such as 3e-4."""
    return f"{rate:.0e}".replace("e-0", "e-")


def advise(table: Sequence[tables.Row], width: int, batch: int) -> str:
    """Rank, scale and rates to try, and why; from the rows of `regret.csv`."""
    (levels, powers), rate = fit(table), best_rate(table, width, batch)
    first, middle = 8, start(table, width, batch)
    begin, up, down = (shown(10 ** ((middle + i) / 2)) for i in (0, 1, -1))
    steps = (("twice the width", 2 ** powers[0]), ("four times the batch", 4 ** powers[1]))
    took = " and ".join(f"{name} multiplied it by {x:.2f}" for name, x in steps if round(x, 6) != 1)
    of_size = (width ** powers[0] * batch ** powers[1]) / rate
    off = ", ".join(f"{model} {10**x * of_size:.2f}" for model, x in levels.items())
    compared, each = "", gains(table).values()
    if each:
        ends = f"{-max(each):.3f} to {-min(each):.3f} nats"
        compared = (
            f"    In {len(each)} comparisons with 4 or 8, rank 64 changed the loss by {ends}.\n"
        )
    return f"""\
rank {first}, and then 64 at the best rate
{compared}scale {ALPHA / first:g}
    It is {ALPHA:g}/r, as with alpha={ALPHA:g}, the default: {ALPHA / 64:g} at rank 64.
    The best rate hardly depends on the rank then.
rates {begin}, then {up} and {down}
{textwrap.fill(RULE, 100, initial_indent="    ", subsequent_indent="    ")}
    A rate is the highest of its schedule: after warm-up, before cosine decay.
    The formula was fitted on text: a BERT (MiniLM), SmolLM2-135M and GPTs; widths of 64 to 576,
    batches of 4 to 256, Adam. On other models it is a guess.
    The best rate within a model: {took}.
    Measured best rates over those of the formula: {off}.
"""
