"""What initializers that start from a `jlora.types.Sketch` share."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from ._initializer import Initializer


@dataclasses.dataclass(frozen=True, repr=False)
class Sketched(Initializer):
    """One that starts from a sketch of the same rules, which checkpoints do not hold.

    Attributes:
        sketch: from `jlora.sketch`.
        kind: that of the sketch.
    """

    sketch: Any

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_kind(self.sketch, self.kind, self.name)


def check_kind(sketch: Any, kind: str, name: str) -> None:
    """Raises if `sketch` is no sketch, or of another kind."""
    if not hasattr(sketch, "sites") or not hasattr(sketch, "kind"):
        raise TypeError(
            f"`sketch` of {name} must be one from jlora.sketch; got a {type(sketch).__name__}."
        )
    if sketch.kind != kind:
        raise ValueError(
            f"`sketch` of {name} must be of kind {kind!r}; got one of kind {sketch.kind!r}."
        )


def spectrum(sketch: Any, site: Any, rule: Any, components: int) -> Any:
    """What `sketch` has of a site, with so many components, or all that there are."""
    found = sketch.sites.get(site.path)
    if found is None:
        listed = ", ".join(list(sketch.sites)[:3]) + (", …" if len(sketch.sites) > 3 else "")
        raise ValueError(
            f"`sketch` has no site {site.path!r}, but {listed}. Sketch with the rules and the "
            "parameters that `init` gets."
        )
    if (found.shape, found.layout) != (site.shape, site.layout):
        raise ValueError(
            f"`sketch` has {site.path!r} with the shape {found.shape} and {found.layout}; got "
            f"{site.shape} and {site.layout}. Sketch with the rules and the parameters that `init` "
            "gets."
        )
    slots = site.layout.slots
    components = min(components, site.inputs, site.outputs // (slots[0] if slots else 1))
    if found.values.shape[-1] < components:
        raise ValueError(
            f"`sketch` has {found.values.shape[-1]} components of {site.path!r}; rank {rule.rank} "
            f"needs {components}. Sketch with `components={components}`, or lower the rank."
        )
    if not np.asarray(found.total).any():
        raise ValueError(
            f"`sketch` has nothing of {site.path!r}, as the loss did not depend on it. Sketch with "
            "a loss and batches that use it, or give it a rule with another start."
        )
    return found
