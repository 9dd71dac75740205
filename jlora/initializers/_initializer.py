"""What an initializer says of itself beside what it draws."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def freezing(*names: str) -> Callable[[F], F]:
    """Marks an initializer of whose arrays some are not trained, for `LoRA.init`.

    Args:
        *names: `"a"` or `"b"`.

    Returns:
        A decorator of a function.

    Raises:
        ValueError: if a name is another.

    Examples:
        >>> import jlora
        >>> @jlora.initializers.freezing("b")
        ... def swapped(key, w, site, rule):
        ...     w, a, b = jlora.initializers.gaussian(key, w, site, rule)
        ...     return w, 0 * a, b + 1
        >>> jlora.LoRA("w", init=swapped).frozen
        ('b',)
    """
    if wrong := [name for name in names if name not in ("a", "b")]:
        raise ValueError(f"`names` of freezing must be 'a' or 'b'; got {wrong[0]!r}.")

    def mark(init: F) -> F:
        init.__dict__["frozen"] = names
        return init

    return mark


@dataclasses.dataclass(frozen=True)
class Initializer:
    """An initializer with options: the fields, which a function of jlora's takes.

    Attributes:
        name: that of the function.
    """

    name: ClassVar[str]

    def __call__(self, key: Any, w: Any, site: Any, rule: Any) -> tuple[Any, Any, Any]:
        """`(w, a, b)`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({', '.join(given)})"
