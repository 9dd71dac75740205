"""Matches the patterns of a configuration with modules, as PEFT does.

A file may have ten thousand patterns and a hundred thousand modules. Patterns that are names are
therefore looked up, and of other forms a field has few.
"""

import collections
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..._errors import Problem, shorten
from .._file import NAME_LIMIT

PATTERNS = ("rank_pattern", "alpha_pattern")
CHOICES = ("target_modules", "exclude_modules")
LENGTH = 10_000  # characters of a pattern
FORMS = 250  # of the patterns in a field; real files have dozens
# A pattern that is a name, whose dots may be escaped. It matches without backtracking.
PLAIN = re.compile(rf"(?:\w|\\?[.-]){{1,{NAME_LIMIT}}}", re.ASCII)


def list_bad_patterns(fields: Mapping[str, Any]) -> list[Problem]:
    """Lists the patterns that are no regular expressions, or too long, and fields with too many."""
    patterns = {key: [x] for key in CHOICES if isinstance(x := fields.get(key), str)}
    patterns |= {key: list(fields.get(key) or ()) for key in PATTERNS}
    patterns["layers_pattern"] = as_list(fields.get("layers_pattern"))
    found = list[Problem]()
    for field, own in patterns.items():
        # Names are looked up once for each length and each set of places where a dot takes any
        # character.
        names = {x: _find_places(x) for x in own if PLAIN.fullmatch(x)}
        others = [x for x in own if x not in names]
        if (count := len({*names.values()}) + len(others)) > FORMS:
            why = f"has patterns of {count} forms; expected at most {FORMS}"
            remedy = "Escape the dots of names, or list the modules by name."
            found.append(Problem(field, why, remedy))
            continue
        each = ((x, _explain_pattern(field, x)) for x in others)
        found += [Problem(field, f"{shorten(x)} {why}") for x, why in each if why]
    return found


def _explain_pattern(field: str, pattern: str) -> str:
    """Explains why a pattern cannot be matched; empty if it can."""
    if len(pattern) > LENGTH:
        return f"has more than {LENGTH} characters"
    try:
        as_in_peft(field, pattern)
    except (re.error, RecursionError, OverflowError) as e:
        return f"is not a regular expression: {e}"
    return ""


def as_in_peft(field: str, pattern: str | None) -> re.Pattern[str]:
    """Returns the expression that PEFT matches with the start of a module's name.

    Its group `idx` is the number of a layer. `layers_pattern` may be None.
    """
    if field in PATTERNS:
        return re.compile(rf"(.*\.)?({pattern})$")
    if field != "layers_pattern":
        return re.compile(pattern or "")
    start = r".*?\.[^.]*" if pattern is None else rf"(?:^|.*?\.){pattern}"
    return re.compile(rf"{start}\.(?P<idx>\d{{1,9}})\.")


def make_matching(field: str, patterns: Iterable[str]) -> Callable[[str], Iterator[str]]:
    r"""Makes a function that lists the patterns for which `(.*\.)?(pattern)$` matches a name."""
    tables: dict[int, dict[tuple[int, ...], dict[str, list[str]]]] = {}
    others = dict[str, re.Pattern[str]]()
    for pattern in patterns:
        if PLAIN.fullmatch(pattern):
            length, *places = _find_places(pattern)
            table = tables.setdefault(length, {}).setdefault((*places,), {})
            table.setdefault(pattern.replace("\\", ""), []).append(pattern)
        else:
            others[pattern] = as_in_peft(field, pattern)

    def list_matching(name: str) -> Iterator[str]:
        for tail in list_tails(name) if tables else ():
            for places, table in tables.get(len(tail), {}).items():
                yield from table.get(_put_dots(tail, places), ())
        yield from (pattern for pattern, expression in others.items() if expression.match(name))

    return list_matching


def _find_places(pattern: str) -> tuple[int, ...]:
    """Returns the length of a name, and where a dot of its pattern takes any character."""
    characters = re.findall(r"\\?.", pattern)
    return len(characters), *(at for at, c in enumerate(characters) if c == ".")


def _put_dots(name: str, places: Sequence[int]) -> str:
    """Puts dots into a name at some positions."""
    ends = zip((0, *(at + 1 for at in places)), (*places, len(name)), strict=True)
    return ".".join(name[start:stop] for start, stop in ends)


def as_list(values: Any) -> list[Any]:
    """Returns the values of a field that may have one, several or none."""
    return values if isinstance(values, list) else [] if values is None else [values]


def list_parents(module: str) -> Iterator[str]:
    """Yields `module` and the modules around it."""
    yield module
    while module := module.rpartition(".")[0]:
        yield module


def list_tails(module: str) -> Iterator[str]:
    """Yields `module` and its endings after a dot, the longest first."""
    while module:
        yield module
        module = module.partition(".")[2]


def make_scales(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Makes the fields of ranks and alphas: the most common ones, and patterns for the others."""
    (r, rank_pattern), (alpha, alpha_pattern) = map(_find_common, (ranks, alphas))
    values = r, alpha, rank_pattern, alpha_pattern
    return dict(zip(("r", "lora_alpha", *PATTERNS), values, strict=True))


def _find_common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Finds the most common value, and patterns for the others: last words, or else whole names."""
    [(most, _)] = collections.Counter(values.values()).most_common(1)
    each = collections.defaultdict[str, set[float]](set)
    for name, x in values.items():
        each[last_of(name)].add(x)
    inner = {tail for name in values for tail in list_tails(name) if tail != name}

    def spell(name: str) -> str:
        last = last_of(name)
        if len(each[last]) == 1:
            return re.escape(last)
        return "^" * (name in inner) + re.escape(name)  # PEFT matches the ends of names

    return most, {spell(name): x for name, x in values.items() if x != most}


def last_of(name: str) -> str:
    """Returns the last word of a name."""
    return name.rpartition(".")[2]
