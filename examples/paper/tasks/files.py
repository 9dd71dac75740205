"""Reading data files strictly: an error names the file, the line, what was expected and what came.

Lines end with a line feed, or a carriage return and a line feed, and with nothing else: sentences
of these data sets hold other characters that `str.splitlines` would cut at. Quotes mean nothing in
TSV files. Files are UTF-8, with or without a byte order mark.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class FormatError(ValueError):
    """A file is not in the expected format."""


class Place:
    """Where in a file something stands, for messages.

    Example:
        >>> print(Place("train.tsv", 3).error("2 fields", "1"))
        `train.tsv`, line 3: expected 2 fields, got 1
    """

    def __init__(self, path: str | Path, line: int | None = None, inside: str = "") -> None:
        """The file, perhaps the number of the line from 1, and perhaps the part of a document."""
        self.path, self.line, self.inside = path, line, inside

    def __str__(self) -> str:
        """The words for it."""
        line = "" if self.line is None else f", line {self.line}"
        return f"`{self.path}`{line}" + (f", {self.inside}" if self.inside else "")

    def error(self, expected: str, got: object) -> FormatError:
        """The error to raise."""
        shown = got if isinstance(got, str) else repr(got)
        shown = shown if len(shown) <= 200 else f"{shown[:200]}…"
        return FormatError(f"{self}: expected {expected}, got {shown}")

    def field(self, record: Any, name: str, kind: type | tuple[type, ...], what: str) -> Any:
        """The field of a JSON object, of the expected type.

        Args:
            record: the object.
            name: of the field.
            kind: its type or types; True and False are no numbers.
            what: its type in words, for the message.
        """
        if not isinstance(record, dict) or name not in record:
            got = f"fields {sorted(record)}" if isinstance(record, dict) else record
            raise self.error(f'an object with a field "{name}"', got)
        value = record[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(f'{what} in the field "{name}"', value)
        return value

    def text(self, record: Any, name: str) -> str:
        """The field of a JSON object that is text."""
        return self.field(record, name, str, "text")


def some(path: Path, examples: Iterable[T]) -> list[T]:
    """The examples of a file, of which there must be one.

    Raises:
        FormatError: there is none.
    """
    if not (found := list(examples)):
        raise Place(path).error("at least one example", "none")
    return found


def find(folder: str | Path, names: Sequence[str], source: str) -> Path:
    """The one file of `folder` that has one of `names`.

    Args:
        folder: where to look.
        names: of the file, in its several formats; may be patterns.
        source: what to put there, for the message.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, and which one is meant is not known.
    """
    folder = Path(folder)
    found = [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]
    if not found:
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
        state = f"holds {there or 'nothing'}" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"`{folder}` {state}: expected {' or '.join(names)}. Put {source} there."
        )
    if len(found) > 1:
        raise ValueError(f"`{folder}` holds {[p.name for p in found]}: expected one of them only.")
    return found[0]


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, without their ends."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Place(path, number).error("UTF-8", str(error)) from None
            yield number, line.removesuffix("\n").removesuffix("\r")


def tsv(
    path: Path, columns: Sequence[str] = ()
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The columns of a TSV file, and its rows with the numbers of their lines.

    Args:
        path: the file.
        columns: their names where the file has no header.
    """
    rows = ((number, line.split("\t")) for number, line in lines(path))
    if columns:
        return list(columns), rows
    number, header = next(rows, (1, None))
    if header is None:
        raise Place(path, number).error("a header", "an empty file")
    return header, rows


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with that header, quotes as usual, and the lines that they end on."""
    text = io.StringIO("\n".join(line for _, line in lines(path)), newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
        if header != list(columns):
            raise Place(path, 1).error(f"the header {','.join(columns)}", ",".join(header))
        for row in reader:
            if len(row) != len(columns):
                raise Place(path, reader.line_num).error(f"{len(columns)} fields", row)
            yield reader.line_num, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise Place(path, reader.line_num).error("CSV", str(error)) from None


def json_lines(path: Path) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The objects of a JSON-lines file, and where they stand."""
    for number, line in lines(path):
        place = Place(path, number)
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            raise place.error("a JSON object", line or "an empty line") from None
        if not isinstance(record, dict):
            raise place.error("a JSON object", line)
        yield place, record


def json_file(path: Path) -> Any:
    """A JSON document."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Place(path).error("UTF-8", str(error)) from None
    except json.JSONDecodeError as error:
        raise Place(path, error.lineno).error(
            "JSON", f"{error.msg} in column {error.colno}"
        ) from None
