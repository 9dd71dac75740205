"""What `transform` returns."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from ._rules import rule_name
from ._site import Rule
from ._sites import Sites
from ._types import PyTree


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Transformed:
    """What `jlora.transform` returns: three pure functions, which it unpacks to.

    Attributes:
        init: `(key, params, *args, **kwargs) -> (base, adapter)`.
        apply: `(base, adapter, *args, **kwargs) -> outputs of the apply function`.
        sites: `(params, *args, **kwargs) -> Sites`.
        apply_fn: the function that was adapted.
        rules: its rules.
    """

    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., Any]
    sites: Callable[..., Sites]
    apply_fn: Callable[..., Any]
    rules: tuple[Rule, ...]

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self.init, self.apply, self.sites))

    def __repr__(self) -> str:
        listed = "".join(f", {rule_name(rule)}" for rule in self.rules)
        return f"Transformed({function_name(self.apply_fn)}{listed})"


def function_name(fn: Callable[..., Any]) -> str:
    """Returns the name of a function for messages; a method has the name of its type before it."""
    if isinstance(fn, functools.partial):
        return f"partial({function_name(fn.func)})"
    if inspect.ismethod(fn):
        return f"{type(fn.__self__).__name__}.{fn.__name__}"
    return getattr(fn, "__name__", type(fn).__name__)
