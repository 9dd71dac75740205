"""Registries of an open set: what has a name keeps it, unless somebody means to replace it."""

from collections.abc import Callable


def check_free(
    what: str, old: Callable[..., object] | None, new: Callable[..., object], override: bool
) -> None:
    """Raises if a class or function `new` would replace another one, `old`, as `what`.

    What is defined once more, as a notebook's cell does, may replace itself.

    >>> def first(): ...
    >>> check_free("the rule 'x'", None, first, override=False)
    >>> check_free("the rule 'x'", len, first, override=True)
    """
    each = [f"{x.__module__}.{x.__qualname__}" for x in (old, new) if x is not None]
    if len(set(each)) > 1 and not override:
        raise TypeError(
            f"{each[1]} cannot be registered as {what}, which is {each[0]}. Rename it, or give "
            "override=True to replace that everywhere."
        )
