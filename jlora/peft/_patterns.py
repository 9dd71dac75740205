"""Patterns of files that nobody vouches for, matched in bounded time."""

import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import re2

from ._file import brief

SECONDS = 5.0  # for all patterns of an adapter
LENGTH = 10_000  # characters of a pattern
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
# Groups, characters of classes: Python reads these otherwise than RE2, or only one of them does.
_OTHERWISE = re.compile(r"\[:|\\[pPCQEz]")
# For what RE2 lacks: a process that can be stopped, which a search of Python's cannot be.
_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
except ImportError:
    pass  # where there are no such limits the time is one
kind, pattern, names = json.load(sys.stdin)
found = [getattr(re, kind)(pattern, name) for name in names]
json.dump([None if m is None else m.groupdict() for m in found], sys.stdout)
"""


class Clock:
    """The time that all patterns of an adapter have together."""

    def __init__(self, what: str) -> None:
        """Of the adapter that the user gave as the argument `what`."""
        self.what, self.end = what, time.monotonic() + SECONDS

    def left(self) -> float:
        """Seconds.

        Raises:
            ValueError: if none are.
        """
        if (left := self.end - time.monotonic()) <= 0:
            raise ValueError(
                f"{self.what}: adapter_config.json takes more than {SECONDS:g} seconds to match "
                "with the modules of the adapter and the model. List the modules by their names."
            )
        return left


def problem(pattern: str) -> str | None:
    """Why a pattern is refused, or None."""
    if len(pattern) > LENGTH:
        return f"is of {len(pattern)} characters; expected at most {LENGTH}"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        return f"is no regular expression: {e}"
    return None


def of_key(pattern: str) -> str:
    """How PEFT matches a key of `rank_pattern` and `alpha_pattern`, from a name's start."""
    return rf"(.*\.)?({pattern})$"


def of_layer(pattern: str | None) -> str:
    """How PEFT finds the number of a layer, from a name's start; with `layers_pattern`, or none."""
    start, pattern = (r".*?\.", r"[^.]*") if pattern is None else (r"(?:^|.*?\.)", pattern)
    return rf"{start}{pattern}\.(?P<idx>\d{{1,9}})\."


class Matcher:
    """A pattern, and what it was found to match.

    RE2 matches in time that is linear in the name. A pattern with lookaround or what else RE2 lacks
    is left to Python in a process of its own, which is stopped when the time is over.
    """

    def __init__(self, pattern: str, clock: Clock, kind: str = "fullmatch"):
        """For `re.fullmatch` or `re.match`."""
        self.pattern, self.clock, self.kind = pattern, clock, kind
        self.found: dict[str, dict[str, Any] | None] = {}

    def prepare(self, names: Iterable[str]) -> None:
        """Matches many names at once, which a process of its own takes much less time for."""
        new = [name for name in dict.fromkeys(names) if name not in self.found]
        if (linear := _compiled(self.pattern)) is None or not "".join(new).isascii():
            self.found |= zip(new, self._apart(new) if new else (), strict=True)
            return
        match = getattr(linear, self.kind)
        for name in new:
            self.clock.left()
            found = match(name)
            self.found[name] = None if found is None else found.groupdict()

    def __call__(self, name: str) -> dict[str, Any] | None:
        """The named groups of a match, or None."""
        if name not in self.found:
            self.prepare([name])
        return self.found[name]

    def _apart(self, names: list[str]) -> list[dict[str, Any] | None]:
        command = [sys.executable, "-I", "-S", "-c", _CHILD]
        text = json.dumps([self.kind, self.pattern, names])
        try:
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=self.clock.left()
            )
        except subprocess.TimeoutExpired:
            self.clock.left()
            raise
        if done.returncode:
            raise ValueError(
                f"{self.clock.what}: the pattern {brief(self.pattern)} of adapter_config.json "
                "cannot be matched in 512 MB. List the modules by their names."
            )
        return json.loads(done.stdout)


@functools.lru_cache(1000)
def _compiled(pattern: str) -> Any:
    """RE2's form of a pattern; None where it has none that means the same."""
    if not pattern.isascii() or _OTHERWISE.search(pattern):
        return None
    try:
        return re2.compile(pattern, _OPTIONS)
    except re2.error:
        return None
