"""A sketch: the spectrum of each site."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from .._report import align_columns
from .._types import Layout, short


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The leading singular vectors at a site, of each matrix of a stack and of each slot.

    Attributes:
        values: k singular values, descending: (stack…, k), or (stack…, slots, k).
        total: the sum of the squares of all of them: (stack…), or (stack…, slots). The part beyond
            the k values is estimated, without bias, from eight random directions.
        inputs: the singular vectors along the inputs, as A has them: (stack…, inputs…, k), or
            (stack…, slots, inputs…, k).
        outputs: the singular vectors of a gradient along the outputs, as B has them; else None.
        shape: the shape of W.
        layout: the layout of W, with the slots of the rule.
    """

    values: jax.Array
    total: jax.Array
    inputs: jax.Array
    outputs: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        names = ("values", "total", "inputs", "outputs")
        return f"Spectrum({', '.join(f'{name}={short(getattr(self, name))}' for name in names)})"

    @property
    def ratios(self) -> jax.Array:
        """The squares of `values` over the total; for inputs, the explained variance."""
        total = self.total[..., None]
        is_normal = total >= jnp.finfo(total.dtype).tiny  # XLA takes smaller ones for 0
        return jnp.where(is_normal, self.values**2 / jnp.where(is_normal, total, 1), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """What `jlora.sketch` returns: a pytree of arrays, whose `str()` is a table.

    Attributes:
        sites: a `Spectrum` for each site, by path.
        kind: `"inputs"` or `"gradient"`.
    """

    sites: Mapping[str, Spectrum]
    kind: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"Sketch({len(self.sites)} sites, kind={self.kind!r})"

    def __str__(self) -> str:
        header = ("site", "matrices", "inputs", "outputs", "components", "largest", "share")
        lines = align_columns(header, [_row(*item) for item in self.sites.items()], header[1:])
        return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def _row(path: str, s: Spectrum) -> tuple[str, ...]:
    lengths = [math.prod(s.shape[d] for d in dims) for dims in (s.layout.inputs, s.layout.outputs)]
    counts = (s.total.size, *lengths, s.values.shape[-1])
    share = min(1.0, float(jnp.sum(s.values**2) / jnp.maximum(jnp.sum(s.total), 1e-30)))
    return (
        path or "(root)",
        *(f"{n:,}" for n in counts),
        f"{float(jnp.max(s.values)):.3g}",
        f"{share:.1%}",
    )
