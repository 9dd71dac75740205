"""What the user writes: which leaves are adapted, and how."""

import dataclasses
import difflib
import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Slots:
    """Chosen parts of a fused output axis, such as q and v of a fused qkv kernel.

    The output axis is cut into `count` equal parts. Each chosen part gets an A and a B of its own;
    the others stay as they are.

    Attributes:
        count: number of equal parts, at least 1.
        chosen: indices of the adapted parts, distinct, in [0, count).
        axis: which of the site's output axes is fused; the first unless told.

    Raises:
        TypeError: if a field is of a wrong type.
        ValueError: if a field is out of range.

    Example:
        GPT-2's `c_attn` produces q, k and v in one product; the paper adapts q and v.

        >>> import jlora
        >>> jlora.LoRA(r"c_attn/kernel", rank=4, alpha=32, slots=jlora.Slots(3, (0, 2))).rank
        4
    """

    count: int
    chosen: tuple[int, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        if not _is_int(self.count) or self.count < 1:
            raise ValueError(
                f"`count` of Slots must be an integer of at least 1; got {self.count!r}."
            )
        if not isinstance(self.chosen, Sequence) or not all(map(_is_int, self.chosen)):
            raise TypeError(f"`chosen` of Slots must be a tuple of integers; got {self.chosen!r}.")
        chosen = tuple(self.chosen)
        object.__setattr__(self, "chosen", chosen)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"`chosen` of Slots must name distinct slots, at least one; got {chosen}."
            )
        wrong = [c for c in chosen if not 0 <= c < self.count]
        if wrong:
            raise ValueError(
                f"`chosen` of Slots must lie in [0, {self.count}), the slots; got {wrong}."
            )
        if not _is_int(self.axis):
            raise TypeError(f"`axis` of Slots must be an integer; got {self.axis!r}.")


@dataclasses.dataclass(frozen=True)
class LoRA:
    r"""Adapts the weights whose path matches `pattern` by $W + s \cdot A B$.

    Attributes:
        pattern: a regular expression, searched for in the `/`-joined path of a leaf. None means
            *all-linear*: every dense and convolutional site, no embeddings.
        rank: r, at least 1 and at most the smaller of the site's inputs and outputs.
        alpha: the numerator of the scale, positive.
        slots: adapt only some parts of a fused output axis.
        dropout: probability of dropping an input of A, in [0, 1); active only under
            `jlora.dropout`.
        materialize: allow W + ΔW to be formed where the model uses W in a way that has no
            factored form. Values and gradients stay exact; memory and time do not stay small.
        rslora: scale by alpha / √r (Kalajdzievski, arXiv 2312.03732) rather than alpha / r.
        init: an initializer, `jlora.kaiming_uniform` unless told.
        dtype: dtype of A and B; by default the weight's own, but at least float32.

    Raises:
        TypeError: if a field is of a wrong type.
        ValueError: if `pattern` is not a regular expression or a number is out of range.

    Source: Hu et al., LoRA, arXiv 2106.09685.

    Example:
        >>> import jlora
        >>> jlora.LoRA(r"(query|value)/kernel", rank=8, alpha=16).scale
        2.0
    """

    pattern: str | None = None
    rank: int = 8
    alpha: float = 16.0
    slots: Slots | None = None
    dropout: float = 0.0
    materialize: bool = False
    rslora: bool = False
    init: Callable[..., Any] | None = None
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            _check_pattern(self, self.pattern)
        name = rule_name(self)
        if not _is_int(self.rank) or self.rank < 1:
            raise ValueError(
                f"`rank` of {name} must be an integer of at least 1; got {self.rank!r}."
            )
        if not is_finite(self.alpha) or self.alpha <= 0:
            raise ValueError(
                f"`alpha` of {name} must be a positive finite number; got {self.alpha!r}."
            )
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` of {name} must lie in [0, 1); got {self.dropout!r}.")
        if self.slots is not None and not isinstance(self.slots, Slots):
            raise TypeError(f"`slots` of {name} must be a jlora.Slots; got {self.slots!r}.")
        for flag in ("materialize", "rslora"):
            if not isinstance(value := getattr(self, flag), bool):
                raise TypeError(f"`{flag}` of {name} must be True or False; got {value!r}.")
        if self.init is not None and not callable(self.init):
            raise TypeError(
                f"`init` of {name} must be an initializer such as jlora.gaussian; "
                f"got {self.init!r}."
            )
        if self.dtype is not None and not _is_floating(self.dtype):
            raise TypeError(f"`dtype` of {name} must be a floating-point one; got {self.dtype!r}.")
        # Plain numbers, whatever a sweep gave: they are saved and compared.
        object.__setattr__(self, "rank", int(self.rank))
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scale(self) -> float:
        """The factor s of ΔW = s·A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class Full:
    """Trains the leaves whose path matches `pattern` in full: heads, norms, biases.

    It takes any floating-point leaf, also one that is no weight: a pattern such as `BatchNorm`
    matches running statistics in `batch_stats` too, so name the collection, `params/.*BatchNorm`.

    Attributes:
        pattern: a regular expression, searched for in the `/`-joined path of a leaf.

    Raises:
        TypeError: if `pattern` is not a string.
        ValueError: if `pattern` is not a regular expression.

    Example:
        >>> import jlora
        >>> jlora.Full(r"classifier")
        Full(pattern='classifier')
    """

    pattern: str

    def __post_init__(self) -> None:
        _check_pattern(self, self.pattern)


Rule = LoRA | Full


def matches(rule: Rule, path: str) -> bool:
    """Whether the pattern of `rule` is found in `path`; never for a rule without one."""
    return rule.pattern is not None and re.search(rule.pattern, path) is not None


def rule_name(rule: Any) -> str:
    """How errors and tables call a rule: its type and pattern."""
    pattern = rule.pattern
    return type(rule).__name__ + ("()" if pattern is None else f"({pattern!r})")


def near(pattern: str, paths: Sequence[str]) -> str:
    """The paths that look most like `pattern`."""
    words = re.findall(r"\w+", pattern.lower())

    def likeness(path: str) -> float:
        """How well each word of the pattern is met by some part of the path."""
        parts = path.lower().split("/")
        best = [max(difflib.SequenceMatcher(None, w, p).ratio() for p in parts) for w in words]
        return sum(best) / max(len(best), 1)

    near = sorted(paths, key=likeness, reverse=True)[:3]
    return f"Near misses: {', '.join(near)}." if near else "There is no leaf to match."


def _check_pattern(rule: Rule, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(
            f"`pattern` of {type(rule).__name__} must be a regular expression as a string; "
            f"got {pattern!r} of type {type(pattern).__name__}."
        )
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"`pattern` {pattern!r} is not a regular expression: {e}.") from None


def _is_int(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_finite(x: Any) -> bool:
    """Whether `x` is a real number, not a boolean, that a float can hold."""
    try:
        return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)
    except OverflowError:
        return False


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False
