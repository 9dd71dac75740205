"""Tables of results: CSV files that are written at once, or grow by a row at a time; their best."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows in their order, none where there is no file; what looks like a number is one."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row; the first makes the file, and gives the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file by one with these rows, whose fields are the same."""
    path.unlink(missing_ok=True)
    for row in rows:
        append(path, row)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def best(runs: Sequence[Row], column: str, sign: int) -> tuple[Row, float, float]:
    """The runs at the rate whose run with seed 0 has the best `validation`, of equals the smallest.

    Args:
        runs: with columns `rate`, `seed` and `validation`.
        column: the score.
        sign: 1 if less is better in `validation`, -1 if more is.

    Returns:
        The rate, how many were tried, and the number of seeds; the mean of the score; its standard
        error, NaN of one seed.
    """
    first = [r for r in runs if r["seed"] == 0]
    rate = min((np.nan_to_num(sign * r["validation"], nan=np.inf), r["rate"]) for r in first)[1]
    scores = np.array([r[column] for r in runs if r["rate"] == rate])
    error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else np.nan
    about = {"rate": rate, "rates": len({r["rate"] for r in first}), "seeds": len(scores)}
    return about, float(scores.mean()), float(error)
