"""Matches untrusted patterns in bounded time and memory."""

import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from ..._errors import InputError, Problem
from .._file import CONFIG, NAME_LIMIT, shorten

T = TypeVar("T")
LENGTH = 10_000  # characters of a pattern
SECONDS = 5.0  # of CPU time, for all patterns of an adapter
COMPARISONS = 20_000_000  # of a pattern with a name; the answers to more would not fit in 512 MB
# A pattern that is a name, whose dots may be escaped. It matches without backtracking.
PLAIN = re.compile(rf"(?:\w|\\?[.-]){{1,{NAME_LIMIT}}}", re.ASCII)
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


class Clock:
    """The CPU time that matching the patterns of one adapter may take, here and in processes."""

    def __init__(self, argument: str = "config") -> None:
        """Takes the user's argument with the adapter, for errors."""
        self.argument, self.left = argument, SECONDS

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yields `items` until no time is left for what is done with them; then it raises."""
        last = time.thread_time()
        for x in items:
            yield x
            now = time.thread_time()
            self.spend(now - last)
            last = now

    def spend(self, seconds: float) -> None:
        """Takes away time; raises if too little is left."""
        self.left -= seconds
        if self.left <= 0:
            raise InputError(
                self.argument,
                f"matching the patterns of adapter_config.json with the modules "
                f"takes more than {SECONDS:g} seconds of CPU time or 512 MB. List the modules by "
                "name.",
                path=CONFIG,
            )


class Job(NamedTuple):
    """A pattern to match with names.

    Attributes:
        field: the field that has it.
        pattern: the pattern; None for that of layers without one.
    """

    field: str
    pattern: str | None

    def as_in_peft(self) -> tuple[str, str]:
        """Returns how PEFT matches: `fullmatch`, `match`, or `layer`, and a regular expression."""
        if self.field.endswith("_modules"):
            return "fullmatch", self.pattern or ""
        if self.field != "layers_pattern":
            return "match", rf"(.*\.)?({self.pattern})$"
        start = r".*?\.[^.]*" if self.pattern is None else rf"(?:^|.*?\.){self.pattern}"
        return "layer", rf"{start}\.(?P<idx>\d{{1,9}})\."


Found = Mapping[Job, Mapping[str, Any]]


def match(jobs: Iterable[Job], names: Sequence[str], clock: Clock) -> Found:
    """Matches patterns with names, in one process with limited CPU time and memory.

    Python's `re` matches them, as in PEFT.

    Returns:
        For each pattern the names that match, each with True or the number of a layer.

    Raises:
        ValueError: if a pattern is no regular expression, or matching takes too much.
    """
    jobs = list(dict.fromkeys(jobs))
    if not jobs or not names:
        return {job: {} for job in jobs}
    if len(jobs) * len(names) > COMPARISONS:
        clock.spend(math.inf)
    long = f"has more than {LENGTH} characters"
    _refuse(clock, {job: long for job in jobs if len(job.pattern or "") > LENGTH})
    answers, seconds = _ask([job.as_in_peft() for job in jobs], names, clock.left) or ((), math.inf)
    clock.spend(seconds)
    found = dict(zip(jobs, answers, strict=True))
    _refuse(clock, {job: why for job, why in found.items() if isinstance(why, str)})
    each = ((job, zip(names, answer, strict=True)) for job, answer in found.items())
    return {job: {name: x for name, x in pairs if x is not None} for job, pairs in each}


def _refuse(clock: Clock, wrong: Mapping[Job, str]) -> None:
    """Raises if there are patterns that cannot be matched, with the reasons."""
    if wrong:
        why = f"{CONFIG} has a pattern that is not a regular expression, or is too long."
        each = [Problem(job.field, f"{shorten(job.pattern)}: {x}") for job, x in wrong.items()]
        raise InputError(clock.argument, why, path=CONFIG, problems=each)


def _ask(
    jobs: Sequence[tuple[str, str]], names: Collection[str], seconds: float
) -> tuple[list[Any], float] | None:
    """Matches patterns in a new process; None if it needs too much time or memory."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    text = json.dumps([jobs, list(names), math.ceil(seconds)])
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
