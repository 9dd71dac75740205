"""Sites: which leaves the model multiplies with, found by tracing it, and the rules they match.

The model is evaluated once, on shapes, by the interpreter of `apply`, with a `Probe` beside each
weight in the place of A and B. A probe knows which axes of its leaf each dimension consists of
and writes down every use. So what is found is what `apply` can compute, by construction.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _control, _linear  # noqa: F401 - they register their rules
from ._interpret import evaluate, materialize, trace
from ._rules import Full, LoRA, Rule, matches, rule_name
from ._tree import factor_shapes, parts_of
from ._types import Layout, Path, PyTree
from ._weight import BROADCAST, Along, Dims, Roles, Weight, reshape_groups

# ---------------------------------------------------------------------------------------- probe


@dataclasses.dataclass(frozen=True)
class Use:
    """One linear use of a leaf, in the leaf's own axes."""

    kind: str
    inputs: frozenset[int]
    outputs: frozenset[int]


class Log:
    """What a leaf is used for, in program order."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.others: list[str] = []
        self.formed: list[Use] = []


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Probe:
    """A term of ΔW that only looks: for each dimension of W, the axes of the leaf within it."""

    log: Log
    axes: tuple[frozenset[int], ...]
    looked_up: frozenset[int] = frozenset()
    whole: bool = True  # concatenated with activations, it would be one of them

    def move(self, dims: Dims, along: Along) -> "Probe":
        """See `Term.move`."""
        del along
        none = {None: frozenset[int](), BROADCAST: frozenset({BROADCAST})}
        return self._with(none[d] if d in none else self.axes[d] for d in dims)

    def reshape(self, old: tuple[int, ...], new: tuple[int, ...]) -> "Probe":
        """See `Term.reshape`."""
        axes = [frozenset[int]()] * len(new)
        for group in reshape_groups(old, new):
            for i in group.new:
                axes[i] = frozenset().union(*(self.axes[d] for d in group.old))
        return self._with(axes)

    def _with(self, axes: Any) -> "Probe":
        return dataclasses.replace(self, axes=tuple(axes))

    def pad(self, config: Sequence[tuple[int, int, int]]) -> "Probe":
        """See `Term.pad`."""
        del config
        return self

    def map(self, f: Callable[[jax.Array], jax.Array]) -> "Probe":
        """See `Term.map`."""
        del f
        return self

    def scale_by(self, scalar: jax.Array) -> "Probe":
        """See `Term.scale_by`."""
        del scalar
        return self

    def unstack(self) -> tuple[Any, Callable[[Any], "Probe"]]:
        """See `Term.unstack`."""
        return (), lambda _: self._with(self.axes[1:])

    def specs(self, spec: Any) -> "Probe":
        """See `Term.specs`."""
        del spec
        return self

    def indexed(self, dims: Sequence[int]) -> "Probe":
        """See `Term.indexed`."""
        return dataclasses.replace(self, looked_up=self._union(dims))

    @property
    def row(self) -> bool:
        """See `Term.row`."""
        return False

    def follows(self, indexed: Sequence[int], others: int) -> bool:
        """See `Term.follows`: what is left of a matrix is a row, of a stack a matrix."""
        del indexed
        return others >= 2

    def look_up(self, f: Callable[..., Any], dims: Dims, indexed: Sequence[int]) -> "Probe":
        """See `Term.look_up`."""
        del f
        rows = self._union(indexed)
        moved = self.indexed(indexed)
        return moved._with(rows if d is None else self.axes[d] for d in dims)

    def use(self, kind: str, roles: Roles, product: Callable[..., Any]) -> None:
        """See `Term.use`: writes it down."""
        del product
        inputs, outputs = self._union(roles.inputs), self._union(roles.outputs)
        if inputs - self.looked_up and outputs - self.looked_up:  # one of a stack was looked up
            inputs, outputs = inputs - self.looked_up, outputs - self.looked_up
        if BROADCAST in inputs | outputs:
            self.log.others.append("a product in which it is broadcast, as an activation is")
        elif roles.inputs and roles.outputs:
            self.log.uses.append(Use(kind, inputs, outputs))
        else:
            self.log.others.append("a product that is no matrix product")

    def dense(self, shape: tuple[int, ...], why: str) -> None:
        """See `Term.dense`: writes down what stands in the way."""
        if self.looked_up:
            rest = frozenset().union(*self.axes) - self.looked_up
            self.log.uses.append(Use("embed", self.looked_up, rest))
            return
        self.log.others.append(why)
        if len(shape) >= 2:
            self.log.formed.append(Use("formed", self._union(range(len(shape) - 1)), self.axes[-1]))

    def _union(self, dims: Sequence[int]) -> frozenset[int]:
        return frozenset().union(*(self.axes[d] for d in dims))


# ---------------------------------------------------------------------------------------- sites


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter leaf and what the model does with it.

    Attributes:
        parts: its path.
        shape: its shape.
        dtype: its dtype.
        kind: `"dense"`, `"embed"` (rows are looked up), `"conv"`, None if nothing linear uses it, or
            `"formed"` if in addition a rule lets W + ΔW be formed.
        layout: which of its axes are stacked, contracted and produced; None without a kind. Of a
            formed site, the last axis counts as produced.
        others: where it is used in a way that has no factored form: primitive and source line.
        formed: the layout that it would have as a formed site.
        rule: the rule that it matches, or None.
    """

    parts: Path
    shape: tuple[int, ...]
    dtype: Any
    kind: str | None
    layout: Layout | None
    others: tuple[str, ...] = ()
    formed: Layout | None = None
    rule: Rule | None = None

    @property
    def path(self) -> str:
        """The path, joined by `/`."""
        return "/".join(self.parts)

    @property
    def size(self) -> int:
        """The number of parameters."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> int:
        """The number of inputs of each matrix."""
        assert self.layout is not None
        return math.prod(self.shape[d] for d in self.layout.inputs)

    @property
    def outputs(self) -> int:
        """The number of outputs of each matrix."""
        assert self.layout is not None
        return math.prod(self.shape[d] for d in self.layout.outputs)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters under the rule."""
        if not isinstance(self.rule, LoRA):
            return self.size if isinstance(self.rule, Full) else 0
        assert self.layout is not None
        return sum(map(math.prod, factor_shapes(self.layout, self.shape, self.rule.rank)))


