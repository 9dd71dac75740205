"""A site: a leaf and how the model uses it; and the base class of the rules that adapt it.

They are one module, because a site has its rule, and a rule gets its site. It is not `_types`,
because a site also has a scheme, and a rule makes nodes; both of these have a `Layout`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from . import _compat
from ._arrays import to_device
from ._errors import InputError
from ._node import Node
from ._quantized import BaseLeaf, Quantized, Scheme
from ._rules import check_pattern, name_mistake, rule_name
from ._types import Layout, Path


class Rule:
    """The base class of rules, by which the user says which leaves are adapted, and how.

    A subclass is a frozen dataclass with a field `pattern`. It sets `node`, the class of its nodes,
    and defines `start`. All else has defaults, which a field of the same name may replace.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None is
            *all-linear*: every dense and convolutional site, but no embedding, that no rule with a
            pattern takes.
        node: a subclass of `jlora.extend.Node`.
        materialize: whether jlora may form W + ΔW where it has no factored form.
        frozen: names of arrays of the node that are not trained.
    """

    pattern: Any  # `str` where a rule demands one, else `str | None`
    node: ClassVar[type[Node]]
    materialize: bool = False
    frozen: tuple[str, ...] = ()
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # of each subclass

    @property
    def all_frozen(self) -> tuple[str, ...]:
        """All arrays that are not trained: those of `frozen`, and others that the rule freezes."""
        return self.frozen

    def fit(self, site: "Site") -> tuple["Rule", Layout]:
        """Returns rule and layout for a `Site`; `ValueError` if the rule does not fit the site."""
        return self, site.layout

    def sizes(self, layout: Layout) -> dict[str, int]:
        """Returns the lengths of the node's axes that W does not have, such as `{"rank": 8}`."""
        del layout
        return {}

    def start(self, key: jax.Array, w: BaseLeaf, site: "Site") -> tuple[BaseLeaf, Node | BaseLeaf]:
        """Returns W and its node, drawn with `key`.

        `w` is W: an array, a `jax.ShapeDtypeStruct` or a `jlora.Quantized`. A rule that does not
        change the base returns the object `w` itself. (`Full` alone returns an array for a node.)
        """
        raise NotImplementedError

    def shapes(self, layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array of the node for a weight of `shape`."""
        return self.node.shapes(layout, shape, self.sizes(layout))

    def trainable(self, layout: Layout, shape: tuple[int, ...]) -> int:
        """Counts the parameters that the rule trains at a weight of `shape`."""
        frozen = {name for name, x in self.node.labels.items() if x in (None, "base")}
        found = self.shapes(layout, shape).items()
        return sum(math.prod(n) for name, n in found if name not in frozen.union(self.all_frozen))


class Unsupported(NamedTuple):
    """One use of a leaf that has no factored form.

    Attributes:
        reason: primitive and source line.
        axes: for each axis of the weight that is longer than 1 there, the axes of the leaf in it.
        added: whether it is used as an activation: added to one, concatenated with one, or
            returned.
    """

    reason: str
    axes: tuple[frozenset[int], ...]
    added: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """A parameter leaf, together with how the model uses it. It is a site if it has a `kind`.

    Attributes:
        parts: the components of its path.
        shape: the shape of the leaf.
        dtype: the dtype of the leaf.
        kind: how the model uses it: `"dense"`, `"embed"` (rows are looked up) or `"conv"`. If no
            use has a factored form, it is `"materialized"` under a rule that may form W + ΔW, else
            None.
        layout: which of its axes are the stack, the inputs and the outputs; empty without a
            kind. The output of a materialized site is its last axis.
        experts: the stacked axis of its experts, or of its layers if it has no experts; None if
            there is no such axis, or more than one.
        unsupported: its uses that have no factored form.
        materialized: the layout that it would have as a materialized site.
        used: whether the outputs of the traced call depend on it, other than behind
            `stop_gradient`; None if it was not traced.
        scheme: the scheme in which it is quantized, or None.
        rule: its rule, or None.
        asked_rank: the rank in the rule, if the site is too small for it; else None.
        scopes: where the model multiplies with it: the names of `jax.named_scope`, joined by `/`.
    """

    parts: Path
    shape: tuple[int, ...]
    dtype: jnp.dtype
    kind: str | None
    layout: Layout
    experts: int | None = None
    unsupported: tuple[Unsupported, ...] = ()
    materialized: Layout | None = None
    used: bool | None = None
    scheme: Scheme | None = None
    rule: Rule | None = None
    asked_rank: int | None = None
    scopes: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The name of the site in errors."""
        return repr(self.path) if self.parts else "the root"

    @property
    def path(self) -> str:
        """The path, with its components joined by `/`."""
        return "/".join(self.parts)

    @property
    def size(self) -> int:
        """The number of parameters; a PRNG key counts as none."""
        return 0 if jnp.issubdtype(self.dtype, jax.dtypes.prng_key) else math.prod(self.shape)

    @property
    def inputs(self) -> int:
        """The number of inputs of each matrix."""
        return math.prod(self.shape[d] for d in self.layout.inputs)

    @property
    def outputs(self) -> int:
        """The number of outputs of each matrix."""
        return math.prod(self.shape[d] for d in self.layout.outputs)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters under the rule."""
        return 0 if self.rule is None else self.rule.trainable(self.layout, self.shape)

    @property
    def unsupported_uses(self) -> tuple[str, ...]:
        """The primitive and the source line of each use that has no factored form."""
        return tuple(dict.fromkeys(u.reason for u in self.unsupported))

    @property
    def is_listed(self) -> bool:
        """Whether the table shows it: it is a site, or a matrix that is used in another way."""
        return self.kind is not None or any(len(u.axes) >= 2 for u in self.unsupported)

    @property
    def is_missed(self) -> bool:
        """Whether it is a matrix with neither kind nor rule, not only used as an activation."""
        meant = any(len(u.axes) >= 2 and not u.added for u in self.unsupported)
        return meant and self.kind is None and self.rule is None

    @property
    def is_adapted(self) -> bool:
        """Whether it gets an adapter, rather than being frozen or trained in full."""
        return self.is_trained and not isinstance(self.rule, Full)

    @property
    def is_trained(self) -> bool:
        """Whether it is adapted or trained in full."""
        return self.rule is not None and not isinstance(self.rule, Frozen)


@dataclasses.dataclass(frozen=True)
class Full(Rule):
    """Trains the leaves whose path matches `pattern` in full: heads, norms, biases.

    It trains any floating-point leaf, also one that is not a weight; others raise `ValueError`.
    `BatchNorm_0` also matches the running statistics in `batch_stats`: write `params/BatchNorm_0`.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path: `head` matches
            `lm/head/kernel` but not `multi_head/kernel`; `.*head` matches both.

    Raises:
        TypeError: if `pattern` is not a string.
        ValueError: if `pattern` is not a regular expression, or starts or ends with `/`.

    Examples:
        >>> import jlora
        >>> jlora.Full(r"classifier")
        Full(pattern='classifier')
    """

    pattern: str

    def __post_init__(self) -> None:
        check_pattern(self, self.pattern)

    def start(self, key: jax.Array, w: BaseLeaf, site: Site) -> tuple[BaseLeaf, BaseLeaf]:
        """Returns W and a copy of it, so that a step that donates the adapter keeps the base."""
        del key, site
        return w, w if isinstance(w, jax.ShapeDtypeStruct) else jnp.array(to_device(w))

    def trainable(self, layout: Layout, shape: tuple[int, ...]) -> int:
        """Counts the entries of W."""
        del layout
        return math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Frozen(Rule):
    """Takes the leaves whose path matches `pattern`, and trains nothing: no later rule adapts them.

    Attributes:
        pattern: as of `Full`. Any leaf may match, also one that no rule could adapt.

    Raises:
        TypeError: as `Full`.
        ValueError: as `Full`.

    Examples:
        All linear layers but the head:

        >>> import jlora
        >>> rules = jlora.Frozen("head"), jlora.LoRA()
    """

    pattern: str

    def __post_init__(self) -> None:
        check_pattern(self, self.pattern)

    def trainable(self, layout: Layout, shape: tuple[int, ...]) -> int:
        """Counts none."""
        del layout, shape
        return 0


def check_rules(rules: object, unpack: bool = False) -> tuple[Rule, ...]:
    """Returns one or several rules as a tuple; raises if they are not rules, or contradict."""
    if isinstance(rules, Rule | str | Mapping) or not isinstance(rules, Iterable):
        rules = (rules,)
    if hasattr(rules, "rules"):
        got = f"a {type(rules).__name__}. Give its rules, as in lora.rules"
        raise TypeError(f"`rules` must be rules, such as jlora.LoRA(); got {got}.")
    found = []
    for rule in rules:
        if not isinstance(rule, Rule):
            got = name_mistake(rule, unpack)
            raise TypeError(f"`rules` must be rules, such as jlora.LoRA(); got {got}.")
        if rule.pattern is not None:
            check_pattern(rule, rule.pattern)
        found.append(rule)
    if len(rest := [rule_name(rule) for rule in found if rule.pattern is None]) > 1:
        raise InputError(
            "rules",
            f"has {', '.join(rest)}, but only one rule may be without a pattern: it takes "
            "every dense and conv site that no rule with a pattern takes. Give the others a "
            "pattern.",
        )
    return tuple(found)


def check_whole(use: str, w: BaseLeaf, path: str) -> jax.Array | Quantized:
    """Returns `w`; raises unless it has values and is whole, not a shard of a `shard_map`.

    Args:
        use: subject and verb for the error, such as `DoRA('w') takes norms of`.
        w: an array, a shape or a quantized weight.
        path: its path.
    """
    types = [x for x in jax.tree.leaves(w) if isinstance(x, jax.ShapeDtypeStruct)]
    if isinstance(w, jax.ShapeDtypeStruct) or types:
        raise ValueError(
            f"`params` has only a shape at {path!r}, but {use} its values. Give arrays, or call "
            "init under jax.eval_shape."
        )
    if _compat.may_be_cut_over(w):
        raise NotImplementedError(
            f"{use} the whole of {path!r}, but the shard_map around init may have sharded it. Call "
            "init outside of the shard_map."
        )
    return w
