"""LoRA: the rule, and how it makes a node."""

import bisect
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .._arrays import is_floating
from .._errors import InputError
from .._node import Node
from .._quantized import BaseLeaf
from .._rules import Slots, check_field, check_pattern, is_finite, is_int, rule_name
from .._site import Rule, Site
from .._types import Layout
from ..initializers import kaiming_uniform
from ..initializers._initializer import Start, draw_by, takes_shape
from ._low_rank import LowRank, factor_shapes, matrix_lengths
from ._register import register

T = TypeVar("T")

SHARED = {"inputs": "outputs", "outputs": "inputs"}  # what experts share, and what they differ in
KEYWORDS_OF_PEFT = {
    "r": "`rank`",
    "lora_alpha": "`alpha`",
    "lora_dropout": "`dropout`",
    "use_rslora": "`rslora`",
    "init_lora_weights": "`init`, one of jlora.initializers",
    "target_modules": "`pattern`, a regular expression for paths, such as '(query|value)/kernel'",
    "target_parameters": "`pattern`, a regular expression for paths",
    "exclude_modules": "a rule before this one, jlora.Frozen(pattern)",
    "layers_to_transform": "`pattern`, with the numbers of the layers",
    "rank_pattern": "a separate rule before this one",
    "alpha_pattern": "a separate rule before this one",
    "modules_to_save": "a separate rule, jlora.Full(pattern)",
    "trainable_token_indices": "a separate rule, jlora.Rows(pattern, rows)",
    "bias": "a separate rule, jlora.Full('bias')",
    "use_dora": "jlora.DoRA instead of LoRA",
}


def refuse_keywords_of_peft(cls: type[T]) -> type[T]:
    """Makes a dataclass raise a `TypeError` for PEFT's keywords that says what to give instead."""
    init = cls.__init__
    fields = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore

    @functools.wraps(init)
    def init_checked(self: T, *args: Any, **kwargs: Any) -> None:
        if found := [name for name in kwargs if name in KEYWORDS_OF_PEFT and name not in fields]:
            listed = "; ".join(f"`{name}` is {KEYWORDS_OF_PEFT[name]}" for name in found)
            raise TypeError(f"{cls.__name__} does not have PEFT's keywords: {listed}.")
        init(self, *args, **kwargs)

    cls.__init__ = init_checked
    return cls


