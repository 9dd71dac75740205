"""Tables of text, and sizes in bytes."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any


def align_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str]
) -> list[str]:
    """Aligns the header and the rows as lines, with the columns named in `right` flush right.

    >>> align_columns(("name", "n"), [("a", "1"), ("b", "10")], {"n"})
    ['name   n', 'a      1', 'b     10']
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(w) if name in right else cell.ljust(w)
            for cell, w, name in zip(row, widths, header, strict=True)
        ).rstrip()
        for row in (header, *rows)
    ]


def fold_numbers(
    paths: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> list[tuple[str, list[int]]]:
    """Folds three or more paths that have equal rows and differ in one number, which counts up.

    Returns each path with the indices of its rows.

    >>> fold_numbers(["h/0/w", "h/1/w", "h/2/w", "h/3/w"], [("8",), ("8",), ("8",), ("4",)])
    [('h/0…2/w', [0, 1, 2]), ('h/3/w', [3])]
    """
    found = [(re.split(r"(\d{1,9})", path), [n]) for n, path in enumerate(paths)]
    for i in range(1, max((len(parts) for parts, _ in found), default=0), 2):  # where numbers are

        def rest(x: tuple[list[str], list[int]], i: int = i) -> tuple[Any, ...]:
            return rows[x[1][0]], x[0][:i], x[0][i + 1 :]

        def number(x: tuple[list[str], list[int]], i: int = i) -> int:
            return int(x[0][i]) if len(x[0]) > i else 0

        found.sort(key=lambda x: (rest(x), number(x)))
        runs = defaultdict(list)
        for n, x in enumerate(found):
            runs[str(rest(x)), number(x) - n].append(x)
        found = []
        for run in runs.values():
            (parts, _), (end, _) = run[0], run[-1]
            folded = [*parts[:i], f"{parts[i]}…{end[i]}", *parts[i + 1 :]] if len(run) > 2 else None
            found += [(folded, [n for _, ns in run for n in ns])] if folded else run
    return [("".join(parts), ns) for parts, ns in sorted(found, key=lambda x: x[1][0])]


def format_bytes(n: float) -> str:
    """Writes a number of bytes.

    >>> format_bytes(1536)
    '1.5 KiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    i = min(int(math.log(max(n, 1), 1024)), len(units) - 1)
    return f"{n / 1024**i:.1f} {units[i]}" if i else f"{n} B"
