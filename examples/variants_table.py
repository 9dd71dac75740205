"""What `variants.py` measured, as one table and one picture.

    python examples/variants_table.py       # of examples/results, as far as the runs are

Read OUT/variants_runs.csv; write OUT/variants.csv, a row for each variant of each task, and
OUT/variants.png; print the table of the guide. Errors are standard errors over the seeds.
"""

import collections
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import tables
from tables import Row
from variants import OUT, VARIANTS


class Measure(NamedTuple):
    """How a task is measured.

    Attributes:
        column: of a run.
        factor: of that column.
        digits: that are shown.
        name: what it is.
        less: whether less is better.
    """

    column: str
    factor: int
    digits: int
    name: str
    less: bool = False


MEASURES = {
    "movies": Measure("held_out_right", 100, 1, "movie reviews: accuracy, %"),
    "order": Measure("held_out_right", 100, 1, "word order: accuracy, %"),
    "definitions": Measure("held_out", 1, 3, "definitions: nats a token", less=True),
}


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row for each variant of each task that has several seeds, at its best rate."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["task"], row["variant"]].append(row)
    keys = [key for key in itertools.product(MEASURES, VARIANTS) if key in groups]
    return [row for row in (_row(*key, groups[key]) for key in keys) if row["seeds"] > 1]


def _row(task: str, variant: str, rows: Sequence[Row]) -> Row:
    measure = MEASURES[task]
    best, mean, error = tables.best(rows, measure.column, 1)
    return {
        "task": task,
        "variant": variant,
        "trained": rows[0]["trained"],
        **best,
        "score": round(measure.factor * mean, 3),
        "standard_error": round(measure.factor * error, 3),
    }


def markdown(table: Sequence[Row]) -> str:
    """The table as the guide has it: the score of each variant on each task, and its best rate."""
    tasks = [task for task in MEASURES if any(row["task"] == task for row in table)]
    cells = {(row["variant"], row["task"]): _cell(row) for row in table}
    names = [name for name in VARIANTS if any((name, task) in cells for task in tasks)]
    lines = ["", *(MEASURES[task].name for task in tasks)], ["---"] * (1 + len(tasks))
    each = ([VARIANTS[n].label, *(cells.get((n, t), "") for t in tasks)] for n in names)
    return "\n".join(f"| {' | '.join(line)} |" for line in (*lines, *each)) + "\n"


def _cell(row: Row) -> str:
    digits = MEASURES[row["task"]].digits
    score, error = (f"{row[name]:.{digits}f}" for name in ("score", "standard_error"))
    return f"{score} ± {error} at {row['rate']:g}"


def draw(path: pathlib.Path, table: Sequence[Row]) -> None:
    """A panel for each task, better to the right; a band is where LoRA on all linear layers is."""
    tasks = [task for task in MEASURES if any(row["task"] == task for row in table)]
    names = [name for name in VARIANTS if any(row["variant"] == name for row in table)]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4 * len(tasks), 1 + 0.3 * len(names)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, task in zip(axes[0], tasks, strict=True):
        found = {row["variant"]: row for row in table if row["task"] == task}
        if row := found.get("lora_all"):
            low, high = (row["score"] + sign * row["standard_error"] for sign in (-1, 1))
            axis.axvspan(low, high, color="C0", alpha=0.2)
        for name, row in found.items():
            at = len(names) - names.index(name)
            axis.errorbar(row["score"], at, xerr=row["standard_error"], fmt="C0o", capsize=3)
        axis.set(xlabel=MEASURES[task].name)
        axis.xaxis.set_inverted(MEASURES[task].less)
        axis.set_yticks(range(len(names), 0, -1), [VARIANTS[name].label for name in names])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write(out: pathlib.Path) -> list[Row]:
    """Writes the table and the picture.

    Raises:
        ValueError: nothing has run.
    """
    rows = tables.read(out / "variants_runs.csv")
    if not rows:
        raise ValueError(f"`{out}` has no variants_runs.csv. Run variants.py first.")
    table = summary(rows)
    tables.write(out / "variants.csv", table)
    draw(out / "variants.png", table)
    return table


if __name__ == "__main__":
    print(markdown(write(pathlib.Path(sys.argv[1]) if sys.argv[1:] else OUT)), end="")