@register
@refuse_keywords_of_peft
@dataclasses.dataclass(frozen=True)
class LoRA(Rule):
    r"""Adapts the weights whose path matches `pattern` by $W + s \cdot A B$.

    By default alpha is 32 at every rank, so that s = 32 / r. PEFT's default is 8: give `alpha=8`
    where you compare with it.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None is
            *all-linear*: every dense and convolutional site, but no embedding, that no rule with a
            pattern takes.
        rank: r, from 1 to min(inputs, outputs) of the site. Without a pattern, a site that is too
            small gets the largest rank, at least 1, that trains no more parameters than the weight
            has, with the same scale. `sites` shows both ranks.
        alpha: the numerator of the scale s = alpha / r, positive. If you change r alone, the best
            learning rate stays nearly the same: see the guide "Rank, rate, method".
        slots: a `Slots`, to adapt only some parts of a fused output axis; by default None: one A
            and one B for the whole axis.
        dropout: probability of dropping an input of A, in [0, 1); active only under
            `jlora.dropout`.
        materialize: whether jlora may form W + ΔW where it has no factored form. Values and
            gradients stay exact, at the memory and time of a full weight.
        rslora: whether to scale by alpha / √r (Kalajdzievski, arXiv 2312.03732) rather than
            alpha / r. It is a flag, not a number: without a pattern, sites may have other ranks.
        init: how A and B start, one of `jlora.initializers`; by default `kaiming_uniform`. Or an
            initializer of `jax.nn.initializers`, called, such as `normal(0.02)`: it draws each
            matrix of A, of shape (inputs, r), and B is zero.
        dtype: dtype of A and B; by default the dtype of the weight, but at least float32.
        frozen: `("a",)` to train only B, which halves the moments (LoRA-FA, arXiv 2308.03303), or
            `("b",)`. Some initializers freeze a factor themselves, as `miss` does.
        share: what the experts of a weight share: `"inputs"` is one A for all and a B for each,
            `"outputs"` an A for each and one B for all, None an A and a B for each. If the weight
            has no experts but is a stack of scanned layers, the layers share.

    Raises:
        TypeError: if `pattern`, `slots`, `init`, `dtype` or a flag has the wrong type.
        ValueError: if `pattern` is not a regular expression, or another field is not as above; in
            `init` and `sites`, if `rank`, `slots` or `share` does not fit a site.

    Source: Hu et al., LoRA, arXiv 2106.09685.

    Examples:
        >>> import jlora
        >>> jlora.LoRA(r"(query|value)/kernel", rank=8, alpha=16).scale
        2.0
    """

    pattern: str | None = None
    rank: int = 8
    alpha: float = 32.0
    slots: Slots | None = None
    dropout: float = 0.0
    materialize: bool = False
    rslora: bool = False
    init: Callable[..., Any] | None = None
    dtype: DTypeLike | None = None
    frozen: tuple[str, ...] = ()
    share: str | None = None

    node: ClassVar[type[Node]] = LowRank

    def __post_init__(self) -> None:
        if self.pattern is not None:
            check_pattern(self, self.pattern)
        check = functools.partial(check_field, self)
        check("rank", is_int(self.rank) and self.rank >= 1, "be an integer of at least 1")
        check("alpha", is_finite(self.alpha) and self.alpha > 0, "be a positive finite number")
        check("dropout", is_finite(self.dropout) and 0 <= self.dropout < 1, "be in [0, 1)")
        are_slots = self.slots is None or isinstance(self.slots, Slots)
        check("slots", are_slots, "be a jlora.Slots", TypeError)
        for flag in ("materialize", "rslora"):
            check(flag, isinstance(getattr(self, flag), bool), "be True or False", TypeError)
        starts = self.init is None or takes_shape(self.init) is not None
        example = "be an initializer such as jlora.initializers.gaussian"
        is_uncalled = callable(self.init) and not starts
        check("init", starts, example + ", called with its options" * is_uncalled, TypeError)
        is_dtype = self.dtype is None or is_floating(self.dtype)
        check("dtype", is_dtype, "be a floating-point dtype", TypeError)
        given = self.frozen if isinstance(self.frozen, list | tuple) else (self.frozen,)
        object.__setattr__(self, "frozen", tuple(given))
        demanded = getattr(self.init, "frozen", ())
        also = f" (`init` freezes {demanded})" if demanded else ""
        is_one = self.all_frozen in ((), ("a",), ("b",))
        check("frozen", is_one, f"be (), ('a',) or ('b',){also}")
        check("share", self.share in (None, *SHARED), "be 'inputs', 'outputs' or None")
        # Plain numbers, whatever a sweep gave, because rules are saved and compared.
        for name, kind in (("rank", int), ("alpha", float), ("dropout", float)):
            object.__setattr__(self, name, kind(getattr(self, name)))

    @property
    def all_frozen(self) -> tuple[str, ...]:
        """The factors that are frozen, by the rule or by its initializer."""
        return tuple(dict.fromkeys((*self.frozen, *getattr(self.init, "frozen", ()))))

    @property
    def scale(self) -> float:
        """The factor s of ΔW = s·A·B."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def of_rank(self, rank: int) -> "LoRA":
        """Returns the rule with another rank and the same scale."""
        share = rank / self.rank
        alpha = self.alpha * (math.sqrt(share) if self.rslora else share)
        return dataclasses.replace(self, rank=rank, alpha=alpha)

    def factor_shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of A and of B at a site."""
        return factor_shapes(site.layout, site.shape, self.rank)

    def fit(self, site: Site) -> tuple["LoRA", Layout]:
        """Returns the rule with a rank that fits the site, and the layout with the rule's slots."""
        layout = site.layout if self.slots is None else _add_slots(site, self.slots)
        layout = layout if self.share is None else self._share(site, layout, SHARED[self.share])
        largest = min(matrix_lengths(layout, site.shape))
        if self.pattern is None:
            return self._clip(site, layout, largest), layout
        if self.rank <= largest:
            return self, layout
        raise InputError(
            "rank",
            f"of {rule_name(self)} is {self.rank}, above min(inputs, outputs) = {largest} "
            f"of {site.name} with shape {site.shape}. Lower the rank, or put a separate rule for "
            f"this leaf first, such as jlora.Full({re.escape(site.path)!r}).",
        )

    def _share(self, site: Site, layout: Layout, role: str) -> Layout:
        """Makes the axis of experts an input or an output, so that only one factor has it."""
        if site.experts is None:
            raise InputError(
                "share",
                f"of {rule_name(self)} needs a weight with one stacked axis, the experts; "
                f"{site.name} with shape {site.shape} has {len(layout.stack)} stacked axes. Leave "
                "`share` out.",
            )
        stack = tuple(d for d in layout.stack if d != site.experts)
        return layout._replace(stack=stack, **{role: (site.experts, *getattr(layout, role))})

    def _clip(self, site: Site, layout: Layout, largest: int) -> "LoRA":
        """Lowers the rank to `largest`, and until it trains no more than W has; keeps the scale."""

        def trained(rank: int) -> int:
            return dataclasses.replace(self, rank=rank).trainable(layout, site.shape)

        rank = clip_rank(min(self.rank, largest), layout, site.shape, trained)
        return self if rank == self.rank else self.of_rank(rank)

    def sizes(self, layout: Layout) -> dict[str, int]:
        """Returns the rank."""
        del layout
        return {"rank": self.rank}

    def start(self, key: jax.Array, w: BaseLeaf, site: Site) -> tuple[BaseLeaf, Node]:
        """Returns W and its node, whose A and B `init` draws."""
        base, a, b = self.draw(key, w, site)
        fixed = {"dropout": self.dropout, "materialize": self.materialize}
        return base, LowRank(
            a, b, self.scale, site.layout, frozen=self.all_frozen, residual=base is not w, **fixed
        )

    def draw(self, key: jax.Array, w: BaseLeaf, site: Site) -> Start:
        """Draws W, A and B by the initializer, and checks them."""
        init: Callable[..., Any] = self.init or kaiming_uniform
        init = functools.partial(draw_by, init) if takes_shape(init) else init
        made = init(key, w, site, self)
        expected_shapes = (site.shape, *self.factor_shapes(site))
        got = tuple(map(_form, made)) if isinstance(made, tuple) else made
        expected = tuple((shape, "floating-point") for shape in expected_shapes)
        if got != expected or made[0].dtype != w.dtype:
            raise InputError(
                "init",
                f"of {rule_name(self)} must return floating-point W, A and B for "
                f"{site.path!r}, of shapes {expected_shapes} and with W's dtype {w.dtype}; got "
                f"{got}.",
            )
        return made


