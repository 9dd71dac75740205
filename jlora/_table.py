"""Tables of text for people."""

import math
from collections.abc import Collection, Sequence


def aligned(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str]
) -> list[str]:
    """The header and the rows as lines, the columns named in `right` flush right.

    >>> aligned(("name", "n"), [("a", "1"), ("b", "10")], {"n"})
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


def readable(n: float) -> str:
    """A number of bytes.

    >>> readable(1536)
    '1.5 KiB'
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    i = min(int(math.log(max(n, 1), 1024)), len(units) - 1)
    return f"{n / 1024**i:.1f} {units[i]}" if i else f"{n} B"
