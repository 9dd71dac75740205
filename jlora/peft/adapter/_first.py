"""The values of `rank_pattern` and `alpha_pattern`, each of the first pattern that matches."""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ._patterns import PLAIN, Patterns, of_key

_Places = tuple[tuple[int, int | None], ...]


class First:
    r"""The value of the first pattern that matches, as PEFT looks up `rank_pattern`.

    PEFT matches `(.*\.)?(pattern)$`. Most patterns are names, which are looked up in tables: one
    for each length and each set of places at which any character may stand.
    """

    def __init__(self, values: Mapping[str, Any] | None, patterns: Patterns):
        self.names, self.values = list(values or ()), list((values or {}).values())
        self.patterns = patterns
        self.tables: dict[int, dict[_Places, dict[tuple[str, ...], list[int]]]] = {}
        self.matchers: dict[int, Callable[[str], Any]] = {}
        self.found: dict[str, list[list[int]]] = {}
        for i, pattern in enumerate(self.names):
            if PLAIN.fullmatch(pattern):
                length, places, parts = _plain(pattern)
                table = self.tables.setdefault(length, {}).setdefault(places, {})
                table.setdefault(parts, []).append(i)
            else:
                self.matchers[i] = patterns.add(of_key(pattern), "match")

    def __call__(self, key: str, default: Any) -> Any:
        first = min((own[0] for own in self._matching(key)), default=None)
        return default if first is None else self.values[first]

    def _matching(self, key: str) -> list[list[int]]:
        """The patterns that match, those that are the same together."""
        if key not in self.found:
            self.found[key] = list(self._looked_up(key))
        return self.found[key]

    def _looked_up(self, key: str) -> Iterator[list[int]]:
        for start in _starts(key) if self.tables else ():
            tables = self.tables.get(len(key) - start, {})
            self.patterns.spend(sum(map(len, tables)))
            for places, table in tables.items():
                if own := table.get(_at(places, key)):
                    yield own
        yield from ([i] for i, matcher in self.matchers.items() if matcher(key) is not None)

    def unused(self, keys: Collection[str]) -> list[str]:
        """The patterns that match none of `keys`."""
        self.patterns.prepare(keys)
        used = {i for key in keys for own in self._matching(key) for i in own}
        return [pattern for i, pattern in enumerate(self.names) if i not in used]


def _starts(key: str) -> Iterator[int]:
    """Where the last parts of a name begin, and the name."""
    at = -1
    while at is not None:
        yield at + 1
        at = found if (found := key.find(".", at + 1)) >= 0 else None


def _plain(pattern: str) -> tuple[int, _Places, tuple[str, ...]]:
    """The length of a pattern that is a name, and what the end of a key must be where."""
    characters = [".", *re.findall(r"\\?.", pattern)]
    known = [bool(at == 0 or c != ".") for at, c in enumerate(characters)]
    n, places, parts = len(characters), [], []
    for is_known, run in itertools.groupby(range(n), known.__getitem__):
        if is_known:
            run = list(run)
            places.append((run[0] - n, run[-1] + 1 - n or None))
            parts.append("".join(characters[at][-1] for at in run))
    return n - 1, tuple(places), tuple(parts)


def _at(places: _Places, key: str) -> tuple[str, ...]:
    key = "." + key
    return tuple(key[start:stop] for start, stop in places)
