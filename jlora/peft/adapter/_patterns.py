"""Patterns of files that nobody vouches for, matched with a bounded amount of work."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from .._file import brief

SECONDS = 5.0  # of CPU time, for all patterns of an adapter
STEPS = 20_000_000  # comparisons of a pattern or a name with a module
LENGTH = 10_000  # characters of a pattern
# A pattern that is a name; dots may be escaped, or any character. It matches without backtracking.
PLAIN = re.compile(r"(?:\w|\\?[.-])+", re.ASCII)
# A search of Python's cannot be stopped, but a process can. It answers a pattern a line: its error,
# or for each name null, true, or the number of the layer.
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

def layer(match):
    return match and match["idx"] and int(match["idx"])

for kind, pattern in jobs:
    try:
        pattern = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        print(json.dumps(str(e)))
        continue
    if kind == "layer":
        found = [layer(pattern.match(name)) for name in names]
    else:
        match = getattr(pattern, kind)
        found = [match(name) and True for name in names]
    print(json.dumps(found))
print(time.process_time())
"""
_HAS_LIMITS = importlib.util.find_spec("resource") is not None


def problems_of(patterns: Collection[str]) -> dict[str, str]:
    """Why patterns are refused, by those that are."""
    wrong = {
        p: f"is of {len(p)} characters; expected at most {LENGTH}"
        for p in patterns
        if len(p) > LENGTH
    }
    jobs = [("fullmatch", p) for p in patterns if p not in wrong and not PLAIN.fullmatch(p)]
    lines = _matched(jobs, [], SECONDS) if jobs else []
    if lines is None:
        why = f"cannot be compiled in {SECONDS:g} seconds of CPU time and 512 MB"
        return wrong | {p: why for _, p in jobs}
    each = zip(jobs, lines, strict=False)
    return wrong | {p: f"is no regular expression: {e}" for (_, p), e in each if e}


def of_key(pattern: str) -> str:
    """How PEFT matches a key of `rank_pattern` and `alpha_pattern`, from a name's start."""
    return rf"(.*\.)?({pattern})$"


def of_layer(pattern: str | None) -> str:
    """How PEFT finds the number of a layer, from a name's start; with `layers_pattern`, or none."""
    start, pattern = (r".*?\.", r"[^.]*") if pattern is None else (r"(?:^|.*?\.)", pattern)
    return rf"{start}{pattern}\.(?P<idx>\d{{1,9}})\."


class Patterns:
    """All patterns of an adapter, and the names that they were matched with.

    Python matches them, as it does for PEFT, in a process whose CPU time and memory are limited.
    """

    def __init__(self, what: str) -> None:
        """Of the adapter that the user gave as the argument `what`."""
        self.what, self.seconds, self.steps = what, SECONDS, STEPS
        self.jobs: list[tuple[str, str]] = []
        self.found: list[list[Any]] = []
        self.at: dict[str, int] = {}

    def add(self, pattern: str, kind: str) -> "Matcher":
        """A function of names, which matches by `fullmatch`, `match` or as that of a `layer`."""
        self.jobs.append((kind, pattern))
        self.found.append([])
        return Matcher(self, len(self.jobs) - 1)

    def spend(self, steps: int) -> None:
        """Raises once all of an adapter takes more than `STEPS`."""
        self.steps -= steps
        if self.steps < 0:
            raise ValueError(self._too_much(f"{STEPS:,} comparisons"))

    def prepare(self, names: Iterable[str]) -> None:
        """Matches all patterns with the names that are new, in one process."""
        new = [name for name in dict.fromkeys(names) if name not in self.at] if self.jobs else []
        if not new:
            return
        self.spend(len(new) * len(self.jobs))
        lines = _matched(self.jobs, new, self.seconds) if self.seconds > 0 else None
        if lines is None:
            raise ValueError(self._too_much(f"{SECONDS:g} seconds of CPU time or 512 MB"))
        *lines, seconds = lines
        self.seconds -= seconds
        for own, line, (_, pattern) in zip(self.found, lines, self.jobs, strict=True):
            if isinstance(line, str):
                raise ValueError(
                    f"{self.what}: the pattern {brief(pattern)} of adapter_config.json is no "
                    f"regular expression: {line}."
                )
            own += line
        self.at |= {name: i for i, name in enumerate(new, len(self.at))}

    def _too_much(self, amount: str) -> str:
        return (
            f"{self.what}: adapter_config.json takes more than {amount} to match with the modules "
            "of the adapter and the model. List the modules by their names."
        )


class Matcher(NamedTuple):
    """One of the patterns."""

    patterns: Patterns
    number: int

    def __call__(self, name: str) -> Any:
        """None without a match; else True, or the number of the layer."""
        if name not in self.patterns.at:
            self.patterns.prepare([name])
        return self.patterns.found[self.number][self.patterns.at[name]]


def _matched(
    jobs: Collection[tuple[str, str]], names: Collection[str], seconds: float
) -> list[Any] | None:
    """What each pattern finds, and the seconds that this took; None if it took too much."""
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
        raise _not_started(e) from e
    if done.returncode > 0 and "MemoryError" not in done.stderr:
        raise _not_started(done.stderr.strip().rpartition("\n")[2])
    return None if done.returncode else list(map(json.loads, done.stdout.splitlines()))


def _not_started(why: Any) -> ValueError:
    return ValueError(
        "patterns of adapter_config.json are matched in a process of their own, but Python could "
        f"not be started for it ({why}). List the modules by their names."
    )
