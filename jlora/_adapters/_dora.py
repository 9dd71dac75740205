r"""DoRA: a magnitude for each output, and a direction that LoRA adapts.

The norms of the columns of $W + s A B$ are computed from A and B, without that sum:

$$P = A^T W,\quad G = A^T A,\quad
n_o^2 = \sum_i W_{io}^2 + 2 s \sum_r B_{ro} P_{ro} + s^2 \sum_r B_{ro} (G B)_{ro}$$
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays import einsum, is_on_host, promote, to_device
from .._core import Axis, Change, Delta, Factor, leaf_weight
from .._errors import InputError
from .._node import Axes, Node
from .._quantized import BaseLeaf, Quantized
from .._rules import check_field, rule_name
from .._site import Site, check_whole
from .._types import Layout
from ._lora import LoRA, refuse_keywords_of_peft
from ._low_rank import LowRank, stack_and_slots, without_slots
from ._register import register

LEAST = 2.0**-60  # of a gain, which is divided out of a product again


@register
class Decomposed(Node):
    r"""One weight adapted by DoRA: $W' = m \odot (W + s A B) / \lVert W + s A B \rVert$.

    A pytree node with the children `a`, `b` and `m`; the rest is static.

    Attributes:
        a: A, as in `LowRank`.
        b: B, as in `LowRank`.
        m: m, shape (stack…, outputs…), or (stack…, slots, outputs…) with slots. Its label for the
            optimizer is `"m"`.
        scale: s.
        layout: which axes of W are which.
        materialize: whether jlora may form W' where it has no factored form.
        residual: as in `LowRank`.

    Examples:
        Weight decay of m would shrink the layer. Decay everything else:

        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> dora = jlora.transform(lambda p, x: x @ p["w"], jlora.DoRA("w", rank=2))
        >>> _, adapter = dora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> print(adapter)
        {'w': Decomposed(a=float32[4,2], b=float32[2,3], m=float32[3], scale=16.0)}
        >>> decayed = lambda tree: jax.tree.map(lambda x: x != "m", jlora.labels(tree))
        >>> tx = jlora.optimizer(optax.adamw(2e-4, weight_decay=0.1, mask=decayed))
    """

    a: jax.Array
    b: jax.Array
    m: jax.Array
    scale: float
    layout: Layout
    materialize: bool = False
    residual: bool = False

    labels: ClassVar = {"a": "a", "b": "b", "m": "m"}
    is_invertible: ClassVar = False

    @staticmethod
    def axes(layout: Layout) -> Axes:
        """Returns what each axis of A, B and m follows."""
        axes = LowRank.axes(layout)
        return {"a": axes["a"], "b": axes["b"], "m": (*stack_and_slots(layout), *layout.outputs)}

    def needs(self) -> dict[str, tuple[int, ...]]:
        """Returns the inputs too: norms are taken over all of them."""
        return super().needs() | {"DoRA takes norms over all inputs of W": self.layout.inputs}

    def lower(self, w: jax.Array | Quantized) -> Change:
        """Returns the ΔW s·A·B, and the gain m / ‖W + s·A·B‖."""
        outputs = tuple(map(Axis, (*self.layout.stack, *self.layout.outputs)))
        whole = without_slots(self, w.shape)
        delta = Delta(whole.factor("a"), whole.factor("b"), self.scale)
        return Change((delta,), Factor(_compute_gain(self, w), outputs), divides=True)


@register
@refuse_keywords_of_peft
@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    r"""Adapts W by $m \odot (W + s A B) / \lVert W + s A B \rVert$, a magnitude and a direction.

    The norm of an output is the norm of its column, over all inputs. No gradient passes through it
    (section 4.3 of the paper). Each call computes it once for each weight, in float32 or better,
    from $A^T W$ and $A^T A$, without forming W + s·A·B. m starts as the norm, so the adapted model
    starts as the base, up to rounding.

    The outputs of an embedding are the columns of its table: their norms are over the whole
    vocabulary, and the gain $m / \lVert W + s A B \rVert$ scales the inputs of a tied head. A
    column of zeros stays zero. A gain below 2⁻⁶⁰ counts as 2⁻⁶⁰, less than rounding can tell.

    Do not shard the inputs in a `shard_map` around `apply` or `merge`: jlora raises if W and A both
    vary over one mesh axis. Gather W with `to="invarying"`, or put the `shard_map` into the
    function that `transform` adapts.

    It has the fields of `LoRA`, but `dropout` must be 0: with dropout, PEFT's DoRA multiplies the
    dropped input with W in a second product, and jlora does not.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None is
            *all-linear*: every dense and convolutional site, but no embedding, that no rule with a
            pattern takes.
        rank: r, from 1 to min(inputs, outputs) of the site. Without a pattern, a site that is too
            small gets the largest rank, at least 1, that trains no more parameters than the weight
            has, with the same scale. `sites` shows both ranks.
        alpha: the numerator of the scale s = alpha / r, positive.
        slots: a `Slots`, to adapt only some parts of a fused output axis; the others keep their
            norms.
        dropout: 0.
        materialize: whether jlora may form W' where it has no factored form.
        rslora: whether to scale by alpha / √r rather than alpha / r.
        init: an initializer, by default `jlora.initializers.kaiming_uniform`.
        dtype: dtype of A and B; by default the dtype of the weight, but at least float32. m is
            float32 or wider.
        frozen: ().
        share: `"inputs"` if the experts of a weight share A, or None.

    Raises:
        TypeError: as in `LoRA`.
        ValueError: as in `LoRA`; if `dropout` is not 0, experts share B, or a factor is frozen, as
            by `init=miss`; in `init`, if W is a `jax.ShapeDtypeStruct`.
        NotImplementedError: in `init`, within a `shard_map` that may shard W.

    Source: Liu et al., DoRA, arXiv 2402.09353, equation 5 and section 4.3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> dora = jlora.transform(lambda p, x: x @ p["w"], jlora.DoRA("w", rank=2))
        >>> base, adapter = dora.init(jax.random.key(0), {"w": jnp.eye(4, 3)}, jnp.ones((1, 4)))
        >>> adapter["w"].m.tolist()
        [1.0, 1.0, 1.0]
    """

    node: ClassVar[type[Node]] = Decomposed

    def __post_init__(self) -> None:
        super().__post_init__()
        zero = (
            "be 0, as PEFT's DoRA with dropout multiplies W twice and jlora's does not (jlora.LoRA "
            "accepts dropout)"
        )
        check_field(self, "dropout", not self.dropout, zero)
        own = "be None or 'inputs', as each expert has its own norms (jlora.LoRA accepts 'outputs')"
        check_field(self, "share", self.share != "outputs", own)
        if self.all_frozen:
            raise InputError(
                "frozen",
                f"of {rule_name(self)} must be (), as DoRA trains A and B; got "
                f"{self.all_frozen}, from the rule or its `init`. Use jlora.LoRA.",
            )

    def start(self, key: jax.Array, w: BaseLeaf, site: Site) -> tuple[BaseLeaf, Decomposed]:
        """Returns W and its node: `init` draws A and B, and m is the norms."""
        base, a, b = self.draw(key, w, site)
        whole = check_whole(f"{rule_name(self)} takes norms of", base, site.path)
        m = norms(whole, LowRank(a, b, self.scale, site.layout))
        m = m.astype(promote(m.dtype, a.dtype))
        return base, Decomposed(
            a, b, m, self.scale, site.layout, self.materialize, residual=base is not w
        )


# ------------------------------------------------------------------------------------- the norms


@jax.jit
def norms(w: jax.Array | Quantized, direction: LowRank) -> jax.Array:
    r"""Computes $\lVert W + s A B \rVert$ of each column, in the shape of m.

    A norm is 0 only where W and s·A·B are both 0. Where they cancel, it is at least their rounding
    error.
    """
    weight = leaf_weight(w, Change(), "", materialize=True)
    is_ready = isinstance(weight.w, Factor) and not is_on_host(w)
    if direction.layout.stack[:1] != (0,) or is_ready:
        return _slot_norms(to_device(weight).array, direction)
    # A quantized stack is unpacked one matrix at a time, and one in host memory is moved so.
    rest = direction._replace(layout=direction.layout.of_entry)
    each = (weight.as_stack(), rest)
    return lax.map(lambda x: _slot_norms(to_device(x[0].as_slice()).array, x[1]), each)


def _slot_norms(w: jax.Array, direction: LowRank) -> jax.Array:
    """Computes the norms of the columns in the chosen slots, one slot after another."""
    if direction.layout.slots is None:
        return _column_norms(w, direction)
    count, chosen, axis = direction.layout.slots
    length = w.shape[axis] // count
    n = len(direction.layout.stack)

    def of_slot(i: int, slot: int) -> jax.Array:
        part = lax.slice_in_dim(w, slot * length, (slot + 1) * length, axis=axis)
        a, b = (lax.index_in_dim(x, i, n, keepdims=False) for x in (direction.a, direction.b))
        return _column_norms(part, direction._replace(a=a, b=b))

    return jnp.stack([of_slot(i, slot) for i, slot in enumerate(chosen)], n)


def _column_norms(w: jax.Array, direction: LowRank) -> jax.Array:
    """Computes the norms of all columns of W + s·A·B."""
    layout, scale = direction.layout, direction.scale
    stack, inputs, outputs, _ = layout
    wide, narrow = promote(w.dtype, jnp.float32), promote(w.dtype)
    # The model multiplies with the rounded A and B.
    a, b = direction.a.astype(narrow), direction.b.astype(narrow)

    times = functools.partial(einsum, precision="highest", dtype=wide)
    of_a, of_b = (*stack, *inputs, "r"), (*stack, "r", *outputs)
    squares = jnp.square(w.astype(wide)).sum(inputs)
    kept = [d for d in range(w.ndim) if d not in inputs]
    squares = squares.transpose([kept.index(d) for d in (*stack, *outputs)])
    p = lax.platform_dependent(
        a,
        w.astype(narrow),
        # XLA's CPU compiler lacks this product of 16 bits if W has several axes of outputs.
        cpu=lambda a, w: times(of_a, range(w.ndim), of_b, a.astype(wide), w.astype(wide)),
        default=functools.partial(times, of_a, range(w.ndim), of_b),
    )
    g = times(of_a, (*stack, *inputs, "s"), (*stack, "r", "s"), a, a)
    b = b.astype(wide)
    gb = times((*stack, "r", "s"), (*stack, "s", *outputs), of_b, g, b)
    cross, square = (scale * (b * x).sum(len(stack)) for x in (2 * p, scale * gb))
    least = jnp.finfo(wide).eps * (squares + square)
    return jnp.sqrt(jnp.maximum(squares + cross + square, least))


def _away_from_zero(gain: jax.Array) -> jax.Array:
    """Raises magnitudes below `LEAST` to it; the gradient passes as it is."""
    value = lax.stop_gradient(gain)
    return gain + jnp.where(jnp.abs(value) < LEAST, jnp.copysign(LEAST, value) - value, 0)


def _compute_gain(node: Decomposed, w: jax.Array | Quantized) -> jax.Array:
    """Computes the gain m / n of each output, at least `LEAST`; it is 1 in slots not adapted."""
    n = norms(*lax.stop_gradient((w, LowRank(node.a, node.b, node.scale, node.layout))))
    gain = node.m.astype(promote(n.dtype, node.m.dtype)) / jnp.where(n > 0, n, jnp.inf)
    gain = _away_from_zero(gain)
    return gain if node.layout.slots is None else join_slots(gain, node.layout)


def join_slots(m: jax.Array, layout: Layout) -> jax.Array:
    """Joins numbers of all slots of a weight; those of slots that are not adapted are 1."""
    assert layout.slots is not None
    count, chosen, axis = layout.slots
    at = len(layout.stack)
    each = [lax.index_in_dim(m, i, at, keepdims=False) for i in range(len(chosen))]
    parts = [each[chosen.index(i)] if i in chosen else jnp.ones_like(each[0]) for i in range(count)]
    return jnp.concatenate(parts, at + layout.outputs.index(axis))
