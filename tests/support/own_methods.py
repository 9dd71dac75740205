"""Two methods of somebody else's: a gain alone (IA³), and a diagonal between A and B.

Neither needs a line of jlora changed.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import jlora
from jlora.extend import Change, Delta, Node, Rule, register


def at_least_float32(w: Any) -> Any:
    """The dtype of what is trained for the weight `w`."""
    return jnp.float32 if w.dtype.itemsize < 4 else w.dtype


@register
class GainNode(Node):
    """g, of shape (stack…, outputs…)."""

    gain: jax.Array
    layout: jlora.types.Layout
    labels: ClassVar = {"gain": "gain"}

    @staticmethod
    def axes(layout: jlora.types.Layout) -> Any:
        """Those of the outputs."""
        return {"gain": (*layout.stack, *layout.outputs)}

    def lower(self, w: Any) -> Change:
        """W' = g ⊙ W."""
        return Change(gain=self.factor("gain"))


@register
@dataclasses.dataclass(frozen=True)
class Gain(Rule):
    """Adapts W by g ⊙ W, with a g for each output (Liu et al., arXiv 2205.05638)."""

    pattern: str | None = None
    node: ClassVar = GainNode

    def start(self, key: Any, w: Any, site: jlora.types.Site) -> Any:
        """Ones."""
        shape = self.shapes(site.layout, site.shape)["gain"]
        return w, GainNode(jnp.ones(shape, at_least_float32(w)), site.layout)


@register
class DiagonalNode(Node):
    """A (stack…, inputs…, r), d (stack…, r) and B (stack…, r, outputs…); A and B stay."""

    a: jax.Array
    d: jax.Array
    b: jax.Array
    layout: jlora.types.Layout
    labels: ClassVar = {"a": "base", "d": "d", "b": "base"}

    @staticmethod
    def axes(layout: jlora.types.Layout) -> Any:
        """Those of A and B as in LoRA, with the rank alone for d."""
        stack = layout.stack
        return {
            "a": (*stack, *layout.inputs, "rank"),
            "d": (*stack, "rank"),
            "b": (*stack, "rank", *layout.outputs),
        }

    def lower(self, w: Any) -> Change:
        """W' = W + A·diag(d)·B."""
        ones = [1] * (self.b.ndim - self.d.ndim)
        scaled = self._replace(b=self.d.reshape(*self.d.shape, *ones) * self.b)
        return Change((Delta(scaled.factor("a"), scaled.factor("b"), scale=1.0),))


@register
@dataclasses.dataclass(frozen=True)
class Diagonal(Rule):
    """Adapts W by W + A·diag(d)·B, with A and B drawn and d zero at first."""

    pattern: str | None = None
    rank: int = 2
    node: ClassVar = DiagonalNode

    def sizes(self, layout: jlora.types.Layout) -> dict[str, int]:
        """The rank."""
        return {"rank": self.rank}

    def start(self, key: Any, w: Any, site: jlora.types.Site) -> Any:
        """A and B of normal numbers."""
        shapes = self.shapes(site.layout, site.shape)
        keys = zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
        drawn = {n: jax.random.normal(k, shape, at_least_float32(w)) for k, (n, shape) in keys}
        return w, DiagonalNode(drawn["a"], 0 * drawn["d"], drawn["b"], site.layout)
