"""Tables of results: CSV files that are written at once, or grow by a row at a time; their best."""

import collections
import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows in their order, none where there is no file; what looks like a number is one.

    A last line without its end, of a process that was stopped, is none.
    """
    return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(_whole_lines(path))]


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row in one piece, as other processes may; the first makes the file, with the header.

    It takes the place of a last line without its end.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines, text = _whole_lines(path), io.StringIO()
    names = next(csv.reader(lines), list(row))
    if set(names) != set(row):
        raise ValueError(f"`{path}` has the columns {names}, and the row {list(row)}: give others.")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    if lines:
        os.truncate(path, len("".join(lines).encode()))
    else:
        writer.writeheader()
    writer.writerow(row)
    with path.open("ab") as file:
        file.write(text.getvalue().encode())


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line.decode() for line in lines if line.endswith(b"\n")]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file, at once, by one with these rows, whose fields are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(b"")
    for row in rows:
        append(part, row)
    part.replace(path)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def best(runs: Sequence[Row], column: str, sign: int) -> tuple[Row, float, float]:
    """The runs at the rate with the best mean `validation`, of equals the smallest.

    Rates that have fewer seeds than another are not chosen.

    Args:
        runs: with columns `rate`, `seed` and `validation`.
        column: the score.
        sign: 1 if less is better in `validation`, -1 if more is.

    Returns:
        The rate, how many were tried, and the number of seeds; the mean of the score; its standard
        error, NaN of one seed.
    """
    at = collections.defaultdict(list)
    for row in runs:
        at[row["rate"]].append(row)
    most = max(map(len, at.values()))
    means = {x: np.mean([r["validation"] for r in at[x]]) for x in at if len(at[x]) == most}
    rate = min(means, key=lambda x: (np.nan_to_num(sign * means[x], nan=np.inf), x))
    about = {"rate": rate, "rates": len(at), "seeds": most}
    return about, *mean([r[column] for r in at[rate]])


def mean(scores: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of one score."""
    error = np.std(scores, ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else np.nan
    return float(np.mean(scores)), float(error)
