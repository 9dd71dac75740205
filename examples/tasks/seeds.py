"""The folder of a run: its settings, and a row of scores for each seed.

seeds.claim(folder, settings)
seeds.append(folder, {"seed": 0, "accuracy": 0.875})
medians = seeds.medians(seeds.read(folder))
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tables

SETTINGS, ROWS = "settings.json", "seeds.csv"


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of a run; one that has rows must be of the same settings.

    Raises:
        ValueError: it is of others.
    """
    path, now = folder / SETTINGS, json.loads(json.dumps(settings, default=str))
    if read(folder):
        was = json.loads(path.read_text())
        names = [n for n in {**was, **now} if was.get(n) != now.get(n)]
        if names:
            changed = "; ".join(f"{n} was {was.get(n)!r}, is {now.get(n)!r}" for n in names)
            raise ValueError(
                f"`--out`: {folder} has seeds of other settings: {changed}. Give another folder."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1) + "\n")


def read(folder: Path) -> list[dict[str, str]]:
    """The rows, in the order in which they were appended."""
    return tables.read(folder / ROWS)


def append(folder: Path, row: Mapping[str, Any]) -> None:
    """Adds a row; the first gives the header."""
    tables.append(folder / ROWS, row)


class Median(NamedTuple):
    """Of some values, with their standard deviation, NaN where there is one value."""

    median: float
    deviation: float


def medians(rows: Sequence[Mapping[str, str]], besides: Sequence[str] = ()) -> dict[str, Median]:
    """Those of every column but some.

    Example:
        >>> rows = [{"seed": "0", "f1": "0.5"}, {"seed": "1", "f1": "0.75"}]
        >>> medians(rows, besides=["seed"])["f1"].median
        0.625
    """
    found = {}
    for name in rows[0]:
        if name not in besides:
            values = [float(row[name]) for row in rows]
            deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
            found[name] = Median(statistics.median(values), deviation)
    return found
