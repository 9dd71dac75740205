"""The class of initializers with options."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Initializer:
    """An initializer with options: a dataclass whose fields they are, named as a function is."""

    def __call__(self, key: Any, w: Any, site: Any, rule: Any) -> tuple[Any, Any, Any]:
        """`(w, a, b)`."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Its name in `jlora.initializers`."""
        return type(self).__name__

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({', '.join(given)})"