@dataclasses.dataclass(frozen=True)
class Sites:
    """The sites of a model: `str()` is a table, and iteration gives each `Site`.

    Attributes:
        leaves: every parameter leaf in tree order, also those that are no sites.
    """

    leaves: tuple[Site, ...]

    def __iter__(self) -> Any:
        return (s for s in self.leaves if s.kind is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, path: str) -> Site:
        for site in self.leaves:
            if site.path == path:
                return site
        raise KeyError(f"no leaf {path!r}. {_near(path, [s.path for s in self.leaves])}")

    @property
    def total(self) -> int:
        """The number of parameters of the model."""
        return sum(s.size for s in self.leaves)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(s.trainable for s in self.leaves)

    def __str__(self) -> str:
        header = ("path", "shape", "kind", "axes", "parameters", "rule", "rank", "trainable")
        shown = [s for s in self.leaves if s.kind is not None or s.rule is not None]
        table = [header, *map(_row, shown)]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        right = {"parameters", "rank", "trainable"}
        lines = [
            "  ".join(
                cell.rjust(w) if name in right else cell.ljust(w)
                for cell, w, name in zip(row, widths, header, strict=True)
            ).rstrip()
            for row in table
        ]
        rule = "─" * max(map(len, lines))
        share = 100 * self.trainable / max(self.total, 1)
        adapted = sum(isinstance(s.rule, LoRA) for s in self.leaves)
        return "\n".join(
            [
                lines[0],
                rule,
                *lines[1:],
                rule,
                f"{adapted} of {len(self)} sites adapted; "
                f"{self.trainable:,} of {self.total:,} parameters trainable ({share:.3g}%)",
            ]
        )


def _row(site: Site) -> tuple[str, ...]:
    rule = site.rule
    return (
        site.path or "(root)",
        "×".join(map(str, site.shape)) or "scalar",
        site.kind or "-",
        _axes(site),
        f"{site.size:,}",
        "-" if rule is None else rule_name(rule),
        str(rule.rank) if isinstance(rule, LoRA) else "-",
        f"{site.trainable:,}" if rule is not None else "-",
    )


