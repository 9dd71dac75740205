"""What rules are made of: patterns of paths, slots, and checks of their fields."""

import dataclasses
import difflib
import functools
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeGuard, TypeVar, runtime_checkable

import jax
import numpy as np

from ._errors import InputError, list_few

T = TypeVar("T")


@runtime_checkable
class HasPattern(Protocol):
    """A rule or a scheme: it has a pattern."""

    @property
    def pattern(self) -> str | None:
        """The pattern, or None."""
        ...


@dataclasses.dataclass(frozen=True)
class Slots:
    """Parts (*slots*) of a fused output axis to adapt, such as q and v of a fused qkv kernel.

    The output axis is split into `count` equal parts. Each chosen part has its own A and B; the
    other parts do not change. In a `shard_map` around `apply` or `merge` the fused axis must be
    whole, and its type must say so: gather it with `to="invarying"`.

    Attributes:
        count: number of equal parts, at least 1.
        chosen: indices of the adapted parts, distinct, in [0, count).
        axis: which of the site's output axes is fused; by default the first.

    Raises:
        TypeError: if `chosen` or `axis` has the wrong type.
        ValueError: if a field is out of range, or `count` is not an integer.

    Examples:
        GPT-2's `c_attn` computes q, k and v in one product. The paper adapts q and v.

        >>> import jlora
        >>> jlora.LoRA(r"c_attn/kernel", rank=4, alpha=32, slots=jlora.Slots(3, (0, 2))).rank
        4
    """

    count: int
    chosen: tuple[int, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        count, chosen = self.count, self.chosen
        check_field(self, "count", is_int(count) and count >= 1, "be an integer of at least 1")
        are_integers = isinstance(chosen, Sequence) and all(map(is_int, chosen))
        check_field(self, "chosen", are_integers, "be a tuple of integers", TypeError)
        object.__setattr__(self, "chosen", tuple(map(int, chosen)))
        are_slots = 0 < len(set(chosen)) == len(chosen) and all(0 <= c < count for c in chosen)
        check_field(self, "chosen", are_slots, f"be distinct, at least one, in [0, {count})")
        check_field(self, "axis", is_int(self.axis), "be an integer", TypeError)
        for name in ("count", "axis"):  # plain numbers, because rules are saved
            object.__setattr__(self, name, int(getattr(self, name)))


FLAGS = re.compile(r"\A(?:\(\?[aimsux]+\))+")  # Python accepts them only at a pattern's start
LOOK = re.compile(r"\A((?:\(\?[aimsux]+\))*)(\(\?<?)!")  # a negative look-around at the start


@functools.lru_cache(4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    r"""Compiles `pattern` so that it matches whole components of a path only.

    >>> head = compile_pattern("head")
    >>> [bool(head.search(path)) for path in ("head", "lm/head/kernel", "multi_head", "heads/0")]
    [True, True, False, False]
    """
    flags = re.compile(pattern).flags
    return re.compile(rf"(?:\A|/){_group(pattern)}(?:/|\Z)", flags)


def _group(pattern: str) -> str:
    """Makes `pattern` a group for use in another pattern, without the flags at its start."""
    end = "\n" if re.compile(pattern).flags & re.X else ""  # a comment takes the rest of its line
    return f"(?:{FLAGS.sub('', pattern)}{end})"


def pattern_anywhere(pattern: str) -> str:
    """Returns a pattern that also matches where `pattern` is found within a component.

    >>> pattern_anywhere("head"), pattern_anywhere("(?i)head|norm")
    ('.*head.*', '(?i).*(?:head|norm).*')
    """
    if not pattern or pattern.isidentifier():
        return f".*{pattern}.*" if pattern else ".*"
    flags = pattern.removesuffix(FLAGS.sub("", pattern))
    return f"{flags}.*{_group(pattern)}.*"


def matches(rule: HasPattern, path: str) -> bool:
    """Whether the pattern of `rule` matches components of `path`; never for a rule without one.

    Raises `ValueError` if the pattern starts with a negative look-around that refuses a component
    of `path`, and matches from another component all the same.
    """
    pattern = rule.pattern
    if pattern is None or compile_pattern(pattern).search(path) is None:
        return False
    if _refuses_in_vain(pattern, path):
        raise InputError(
            "pattern",
            f"{pattern!r} of {type(rule).__name__} matches {path!r}, although it refuses a part of "
            "this path: a pattern may begin at any component, also before or behind that part.",
            remedy="Leave leaves out by a rule of their own that comes first, such as "
            "jlora.Frozen('head'), or begin the pattern with `^` and the whole path.",
        )
    return True


def _refuses_in_vain(pattern: str, path: str) -> bool:
    """Whether a look-around at the start of `pattern`, which matches `path`, refuses a part of it.

    >>> [_refuses_in_vain("(?!head).*/w|b", x) for x in ("layer/w", "params/head/w", "head/b")]
    [False, True, False]
    """
    if not LOOK.match(pattern):
        return False
    refused, others = LOOK.sub(r"\1\2=", pattern), LOOK.sub(r"\1(?!)\2!", pattern)
    return [bool(compile_pattern(x).search(path)) for x in (refused, others)] == [True, False]


def is_for(rule: HasPattern, path: str, kind: str | None) -> bool:
    """Whether `rule` is for a leaf; without a pattern, it is for dense and convolutional sites."""
    return kind in ("dense", "conv") if rule.pattern is None else matches(rule, path)


def precedence(rules: Sequence[HasPattern]) -> list[int]:
    """Returns the indices of rules in the order in which they match: those with a pattern first."""
    return sorted(range(len(rules)), key=lambda i: rules[i].pattern is None)


def rule_name(rule: HasPattern) -> str:
    """Returns the name of a rule for errors and tables: its type and pattern."""
    return type(rule).__name__ + ("()" if rule.pattern is None else f"({rule.pattern!r})")


def near_misses(pattern: str, paths: Sequence[str]) -> str:
    """Lists the paths that look most like `pattern`."""
    words = re.findall(r"\w+", pattern.lower())

    def likeness(path: str) -> float:
        """Scores how well the parts of the path match the words of the pattern."""
        parts = path.lower().split("/")
        best = [max(difflib.SequenceMatcher(None, w, p).ratio() for p in parts) for w in words]
        return sum(best) / max(len(best), 1)

    near = sorted(paths, key=likeness, reverse=True)[:3]
    if not near:
        return "There is no leaf to match."
    return f"Near misses: {', '.join(path or 'the root' for path in near)}."


def explain_no_match(pattern: str, paths: Sequence[str]) -> str:
    """Says what to write instead of a pattern that matches whole components of no path.

    >>> explain_no_match("head", ["multi_head/w", "norm/w"])
    "A pattern must match whole components of a path, but this one matches only parts of multi_head\
. Did you mean 'multi_head'?"
    """
    found = [path for path in paths if compile_pattern(pattern).search(path)]
    if better := _anchor(pattern, paths):
        return f"`^` is the start of a path. Did you mean {better!r}?"
    hits = [] if found else [(path, m) for path in paths if (m := re.search(pattern, path))]
    names = list(dict.fromkeys(_components(path, m) for path, m in hits))
    if not names:
        return near_misses(pattern, paths)
    few = len(names) <= 3 and all(m[0] for _, m in hits)
    better = "|".join(map(re.escape, names)) if few else pattern_anywhere(pattern)
    return (
        "A pattern must match whole components of a path, but this one matches only parts of "
        f"{list_few(names, 3)}. Did you mean {better!r}?"
    )


def _anchor(pattern: str, paths: Sequence[str]) -> str | None:
    """Returns a pattern with `^` that matches behind the first component of a path, if one does."""
    firsts = dict.fromkeys(path.partition("/")[0] for path in paths)
    flags = pattern.removesuffix(FLAGS.sub("", pattern))
    rest = pattern.removeprefix(flags).removeprefix("^")
    found = [f"{flags}^{re.escape(first)}/{rest}" for first in firsts]
    matched = (x for x in found if any(map(compile_pattern(x).search, paths)))
    return next(matched, None) if rest != pattern.removeprefix(flags) else None


def _components(path: str, found: re.Match[str]) -> str:
    """Returns the components of `path` that a match touches."""
    start = path.rfind("/", 0, found.start()) + 1
    end = path.find("/", found.end())
    return path[start : len(path) if end < 0 else end]


def check_pattern(rule: object, pattern: object) -> None:
    """Raises unless `pattern` is a regular expression for components of a path."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"`pattern` of {type(rule).__name__} must be a regular expression as a string; "
            f"got {pattern!r} of type {type(pattern).__name__}."
        )
    if (components := pattern.strip("/")) != pattern:
        raise InputError(
            "pattern",
            f"{pattern!r} of {type(rule).__name__} must not start or end with `/`, "
            f"because a pattern matches whole components of a path. Write {components or '.*'!r}.",
        )
    try:
        compile_pattern(pattern)
    except re.error as e:
        raise InputError("pattern", f"{pattern!r} is not a regular expression: {e}.") from None


def check_field(
    rule: object, name: str, holds: bool, must: str, error: type[Exception] = InputError
) -> None:
    """Raises `error` unless `holds`; it says what the field `name` of a rule `must` be or do."""
    if not holds:
        owner = rule_name(rule) if isinstance(rule, HasPattern) else type(rule).__name__
        sentence = f"of {owner} must {must}; got {getattr(rule, name)!r}."
        raise InputError(name, sentence) if error is InputError else error(f"`{name}` {sentence}")


def is_int(x: object) -> TypeGuard[int]:
    """Whether `x` is an integer but not a boolean."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def check_int(argument: str, n: object, least: int, owner: str = "") -> None:
    """Raises unless `n`, an argument (of `owner`), is an integer of at least `least`."""
    if not is_int(n) or n < least:
        what = f"of {owner} must" if owner else "must"
        raise InputError(argument, f"{what} be an integer of at least {least}; got {n!r}.")


def is_finite(x: object) -> TypeGuard[float]:
    """Whether `x` is a real number, but not a boolean, that a float can hold."""
    try:
        return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)
    except OverflowError:
        return False


def number_of(x: T) -> T:
    """Returns the number that an array without axes holds; other objects as they are."""
    if isinstance(x, jax.Array | np.ndarray | np.generic) and x.ndim == 0:
        return x.item()
    return x


def name_mistake(x: object, unpack: bool = False) -> str:
    """Describes what was given instead of a rule; `unpack`, whether a list may be unpacked."""
    if isinstance(x, type) and dataclasses.is_dataclass(x):
        return f"the class {x.__name__}; call it, {x.__name__}(...)"
    if unpack and isinstance(x, Sequence) and not isinstance(x, str):
        return f"a {type(x).__name__}; unpack it with `*`"
    return type(x).__name__ if isinstance(x, Mapping) or hasattr(x, "dtype") else repr(x)
