"""Tables of results: CSV files that are written at once, or grow by a row at a time."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
