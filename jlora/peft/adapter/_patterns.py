"""Matches untrusted patterns in bounded time and memory."""

import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from ..._errors import InputError
from .._file import CONFIG, shorten

T = TypeVar("T")
SECONDS = 5.0  # of CPU time, for all patterns of an adapter
COMPARISONS = 20_000_000  # of a pattern with a name; the answers to more would not fit in 512 MB
_NO_PATTERN = "is not a regular expression"
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
    each = (p for p in patterns if p not in wrong and not PLAIN.fullmatch(p))
    jobs = [Job("fullmatch", p) for p in each]
    if not jobs:
        return wrong
    if (answers := _ask(jobs, [], SECONDS)) is None:
        why = f"cannot be compiled in {SECONDS:g} seconds of CPU time and 512 MB"
        return wrong | {job.pattern: why for job in jobs}
    each = zip(jobs, answers[0], strict=True)
    return wrong | {job.pattern: f"{_NO_PATTERN}: {e}" for job, e in each if e}


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
        kind: how it is matched: `fullmatch`, `match`, or `layer` for the number of a layer.
        pattern: the pattern.
        is_plain: whether it can be matched in this process.
    """

    kind: str
    pattern: str
    is_plain: bool = False


def match(jobs: Iterable[Job], names: Sequence[str], clock: Clock) -> dict[Job, list[Any]]:
    """Matches patterns with names, in one process with limited CPU time and memory.

    Python's `re` matches them, as in PEFT.

    Returns:
        For each pattern and each name None without a match, else True or a layer's number.
    """
    jobs = list(dict.fromkeys(jobs))
    found = {job: [_find(job, name) for name in names] for job in jobs if job.is_plain}
    others = [job for job in jobs if not job.is_plain]
    if not others or not names:
        return found | {job: [] for job in others}
    if len(others) * len(names) > COMPARISONS:
        clock.spend(math.inf)
    answers, seconds = _ask(others, names, clock.left) or ((), math.inf)
    clock.spend(seconds)
    for job, answer in zip(others, answers, strict=True):
        if not isinstance(answer, list):  # an error
            why = f"{shorten(job.pattern)} {_NO_PATTERN}: {answer}"
            raise InputError(clock.argument, why, path=CONFIG)
        found[job] = answer
    return found


def _find(job: Job, name: str) -> Any:
    """Matches a pattern in this process, as `_CHILD` does."""
    if job.kind != "layer":
        return getattr(re, job.kind)(job.pattern, name) and True
    found = re.match(job.pattern, name)
    return found and int(found["idx"])


def _ask(
    jobs: Collection[Job], names: Collection[str], seconds: float
) -> tuple[list[Any], float] | None:
    """Matches patterns in a new process; None if it needs too much time or memory."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    text = json.dumps([[job[:2] for job in jobs], list(names), math.ceil(seconds)])
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
