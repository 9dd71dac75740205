"""Two methods of somebody else's: a gain alone (IA³), and a diagonal between A and B.

Neither needs a line of jlora changed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora
from jlora import _adapters as adapters
from jlora._core import Change, Delta

# ------------------------------------------------------------------------------- a gain alone


@dataclasses.dataclass(frozen=True)
class Gain:
    """Adapts W by g ⊙ W, with a g for each output (Liu et al., arXiv 2205.05638)."""

    pattern: str | None = None


class GainNode(NamedTuple):
    """g, of shape (stack…, outputs…)."""

    gain: Any
    layout: jlora.types.Layout


jax.tree_util.register_pytree_with_keys(
    GainNode,
    lambda x: (((jax.tree_util.GetAttrKey("gain"), x.gain),), (x.layout,)),
    lambda static, children: GainNode(*children, *static),
)


def _ones(key: Any, w: Any, site: Any, rule: Gain) -> tuple[Any, GainNode]:
    del key, rule
    shape = [site.shape[d] for d in (*site.layout.stack, *site.layout.outputs)]
    return w, GainNode(
        jnp.ones(shape, jnp.float32 if w.dtype.itemsize < 4 else w.dtype), site.layout
    )


adapters.register(
    adapters.Method(
        rule=Gain,
        node=GainNode,
        labels={"gain": "gain"},
        axes=lambda layout: {"gain": (*layout.stack, *layout.outputs)},
        sizes=lambda rule, layout: {},
        fit=lambda rule, site: (rule, site.layout),
        start=_ones,
        lower=lambda node, w: Change(gain=adapters.factor(node, "gain")),
    )
)

# ------------------------------------------------------------------------ a diagonal between


@dataclasses.dataclass(frozen=True)
class Diagonal:
    """Adapts W by W + A·diag(d)·B, with A and B drawn and d zero at first."""

    pattern: str | None = None
    rank: int = 2


class DiagonalNode(NamedTuple):
    """A (stack…, inputs…, r), d (stack…, r) and B (stack…, r, outputs…); A and B stay."""

    a: Any
    d: Any
    b: Any
    layout: jlora.types.Layout


jax.tree_util.register_pytree_with_keys(
    DiagonalNode,
    lambda x: (
        tuple((jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in ("a", "d", "b")),
        (x.layout,),
    ),
    lambda static, children: DiagonalNode(*children, *static),
)


def _axes(layout: jlora.types.Layout) -> dict[str, Any]:
    stack = layout.stack
    return {
        "a": (*stack, *layout.inputs, "rank"),
        "d": (*stack, "rank"),
        "b": (*stack, "rank", *layout.outputs),
    }


def _drawn(key: Any, w: Any, site: Any, rule: Diagonal) -> tuple[Any, DiagonalNode]:
    def array(i: int, dims: Any) -> Any:
        shape = [rule.rank if d == "rank" else site.shape[d] for d in dims]
        draw = jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
        return jnp.zeros_like(draw) if i == 1 else draw

    dtype = jnp.float32 if w.dtype.itemsize < 4 else w.dtype
    axes = _axes(site.layout).values()
    return w, DiagonalNode(*(array(i, dims) for i, dims in enumerate(axes)), site.layout)


def _lower(node: DiagonalNode, w: Any) -> Change:
    del w
    stack = len(node.layout.stack)
    d = node.d.reshape(*node.d.shape, *[1] * (node.b.ndim - stack - 1))
    factors = (adapters.factor(node._replace(b=d * node.b), name) for name in ("a", "b"))
    return Change((Delta(*factors, scale=1.0),))


adapters.register(
    adapters.Method(
        rule=Diagonal,
        node=DiagonalNode,
        labels={"a": "base", "d": "d", "b": "base"},
        axes=_axes,
        sizes=lambda rule, layout: {"rank": rule.rank},
        fit=lambda rule, site: (rule, site.layout),
        start=_drawn,
        lower=_lower,
    )
)
