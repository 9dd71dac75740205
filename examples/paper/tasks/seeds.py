"""The folder of a run: its settings, and a row of scores for each seed.

table = seeds.claim(folder, settings)
tables.append(table, {"seed": 0, "accuracy": 0.875})
medians = seeds.medians(tables.read(table))
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tables

SETTINGS, ROWS = "settings.json", "seeds.csv"


def claim(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Makes the folder of a run and returns its table; one with rows must be of the same settings.

    Raises:
        ValueError: it is of others.
    """
    path, now = folder / SETTINGS, json.loads(json.dumps(settings, default=str))
    if not tables.read(folder / ROWS):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1) + "\n")
        return folder / ROWS
    was = json.loads(path.read_text())
    names = [n for n in {**was, **now} if was.get(n) != now.get(n)]
    if names:
        changed = "; ".join(f"{n} was {was.get(n)!r}, is {now.get(n)!r}" for n in names)
        raise ValueError(
            f"`--out`: {folder} has seeds of other settings: {changed}. Give another folder."
        )
    return folder / ROWS


class Median(NamedTuple):
    """Of some values, with their standard deviation, NaN where there is one value."""

    median: float
    deviation: float


def medians(rows: Sequence[tables.Row], besides: Sequence[str] = ()) -> dict[str, Median]:
    """Those of every column but some.

    Example:
        >>> rows = [{"seed": 0, "f1": 0.5}, {"seed": 1, "f1": 0.75}]
        >>> medians(rows, besides=["seed"])["f1"].median
        0.625
    """
    found = {}
    for name in rows[0]:
        if name not in besides:
            values = [row[name] for row in rows]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            found[name] = Median(statistics.median(values), deviation)
    return found
