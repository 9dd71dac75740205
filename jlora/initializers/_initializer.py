"""The class of initializers with options."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A dataclass whose fields are the options of an initializer; it is named like a function."""

    def __call__(self, key: Any, w: Any, site: Any, rule: Any) -> tuple[Any, Any, Any]:
        """Returns `(w, a, b)`."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Its name in `jlora.initializers`."""
        return type(self).__name__

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({', '.join(given)})"
