"""What an initializer says of itself beside what it draws."""

import dataclasses
from typing import Any, ClassVar


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
