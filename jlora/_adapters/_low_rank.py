"""LoRA: the rule, the node, and what it means."""

import bisect
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import GetAttrKey

from .._core import Change, Delta
from .._rules import Slots, check_pattern, is_finite, is_floating, is_int, rule_name
from .._types import Layout, short
from ..initializers import kaiming_uniform
from ._keywords import refuse_keywords_of_peft
from ._method import SLOTS, AxisOrName, Method, factor, register, shapes, trainable


@refuse_keywords_of_peft
@dataclasses.dataclass(frozen=True)
class LoRA:
    r"""Adapts the weights whose path matches `pattern` by $W + s \cdot A B$.

    Attributes:
        pattern: a regular expression for whole components of a leaf's path. None means
            *all-linear*: every dense and convolutional site, no embeddings.
        rank: r, at least 1 and at most the smaller of the site's inputs and outputs. All-linear,
            a site that has no room for it gets the largest rank that trains no more parameters
            than the weight has, at least 1, with the same scale. `sites` shows both ranks.
        alpha: the numerator of the scale, positive.
        slots: adapt only some parts of a fused output axis.
        dropout: probability of dropping an input of A, in [0, 1); active only under
            `jlora.dropout`.
        materialize: allow W + ΔW to be formed where the model uses W in a way that has no
            factored form. Values and gradients stay exact; memory and time do not stay small.
        rslora: scale by alpha / √r (Kalajdzievski, arXiv 2312.03732) rather than alpha / r.
        init: how A and B start, one of `jlora.initializers`; `kaiming_uniform` unless told.
        dtype: dtype of A and B; by default the weight's own, but at least float32.

    Raises:
        TypeError: if a field is of a wrong type.
        ValueError: if `pattern` is not a regular expression or a number is out of range.

    Source: Hu et al., LoRA, arXiv 2106.09685.

    Examples:
        >>> import jlora
        >>> jlora.LoRA(r"(query|value)/kernel", rank=8, alpha=16).scale
        2.0
    """

    pattern: str | None = None
    rank: int = 8
    alpha: float = 16.0
    slots: Slots | None = None
    dropout: float = 0.0
    materialize: bool = False
    rslora: bool = False
    init: Callable[..., Any] | None = None
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            check_pattern(self, self.pattern)
        name = rule_name(self)
        if not is_int(self.rank) or self.rank < 1:
            raise ValueError(
                f"`rank` of {name} must be an integer of at least 1; got {self.rank!r}."
            )
        if not is_finite(self.alpha) or self.alpha <= 0:
            raise ValueError(
                f"`alpha` of {name} must be a positive finite number; got {self.alpha!r}."
            )
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` of {name} must lie in [0, 1); got {self.dropout!r}.")
        if self.slots is not None and not isinstance(self.slots, Slots):
            raise TypeError(f"`slots` of {name} must be a jlora.Slots; got {self.slots!r}.")
        for flag in ("materialize", "rslora"):
            if not isinstance(value := getattr(self, flag), bool):
                raise TypeError(f"`{flag}` of {name} must be True or False; got {value!r}.")
        if self.init is not None and not callable(self.init):
            raise TypeError(
                f"`init` of {name} must be an initializer such as jlora.initializers.gaussian; "
                f"got {self.init!r}."
            )
        if self.dtype is not None and not is_floating(self.dtype):
            raise TypeError(f"`dtype` of {name} must be a floating-point one; got {self.dtype!r}.")
        # Plain numbers, whatever a sweep gave: they are saved and compared.
        object.__setattr__(self, "rank", int(self.rank))
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scale(self) -> float:
        """The factor s of ΔW = s·A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Which of A and B, `"a"` or `"b"`, `init` wants as it made them."""
        return getattr(self.init, "frozen", ())

    def of_rank(self, rank: int) -> "LoRA":
        """The rule of another rank at the same scale."""
        share = rank / self.rank
        alpha = self.alpha * (math.sqrt(share) if self.rslora else share)
        return dataclasses.replace(self, rank=rank, alpha=alpha)

    def factor_shapes(self, site: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and of B at a site."""
        return factor_shapes(site.layout, site.shape, self.rank)


class LowRank(NamedTuple):
    r"""One adapted weight: $\Delta W = s \cdot A B$ (Hu et al., arXiv 2106.09685, section 4.1).

    A pytree node with the children `a`, `b` and `key`; the rest is static.

    Attributes:
        a: A, shape (stack…, inputs…, r), or (stack…, slots, inputs…, r) with slots.
        b: B, shape (stack…, r, outputs…), or (stack…, slots, r, outputs…) with slots, where the
            slotted output axis has 1 / count of W's length.
        scale: s, a number without units: alpha / r, or alpha / √r.
        layout: which axes of W are which.
        dropout: probability of dropping an input of A, in [0, 1).
        materialize: whether W + ΔW may be formed where the model leaves no other way.
        key: keys of shape (stack…) while dropout is active, else None. See `jlora.dropout`.
        frozen: `("a",)` or `("b",)` where that factor is not trained, as its initializer wants.
        residual: whether it is for a base that its initializer changed, such as W - s·A·B, and not
            for the parameters as they were.

    The product is of two factors: twice A and twice B is four times ΔW. To scale ΔW, scale B alone.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> _, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> print(adapter)
        {'w': LowRank(a=float32[4,2], b=float32[2,3], scale=8.0)}
        >>> halve = lambda x, label: x / 2 if label == "b" else x
        >>> half = jax.tree.map(halve, adapter, jlora.labels(adapter))
    """

    a: jax.Array
    b: jax.Array
    scale: float
    layout: Layout
    dropout: float = 0.0
    materialize: bool = False
    key: jax.Array | None = None
    frozen: tuple[str, ...] = ()
    residual: bool = False

    def __repr__(self) -> str:
        shown = {"a": short(self.a), "b": short(self.b), "scale": repr(self.scale)}
        stack, _, _, slots = self.layout
        shown |= {"stack": repr(stack)} if stack else {}
        shown |= {"slots": repr(slots)} if slots is not None else {}
        shown |= {"dropout": repr(self.dropout)} if self.dropout else {}
        shown |= {"materialize": "True"} if self.materialize else {}
        shown |= {"key": short(self.key)} if self.key is not None else {}
        shown |= {"frozen": repr(self.frozen)} if self.frozen else {}
        shown |= {"residual": "True"} if self.residual else {}
        return f"LowRank({', '.join(f'{name}={x}' for name, x in shown.items())})"


def _unflatten(static: tuple[Any, ...], children: Any) -> LowRank:
    a, b, key = children
    scale, layout, dropout, materialize, *rest = static
    return LowRank(a, b, scale, layout, dropout, materialize, key, *rest)


def _static(x: LowRank) -> tuple[Any, ...]:
    return x.scale, x.layout, x.dropout, x.materialize, x.frozen, x.residual


# A NamedTuple, so that `flax.serialization` saves it without an import of Flax here; registered,
# so that JAX sees the static fields as structure and not as leaves.
jax.tree_util.register_pytree_with_keys(
    LowRank,
    lambda x: (
        tuple((GetAttrKey(name), getattr(x, name)) for name in ("a", "b", "key")),
        _static(x),
    ),
    _unflatten,
    lambda x: ((x.a, x.b, x.key), _static(x)),
)


# ---------------------------------------------------------------------------------- what it means


def low_rank_axes(layout: Layout) -> dict[str, tuple[AxisOrName, ...]]:
    """What each axis of A, of B and of the dropout keys follows."""
    beside = (*layout.stack, *((SLOTS,) if layout.slots is not None else ()))
    return {
        "a": (*beside, *layout.inputs, "rank"),
        "b": (*beside, "rank", *layout.outputs),
        "key": layout.stack,
    }


def sizes(rank: int, layout: Layout) -> dict[str, int]:
    return {"rank": rank} | ({SLOTS: len(layout.slots[1])} if layout.slots else {})


def factor_shapes(
    layout: Layout, shape: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a weight of `shape`."""
    found = shapes(METHOD, layout, shape, sizes(rank, layout))
    return found["a"], found["b"]


def fit(rule: LoRA, site: Any) -> tuple[LoRA, Layout]:
    """The rule, of a rank that the site can have, and the layout with the rule's slots."""
    layout = site.layout if rule.slots is None else _slotted(rule, site)
    largest = min(site.inputs, site.outputs // (rule.slots.count if rule.slots else 1))
    if rule.pattern is None:
        return _clipped(rule, site, layout, largest), layout
    if rule.rank <= largest:
        return rule, layout
    raise ValueError(
        f"`rank` of {rule_name(rule)} is {rule.rank}, above min(inputs, outputs) = {largest} "
        f"of {site.name} with shape {site.shape}. Lower the rank, or put a rule of its own "
        f"for this leaf first, such as jlora.Full({re.escape(site.path)!r})."
    )


def _clipped(rule: LoRA, site: Any, layout: Layout, largest: int) -> LoRA:
    """The rule at the same scale, of a rank up to `largest` that trains no more than W has."""

    def trained(rank: int) -> int:
        return trainable(dataclasses.replace(rule, rank=rank), layout, site.shape)

    rank = clipped_rank(min(rule.rank, largest), layout, site.shape, trained)
    return rule if rank == rule.rank else rule.of_rank(rank)


def clipped_rank(
    rank: int, layout: Layout, shape: tuple[int, ...], trained: Callable[[int], int]
) -> int:
    """The largest rank up to `rank`, and at least 1, that trains no more than W has."""
    count, chosen, _ = layout.slots or (1, (0,), None)
    size = math.prod(shape) // count * len(chosen)
    return max(1, bisect.bisect_right(range(1, rank + 1), size, key=trained))


def _slotted(rule: LoRA, site: Any) -> Layout:
    assert rule.slots is not None
    outputs, slots = site.layout.outputs, rule.slots
    if not 0 <= slots.axis < len(outputs):
        raise ValueError(
            f"`axis` of Slots is {slots.axis}, but {site.name} has {len(outputs)} output axes; "
            f"it must lie in [0, {len(outputs)})."
        )
    axis = outputs[slots.axis]
    if site.shape[axis] % slots.count:
        raise ValueError(
            f"`count` of Slots is {slots.count}, which does not divide the {site.shape[axis]} "
            f"outputs of {site.name} with shape {site.shape}."
        )
    return site.layout._replace(slots=(slots.count, slots.chosen, axis))


def drawn(key: jax.Array, w: Any, site: Any, rule: LoRA) -> tuple[Any, jax.Array, jax.Array]:
    """W, A and B as the rule's initializer has them, checked."""
    made = (rule.init or kaiming_uniform)(key, w, site, rule)
    expected_shapes = (site.shape, *rule.factor_shapes(site))
    got = tuple(map(_form, made)) if isinstance(made, tuple) else made
    expected = tuple((shape, "floating-point") for shape in expected_shapes)
    if got != expected or made[0].dtype != w.dtype:
        raise ValueError(
            f"`init` of {rule_name(rule)} must give W, A and B for {site.path!r}, floating-point, "
            f"of shapes {expected_shapes} and with W's dtype {w.dtype}; got {got}."
        )
    return made


def _start(key: jax.Array, w: Any, site: Any, rule: LoRA) -> tuple[Any, LowRank]:
    base, a, b = drawn(key, w, site, rule)
    static = {"dropout": rule.dropout, "materialize": rule.materialize, "frozen": rule.frozen}
    return base, LowRank(a, b, rule.scale, site.layout, **static, residual=base is not w)


def _form(x: Any) -> tuple[Any, str]:
    dtype = getattr(x, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return getattr(x, "shape", None), "floating-point" if floating else str(dtype)


def without_slots(node: LowRank, shape: tuple[int, ...]) -> LowRank:
    """The same ΔW of a weight of `shape`, by one A and one B.

    A has the rank slots·r, and the rows of B reach only their own slot of the outputs.
    """
    if node.layout.slots is None:
        return node
    count, chosen, axis = node.layout.slots
    n, out = len(node.layout.stack), node.layout.outputs.index(axis)
    r, length = node.a.shape[-1], shape[axis] // count

    def place(i: int, slot: int) -> jax.Array:
        b = jnp.take(node.b, i, axis=n)  # (stack…, r, outputs…)
        pads = [(0, 0)] * b.ndim
        pads[n + 1 + out] = (slot * length, (count - 1 - slot) * length)
        return jnp.pad(b, pads)

    b = jnp.concatenate([place(i, slot) for i, slot in enumerate(chosen)], axis=n)
    a = jnp.moveaxis(node.a, n, -2)  # (stack…, inputs…, slots, r)
    a = a.reshape(*a.shape[:-2], len(chosen) * r)
    return node._replace(a=a, b=b, layout=node.layout._replace(slots=None))


def still(node: LowRank) -> LowRank:
    """The node, to whose frozen factors no gradient passes, whatever the optimizer."""
    return node._replace(**{name: lax.stop_gradient(getattr(node, name)) for name in node.frozen})


def _lower(node: LowRank, w: Any) -> Change:
    node = without_slots(still(node), w.shape)
    key = None if node.key is None else factor(node, "key")
    return Change((Delta(factor(node, "a"), factor(node, "b"), node.scale, key, node.dropout),))


METHOD = Method(
    rule=LoRA,
    node=LowRank,
    labels={"a": "a", "b": "b", "key": None},
    axes=low_rank_axes,
    sizes=lambda rule, layout: sizes(rule.rank, layout),
    fit=fit,
    start=_start,
    lower=_lower,
)
register(METHOD)
