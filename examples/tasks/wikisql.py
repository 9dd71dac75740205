"""WikiSQL: questions about tables, and the SQL that answers them.

    DIR/train.jsonl  DIR/train.tables.jsonl  dev…  test…     # the folder `data` of the release

    examples = wikisql.read(DIR, "dev")
    accuracy = wikisql.accuracy([generated text …], examples)

A query is SELECT a column, perhaps aggregated, WHERE columns are equal to, above or below values.
As text, names stand in double and values in single quotes, doubled where they occur inside, so that
`parse(render(query))` is the query; of two columns with one name, the first is meant.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import files

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
SPLITS = ("train", "dev", "test")


class Query(NamedTuple):
    """A query in logical form: numbers of columns and operators, as in the files."""

    column: int
    aggregate: int
    conditions: tuple[tuple[int, int, str], ...]  # column, operator, value


class Example(NamedTuple):
    """A question and its query, as text and in logical form, with the names of the columns."""

    prompt: str
    answer: str
    query: Query
    header: tuple[str, ...]


def read(folder: str | Path, split: str) -> list[Example]:
    """The examples of a split.

    Raises:
        FileNotFoundError: there is no such file; the message says what to put where.
        FormatError: a file is not as it should be.
        ValueError: `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}")
    source = "the files of WikiSQL's data.tar.bz2"
    questions = files.find(folder, [f"{split}.jsonl"], source)
    tables = files.find(folder, [f"{split}.tables.jsonl"], source)
    headers = {
        place.text(record, "id"): _header(place, record)
        for place, record in files.json_lines(tables)
    }
    lines = files.json_lines(questions)
    return files.some(questions, (_example(place, record, headers) for place, record in lines))


def render(query: Query, header: Sequence[str]) -> str:
    r"""The query as text.

    Example:
        >>> render(Query(1, 3, ((0, 0, "O'Hara"),)), ["Name", "Points"])
        'SELECT COUNT("Points") FROM table WHERE "Name" = \'O\'\'Hara\''
    """
    name = _name(header[query.column])
    aggregate = AGGREGATES[query.aggregate]
    where = " AND ".join(
        f"{_name(header[column])} {OPERATORS[operator]} {_value(value)}"
        for column, operator, value in query.conditions
    )
    select = f"SELECT {aggregate}({name})" if aggregate else f"SELECT {name}"
    return f"{select} FROM table" + (f" WHERE {where}" if where else "")


_QUOTED = r'"(?:[^"]|"")*"'
_CONDITION = rf"({_QUOTED}) ([=<>]) ('(?:[^']|'')*')"
_QUERY = (
    rf"SELECT (?:(MAX|MIN|COUNT|SUM|AVG)\(({_QUOTED})\)|({_QUOTED})) FROM table"
    rf"(?: WHERE ({_CONDITION}(?: AND {_CONDITION})*))?"
)


def parse(text: str, header: Sequence[str]) -> Query | None:
    """The query that a text says; None where it is none of the table with these columns."""
    if not (match := re.fullmatch(_QUERY, text.strip())):
        return None
    aggregate, name = match[1] or "", match[2] or match[3]
    conditions = re.findall(_CONDITION, match[4] or "")
    names = [found[1:-1].replace('""', '"') for found in (name, *(c[0] for c in conditions))]
    if not set(names) <= set(header):
        return None
    column, *others = map(list(header).index, names)
    return Query(
        column,
        AGGREGATES.index(aggregate),
        tuple(
            (other, OPERATORS.index(operator), value[1:-1].replace("''", "'"))
            for other, (_, operator, value) in zip(others, conditions, strict=True)
        ),
    )


def same(a: Query, b: Query) -> bool:
    """Whether two queries have the same logical form, by the rule of WikiSQL's evaluation.

    The order of the conditions and the case of their values do not matter.
    """
    conditions = [{(c, o, value.lower()) for c, o, value in q.conditions} for q in (a, b)]
    return a[:2] == b[:2] and conditions[0] == conditions[1]


def accuracy(texts: Sequence[str], examples: Sequence[Example]) -> float:
    """The share of texts that say a query of the same logical form as the example's."""
    if len(texts) != len(examples) or not examples:
        raise ValueError(f"`texts`: expected {len(examples)}, at least 1, got {len(texts)}")
    right = 0
    for text, example in zip(texts, examples, strict=True):
        said, meant = (parse(t, example.header) for t in (text, example.answer))
        right += said is not None and meant is not None and same(said, meant)
    return right / len(examples)


# ---- the files ----------------------------------------------------------------------------------


def _header(place: files.Place, record: Any) -> tuple[str, ...]:
    header = place.field(record, "header", list, "a list")
    if not all(isinstance(name, str) for name in header):
        raise place.error('names in the field "header"', header)
    return tuple(header)


def _example(place: files.Place, record: Any, headers: Mapping[str, tuple[str, ...]]) -> Example:
    table = place.text(record, "table_id")
    if table not in headers:
        raise place.error("the id of a table in the .tables.jsonl beside it", table)
    header = headers[table]
    query = _query(place, place.field(record, "sql", dict, "an object"), len(header))
    prompt = f"{' | '.join(header)}\n{place.text(record, 'question')}\n\n"
    return Example(prompt, render(query, header), query, header)


def _query(place: files.Place, sql: Any, columns: int) -> Query:
    def number(value: Any, below: int, what: str) -> int:
        if type(value) is not int or not 0 <= value < below:
            raise place.error(f"{what} below {below}", value)
        return value

    conditions = place.field(sql, "conds", list, "a list")
    if any(not isinstance(condition, list) or len(condition) != 3 for condition in conditions):
        raise place.error("conditions of a column, an operator and a value", conditions)
    return Query(
        number(sql.get("sel"), columns, "sel"),
        number(sql.get("agg"), len(AGGREGATES), "agg"),
        tuple(
            (number(c, columns, "a column"), number(o, len(OPERATORS), "an operator"), str(value))
            for c, o, value in conditions
        ),
    )


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _value(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
