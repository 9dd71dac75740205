"""Matches untrusted patterns in bounded time and memory."""

import functools
import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

from ..._errors import InputError
from .._file import shorten

SECONDS = 5.0  # of CPU time, for all patterns of an adapter
_NO_PATTERN = "is not a regular expression"
STEPS = 20_000_000  # comparisons of a pattern or a name with a module
LENGTH = 10_000  # characters of a pattern
# A pattern that is a name, whose dots may be escaped. It matches without backtracking.
PLAIN = re.compile(r"(?:\w|\\?[.-])+", re.ASCII)
# Python's `re` cannot be interrupted, but a process can. The process prints a line of JSON for each
# pattern: an error, or for each name null, true or the number of a layer. Then it prints its time.
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

for job in jobs:  # one at a time, to save memory
    print(json.dumps(answer(*job)))
print(time.process_time())
"""
_HAS_LIMITS = importlib.util.find_spec("resource") is not None


def explain_refused(patterns: Collection[str]) -> dict[str, str]:
    """Maps each refused pattern to the reason."""
    wrong = {
        p: f"has {len(p)} characters; expected at most {LENGTH}"
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
    """Returns the regular expression that PEFT makes of a key of `rank_pattern`."""
    return rf"(.*\.)?({pattern})$"


def wrap_layer(pattern: str | None) -> str:
    """Returns PEFT's regular expression for a layer's number, by a `layers_pattern` or None."""
    start, pattern = (r".*?\.", r"[^.]*") if pattern is None else (r"(?:^|.*?\.)", pattern)
    return rf"{start}{pattern}\.(?P<idx>\d{{1,9}})\."


def unescape(pattern: str) -> tuple[str, tuple[int, ...]]:
    """Returns a plain pattern as a name, and the positions of dots that match any character."""
    characters = re.findall(r"\\?.", pattern)
    places = tuple(at for at, c in enumerate(characters) if c == ".")
    return "".join(c[-1] for c in characters), places


class Patterns:
    """The patterns of an adapter, and their results for names.

    Python's `re` matches them, as in PEFT, in a process with limited CPU time and memory.
    """

    def __init__(self, argument: str) -> None:
        """Takes the user's argument with the adapter, for errors."""
        self.argument, self.seconds, self.steps = argument, SECONDS, STEPS
        self.found: dict[tuple[str, str], list[Any]] = {}
        self.at: dict[str, int] = {}  # the index of each name in these lists

    def add(self, pattern: str, kind: str, is_plain: bool = False) -> Callable[[str], Any]:
        """Returns a function of a name: None without a match, else True or a layer's number.

        Args:
            pattern: the pattern.
            kind: how it is matched: `fullmatch`, `match`, or `layer` for the number of a layer.
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
        """Counts comparisons; raises after `STEPS` of them."""
        self.steps -= steps
        if self.steps < 0:
            raise self._too_much(f"{STEPS:,} comparisons")

    def prepare(self, names: Iterable[str]) -> None:
        """Matches all patterns with all new `names`, in one process."""
        new = [name for name in dict.fromkeys(names) if name not in self.at]
        if not new or not self.found:
            return
        self.spend(len(new) * len(self.found))
        answers = _ask(self.found, new, self.seconds) if self.seconds > 0 else None
        if answers is None:
            raise self._too_much(f"{SECONDS:g} seconds of CPU time or 512 MB")
        self.seconds -= answers[1]
        for ((_, pattern), own), answer in zip(self.found.items(), answers[0], strict=True):
            if not isinstance(answer, list):  # an error
                why = f": {shorten(pattern)} {_NO_PATTERN}: {answer}"
                raise InputError(f"`{self.argument}`{why}")
            own += answer
        self.at |= {name: i for i, name in enumerate(new, len(self.at))}

    def _too_much(self, amount: str) -> InputError:
        return InputError(
            f"`{self.argument}`: matching the patterns of adapter_config.json with the modules "
            f"takes more than {amount}. List the modules by name.",
        )


def _find(pattern: re.Pattern[str], kind: str, name: str) -> Any:
    """Matches a pattern in this process, as `_CHILD` does."""
    match = pattern.match(name) if kind == "layer" else getattr(pattern, kind)(name)
    return match and (int(match["idx"]) if kind == "layer" else True)


def _ask(
    jobs: Collection[tuple[str, str]], names: Collection[str], seconds: float
) -> tuple[list[Any], float] | None:
    """Matches patterns in a new process; None if it needs too much time or memory."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    text = json.dumps([list(jobs), list(names), math.ceil(seconds)])
    try:
        done = subprocess.run(
            command,
            input=text,
            capture_output=True,
            text=True,
            # A clock only if the system has no limit of CPU time.
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


def _explain_start(why: object) -> ValueError:
    return ValueError(
        "patterns of adapter_config.json are matched in a separate process, but Python could not "
        f"be started ({why}). List the modules by name."
    )
