"""Helpers and base classes of initializers."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from .._arrays import promote
from .._compat import evaluate_now
from .._quantized import BaseLeaf
from .._rules import HasPattern, rule_name
from .._site import Site

Start = tuple[BaseLeaf, jax.Array, jax.Array]  # the W of the base, A and B


class RankRule(HasPattern, Protocol):
    """What an initializer reads of a rule with A and B, such as a `LoRA`."""

    @property
    def rank(self) -> int:
        """The rank r."""
        ...

    @property
    def scale(self) -> float:
        """The factor s of ΔW = s·A·B."""
        ...

    @property
    def dtype(self) -> DTypeLike | None:
        """The dtype of A and B, or None."""
        ...

    def factor_shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of A and of B at a site."""
        ...


def dtype_of(site: Site, rule: RankRule) -> jnp.dtype:
    """Returns the dtype of A and B: that of the rule, or that of W but at least float32."""
    return jnp.dtype(promote(site.dtype, jnp.float32) if rule.dtype is None else rule.dtype)


def draw(w: BaseLeaf, site: Site, rule: RankRule, sample: Callable[..., jax.Array]) -> Start:
    """Returns `(w, a, b)`; `sample` draws A from a shape and a dtype."""
    dtype = dtype_of(site, rule)
    a_shape, b_shape = rule.factor_shapes(site)
    return w, sample(a_shape, dtype), jnp.zeros(b_shape, dtype)


def takes_shape(init: object) -> bool | None:
    """Whether an initializer takes `(key, shape, dtype)`, as those of JAX do, or what jlora's take.

    None if it takes neither, such as a class or function that is to be called with options first.

    >>> takes_shape(jax.nn.initializers.normal(0.02)), takes_shape(jax.nn.initializers.normal)
    (True, None)
    """
    if isinstance(init, type) or not callable(init):
        return None
    try:
        found = inspect.signature(init)
        if [*found.parameters][1:2] == ["shape"]:
            return True
        found.bind(*"kwsr")
    except (ValueError, TypeError):  # no signature, as of some builtins, or another one
        return None
    needs_some = any(p.default is p.empty for p in found.parameters.values())
    return False if needs_some else None


def draw_by(
    init: Callable[..., jax.Array], key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule
) -> Start:
    """Returns `(w, a, b)`; JAX's initializer `init` draws each matrix (inputs, r) of A."""

    def sample(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        inputs = math.prod(site.shape[d] for d in site.layout.inputs if d != site.experts)
        matrices = math.prod(shape) // (inputs * shape[-1])
        keys = jax.random.split(key, matrices)
        return jax.vmap(lambda k: init(k, (inputs, shape[-1]), dtype))(keys).reshape(shape)

    w, a, b = draw(w, site, rule, sample)
    if evaluate_now(jnp.any, a) == False:  # noqa: E712 - None if it is traced
        raise ValueError(
            f"`init` of {rule_name(rule)} makes A zero at {site.path!r}, where B is zero too: "
            "neither would get a gradient. Give an initializer that draws A."
        )
    return w, a, b


def fan_in(site: Site) -> int:
    """Counts the inputs that a product sums: 1 for a lookup; for experts, those of one expert."""
    inputs = (site.shape[d] for d in site.layout.inputs if d != site.experts)
    return 1 if site.kind == "embed" else math.prod(inputs)


@dataclasses.dataclass(frozen=True)
class Initializer:
    """The base class of initializers with options, which are its fields; named like functions.

    Examples:
        >>> import dataclasses, jlora
        >>> @dataclasses.dataclass(frozen=True, repr=False)
        ... class wider(jlora.initializers.Initializer):
        ...     by: float = 2.0
        ...     def __call__(self, key, w, site, rule):
        ...         w, a, b = jlora.initializers.gaussian(key, w, site, rule)
        ...         return w, self.by * a, b
        >>> jlora.LoRA("w", init=wider(by=3.0)).init
        wider(by=3.0)
    """

    def __call__(self, key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
        """Returns `(w, a, b)`."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Its name in `jlora.initializers`."""
        return type(self).__name__

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({', '.join(given)})"


@dataclasses.dataclass(frozen=True, repr=False)
class SketchInitializer(Initializer):
    """The base class of initializers from a sketch of the same rules. Checkpoints omit the sketch.

    Attributes:
        sketch: from `jlora.sketch`.
        kind: the kind of the sketch.
    """

    sketch: Any

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        sketch, name = self.sketch, self.name
        if not hasattr(sketch, "sites") or not hasattr(sketch, "kind"):
            raise TypeError(
                f"`sketch` of {name} must be one from jlora.sketch; got a {type(sketch).__name__}."
            )
        if sketch.kind != self.kind:
            raise ValueError(
                f"`sketch` of {name} must be of kind {self.kind!r}; got one of kind "
                f"{sketch.kind!r}."
            )

    def spectrum_at(self, site: Site, rule: RankRule, components: int) -> Any:
        """Returns the spectrum of a site, which has at least `components`, or all that exist."""
        sites, path = self.sketch.sites, site.path
        found = sites.get(path)
        if found is None or (found.shape, found.layout) != (site.shape, site.layout):
            got = "no such site" if found is None else f"{found.shape} and {found.layout}"
            raise ValueError(
                f"`sketch` must have {path!r} with the shape {site.shape} and {site.layout}; got "
                f"{got}. Sketch with the same rules and parameters as `init`."
            )
        slots = site.layout.slots
        components = min(components, site.inputs, site.outputs // (slots[0] if slots else 1))
        if found.values.shape[-1] < components:
            raise ValueError(
                f"`sketch` has {found.values.shape[-1]} components of {path!r}; rank {rule.rank} "
                f"needs {components}. Sketch with `components={components}`, or lower the rank."
            )
        if not np.asarray(found.total).any():
            equal = ", or its inputs were all equal" if self.kind == "inputs" else ""
            raise ValueError(
                f"`sketch` is zero at {path!r}, because the loss did not depend on it{equal}. "
                "Sketch with a loss and batches that use it, or give it a rule with another `init`."
            )
        return found