def _axes(site: Site) -> str:
    """`stack | inputs → outputs`, each as lengths."""
    if site.layout is None:
        return "-"
    names = lambda dims: "·".join(str(site.shape[d]) for d in dims)  # noqa: E731
    stack = names(site.layout.stack)
    return (f"{stack} | " if stack else "") + f"{names(site.layout.inputs)} → {names(site.layout.outputs)}"


# --------------------------------------------------------------------------------------- search


def find_sites(
    apply_fn: Callable[..., Any], params: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Sites:
    """Traces `apply_fn` on shapes and finds what it does with each leaf of `params`."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [_abstract(x, parts_of(path)) for path, x in flat]
    logs = [Log() for _ in leaves]
    rest, rest_tree = jax.tree.flatten((args, kwargs))
    at = [i for i, x in enumerate(rest) if isinstance(x, jax.ShapeDtypeStruct)]

    def call(*values: Any) -> Any:
        full = dict(enumerate(rest)) | dict(zip(at, values[len(leaves) :], strict=True))
        args, kwargs = jax.tree.unflatten(rest_tree, [full[i] for i in range(len(rest))])
        return apply_fn(jax.tree.unflatten(tree, values[: len(leaves)]), *args, **kwargs)

    abstract = [*leaves, *(rest[i] for i in at)]
    jaxpr, _ = trace(call, *abstract)

    def probe(*values: Any) -> None:
        operands = [
            Weight(x, (_probe(x, log),), "/".join(parts_of(path)), materialize=True)
            if _is_matrix(x)
            else x
            for x, log, (path, _) in zip(values, logs, flat, strict=False)
        ]
        outs = evaluate(jaxpr, *operands, *values[len(leaves) :])
        for x in outs:
            materialize(x, "the function's outputs")

    jax.eval_shape(probe, *abstract)
    return Sites(
        tuple(
            _site(parts_of(path), x, log)
            for (path, _), x, log in zip(flat, leaves, logs, strict=True)
        )
    )


def _abstract(x: Any, parts: Path) -> jax.ShapeDtypeStruct:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        if not isinstance(x, int | float | complex | bool | np.generic):
            raise TypeError(
                f"`params` must be a pytree of arrays; the leaf {'/'.join(parts)!r} is {x!r} of type "
                f"{type(x).__name__}."
            )
        x = jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _is_matrix(x: Any) -> bool:
    return x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)


def _probe(x: Any, log: Log) -> Probe:
    return Probe(log, tuple(frozenset({d}) for d in range(x.ndim)))


def _site(parts: Path, x: Any, log: Log) -> Site:
    kinds = {u.kind for u in log.uses}
    kind = next((k for k in ("embed", "conv", "dense") if k in kinds), None)
    # A tied embedding is laid out as its lookup has it: A by rows.
    first = next((u for u in log.uses if u.kind == kind), None)
    layout = first and _layout(first, x.ndim)
    formed = _layout(log.formed[0], x.ndim) if log.formed else None
    others = tuple(dict.fromkeys(log.others))
    return Site(parts, x.shape, x.dtype, kind if layout else None, layout, others, formed)


def _layout(use: Use, ndim: int) -> Layout | None:
    """Axes that are contracted are inputs, those kept are outputs, the others are a stack."""
    inputs = tuple(d for d in range(ndim) if d in use.inputs)
    outputs = tuple(d for d in range(ndim) if d in use.outputs - use.inputs)
    stack = tuple(d for d in range(ndim) if d not in use.inputs | use.outputs)
    return Layout(stack, inputs, outputs) if inputs and outputs else None


# ---------------------------------------------------------------------------------------- match


def match(sites: Sites, rules: Sequence[Rule]) -> Sites:
    """Gives each leaf the first rule that it matches; raises where a rule does nothing or cannot."""
    matched = tuple(_match(site, rules) for site in sites.leaves)
    for rule in rules:
        if not any(s.rule is rule for s in matched):
            _raise_idle(rule, sites, matched)
    return Sites(matched)


def _takes(rule: Rule, site: Site) -> bool:
    if rule.pattern is None:
        return site.kind in ("dense", "conv")
    return matches(rule, site.path)


def _match(site: Site, rules: Sequence[Rule]) -> Site:
    rule = next((r for r in rules if _takes(r, site)), None)
    if rule is None:
        return site
    if isinstance(rule, Full):
        if not jnp.issubdtype(site.dtype, jnp.inexact):
            raise ValueError(
                f"{rule_name(rule)} matches {site.path!r} of dtype {site.dtype}, which cannot be "
                "trained. Narrow the pattern to floating-point leaves."
            )
        return dataclasses.replace(site, rule=rule)
    if site.layout is None and rule.materialize and site.formed is not None:
        site = dataclasses.replace(site, kind="formed", layout=site.formed)
    if site.layout is None:
        raise ValueError(_not_linear(rule, site))
    if site.others and not rule.materialize:
        raise NotImplementedError(
            f"{rule_name(rule)} matches {site.path!r}, which the model also uses where W + s·A·B has "
            f"no factored form: {'; '.join(site.others)}. Leave it out of the rules, or let W + ΔW "
            "be formed there with LoRA(..., materialize=True): exact, but at full memory and time."
        )
    layout = site.layout if rule.slots is None else _slotted(rule, site)
    site = dataclasses.replace(site, rule=rule, layout=layout)
    smaller = min(site.inputs, site.outputs // (rule.slots.count if rule.slots else 1))
    if rule.rank > smaller:
        raise ValueError(
            f"`rank` of {rule_name(rule)} is {rule.rank}, above min(inputs, outputs) = {smaller} of "
            f"{site.path!r} with shape {site.shape}. Lower the rank, or put a rule of its own for "
            f"this leaf first, such as jlora.Full({re.escape(site.path)!r})."
        )
    return site


def _slotted(rule: LoRA, site: Site) -> Layout:
    assert rule.slots is not None and site.layout is not None
    outputs, slots = site.layout.outputs, rule.slots
    if not 0 <= slots.axis < len(outputs):
        raise ValueError(
            f"`axis` of Slots is {slots.axis}, but {site.path!r} has {len(outputs)} output axes; "
            f"it must lie in [0, {len(outputs)})."
        )
    axis = outputs[slots.axis]
    if site.shape[axis] % slots.count:
        raise ValueError(
            f"`count` of Slots is {slots.count}, which does not divide the {site.shape[axis]} outputs "
            f"of {site.path!r} with shape {site.shape}."
        )
    return site.layout._replace(slots=(slots.count, slots.chosen, axis))


def _not_linear(rule: LoRA, site: Site) -> str:
    if site.others:
        why = "is used only by " + "; ".join(site.others)
    elif len(site.shape) < 2:
        why = f"is no matrix (shape {site.shape})"
    elif not jnp.issubdtype(site.dtype, jnp.floating):
        why = f"is not floating-point ({site.dtype})"
    else:
        why = "is not used by the traced call"
    return (
        f"{rule_name(rule)} matches {site.path!r} of shape {site.shape}, which is used by nothing "
        f"linear: it {why}. Narrow the pattern, train the leaf in full with jlora.Full, or let W + ΔW "
        "be formed with LoRA(..., materialize=True)."
    )


def _raise_idle(rule: Rule, sites: Sites, matched: Sequence[Site]) -> None:
    taken = [s for s in matched if s.rule is not None and _takes(rule, s)]
    if taken:
        earlier = ", ".join(dict.fromkeys(rule_name(s.rule) for s in taken if s.rule is not None))
        raise ValueError(
            f"{rule_name(rule)} is left with no leaf: earlier rules take all {len(taken)} that it "
            f"matches ({earlier}). The first match wins; reorder the rules or drop this one."
        )
    if rule.pattern is None:
        raise ValueError(
            "LoRA() without a pattern adapts every dense and conv site, but the model has none. "
            "Name leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites."
        )
    wanted = list(sites) if isinstance(rule, LoRA) else sites.leaves
    raise ValueError(
        f"{rule_name(rule)} matches no leaf of `params`. "
        + _near(rule.pattern, [s.path for s in wanted])
    )


def _near(pattern: str, paths: Sequence[str]) -> str:
    """The paths that look most like `pattern`."""
    words = re.sub(r"[^\w/]+", " ", pattern).strip().lower()

    def likeness(path: str) -> float:
        tails = [path.split("/", i)[-1] for i in range(path.count("/") + 1)]
        return max(difflib.SequenceMatcher(None, words, t.lower()).ratio() for t in tails)

    near = sorted(paths, key=likeness, reverse=True)[:3]
    return f"Near misses: {', '.join(near)}." if near else "There is no leaf to match."