def _form(x: object) -> tuple[Any, str]:
    """Returns the shape of an array, and whether it is floating-point."""
    dtype = getattr(x, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    return getattr(x, "shape", None), "floating-point" if floating else str(dtype)


def _add_slots(site: Site, slots: Slots) -> Layout:
    """Adds slots to the layout of a site; `ValueError` if they do not divide its outputs."""
    outputs = site.layout.outputs
    if not 0 <= slots.axis < len(outputs):
        raise InputError(
            "axis",
            f"of Slots must be in [0, {len(outputs)}), as {site.name} has {len(outputs)} "
            f"output axes; got {slots.axis}.",
        )
    axis = outputs[slots.axis]
    if site.shape[axis] % slots.count:
        raise InputError(
            "count",
            f"of Slots must divide the {site.shape[axis]} outputs of {site.name} with "
            f"shape {site.shape}; got {slots.count}.",
        )
    return site.layout._replace(slots=(slots.count, slots.chosen, axis))


def clip_rank(
    rank: int, layout: Layout, shape: tuple[int, ...], trained: Callable[[int], int]
) -> int:
    """Finds the largest rank up to `rank` that trains no more parameters than W has; at least 1."""
    count, chosen, _ = layout.slots or (1, (0,), None)
    size = math.prod(shape) // count * len(chosen)
    return max(1, bisect.bisect_right(range(1, rank + 1), size, key=trained))
