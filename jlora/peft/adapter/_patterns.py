"""Matches untrusted patterns with a bounded amount of work."""

import functools
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

from .._file import shorten

SECONDS = 5.0  # of CPU time, for all patterns of an adapter
_NO_PATTERN = "is no regular expression"
STEPS = 20_000_000  # comparisons of a pattern or a name with a module
LENGTH = 10_000  # characters of a pattern
# A pattern that is a name; dots may be escaped, or any character. It matches without backtracking.
PLAIN = re.compile(r"(?:\w|\\?[.-])+", re.ASCII)
# A search of Python's cannot be stopped, but a process can. It answers each pattern by its error or
# by what each name gives: null, true, or the number of the layer, on a line; then its seconds.
_CHILD = """
import json, re, sys, time
jobs, names, seconds = json.load(sys.stdin)
try:
    import resource
    limits = ("CORE", 0), ("AS", 2**29), ("CPU", seconds)
except ImportError:
    limits = ()
for name, limit in limits:
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    except (OSError, ValueError):
        pass  # not of this system

def answer(kind, pattern):
    try:
        pattern = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        return str(e)
    if kind != "layer":
        match = getattr(pattern, kind)
        return [match(name) and True for name in names]
    found = map(pattern.match, names)
    return [match and match["idx"] and int(match["idx"]) for match in found]

for job in jobs:  # each by itself, for the sake of memory
    print(json.dumps(answer(*job)))
print(time.process_time())
"""
_HAS_LIMITS = importlib.util.find_spec("resource") is not None


def explain_refused(patterns: Collection[str]) -> dict[str, str]:
    """Maps the patterns that are refused to the reason."""
    wrong = {
        p: f"is of {len(p)} characters; expected at most {LENGTH}"
        for p in patterns
        if len(p) > LENGTH
    }
    jobs = [("fullmatch", p) for p in patterns if p not in wrong and not PLAIN.fullmatch(p)]
    if not jobs:
        return wrong
    if (answers := _ask(jobs, [], SECONDS)) is None:
        why = f"cannot be compiled in {SECONDS:g} seconds of CPU time and 512 MB"
        return wrong | {p: why for _, p in jobs}
    each = zip(jobs, answers[0], strict=True)
    return wrong | {p: f"{_NO_PATTERN}: {e}" for (_, p), e in each if e}


def wrap_key(pattern: str) -> str:
    """Returns the regular expression by which PEFT matches a key of `rank_pattern`."""
    return rf"(.*\.)?({pattern})$"


def wrap_layer(pattern: str | None) -> str:
    """Returns the regular expression by which PEFT finds a layer; None is no `layers_pattern`."""
    start, pattern = (r".*?\.", r"[^.]*") if pattern is None else (r"(?:^|.*?\.)", pattern)
    return rf"{start}{pattern}\.(?P<idx>\d{{1,9}})\."


def unescape(pattern: str) -> tuple[str, tuple[int, ...]]:
    """Returns the name that a plain pattern is, and the places at which it takes any character."""
    characters = re.findall(r"\\?.", pattern)
    places = tuple(at for at, c in enumerate(characters) if c == ".")
    return "".join(c[-1] for c in characters), places


class Patterns:
    """The patterns of an adapter, with what they find in names.

    Python matches them, as it does for PEFT, in a process whose CPU time and memory are limited.
    """

    def __init__(self, what: str) -> None:
        """`what` is the user's argument that has the adapter."""
        self.what, self.seconds, self.steps = what, SECONDS, STEPS
        self.found: dict[tuple[str, str], list[Any]] = {}
        self.at: dict[str, int] = {}  # of each name in these lists

    def add(self, pattern: str, kind: str, is_plain: bool = False) -> Callable[[str], Any]:
        """Makes a function of names: None without a match, else True or a layer's number.

        Args:
            pattern: the pattern.
            kind: how it is matched: `fullmatch`, `match`, or `layer`, which gives a number.
            is_plain: whether it can be matched in this process.
        """
        if is_plain:
            return functools.partial(_find, re.compile(pattern), kind)
        self.found[kind, pattern] = []
        return functools.partial(self._look_up, (kind, pattern))

    def _look_up(self, job: tuple[str, str], name: str) -> Any:
        if name not in self.at:
            self.prepare([name])
        return self.found[job][self.at[name]]

    def spend(self, steps: int) -> None:
        """Counts comparisons; raises once an adapter takes more than `STEPS`."""
        self.steps -= steps
        if self.steps < 0:
            raise ValueError(self._too_much(f"{STEPS:,} comparisons"))

    def prepare(self, names: Iterable[str]) -> None:
        """Matches all patterns with the new ones of `names`, in one process."""
        new = [name for name in dict.fromkeys(names) if name not in self.at]
        if not new or not self.found:
            return
        self.spend(len(new) * len(self.found))
        answers = _ask(self.found, new, self.seconds) if self.seconds > 0 else None
        if answers is None:
            raise ValueError(self._too_much(f"{SECONDS:g} seconds of CPU time or 512 MB"))
        self.seconds -= answers[1]
        for ((_, pattern), own), answer in zip(self.found.items(), answers[0], strict=True):
            if not isinstance(answer, list):  # an error's words
                raise ValueError(f"{self.what}: {shorten(pattern)} {_NO_PATTERN}: {answer}")
            own += answer
        self.at |= {name: i for i, name in enumerate(new, len(self.at))}

    def _too_much(self, amount: str) -> str:
        return (
            f"{self.what}: adapter_config.json takes more than {amount} to match with the modules "
            "of the adapter and the model. List the modules by their names."
        )


def _find(pattern: re.Pattern[str], kind: str, name: str) -> Any:
    """Matches in this process as `_CHILD` does."""
    match = pattern.match(name) if kind == "layer" else getattr(pattern, kind)(name)
    return match and (int(match["idx"]) if kind == "layer" else True)


def _ask(
    jobs: Collection[tuple[str, str]], names: Collection[str], seconds: float
) -> tuple[list[Any], float] | None:
    """Asks a new process what each pattern finds; None if it takes too much time or memory."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    text = json.dumps([list(jobs), list(names), math.ceil(seconds)])
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            # A clock only where the system knows no other limit.
            timeout=None if _HAS_LIMITS else 60,
        )
    except subprocess.TimeoutExpired:
        return None
    except (OSError, TypeError) as e:  # `sys.executable` is None where Python is embedded
        raise _explain_start(e) from e
    if done.returncode > 0 and "MemoryError" not in done.stderr:
        raise _explain_start(done.stderr.strip().rpartition("\n")[2])
    if done.returncode:
        return None
    *answers, seconds = map(json.loads, done.stdout.splitlines())
    return answers, seconds


def _explain_start(why: Any) -> ValueError:
    return ValueError(
        "patterns of adapter_config.json are matched in a process of their own, but Python could "
        f"not be started for it ({why}). List the modules by their names."
    )
