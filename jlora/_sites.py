"""Sites: which leaves the model multiplies with, found by tracing it.

The model is evaluated once, on shapes, by the interpreter of `apply`, with a `Weight` without a
change for each parameter, whose uses are written down. So what is found is what `apply` can
compute, by construction.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._adapters import change_of, is_node
from ._core import (
    Change,
    ProductUse,
    Unsupported,
    Uses,
    ValueReadError,
    Weight,
    abstract,
    evaluate,
    leaf_weight,
    materialized,
    take,
    trace,
)
from ._foreign import check_kept, check_leaf
from ._quantized import Scheme, is_quantized, spelled
from ._report import aligned
from ._rules import Full, Rule, near, rule_name
from ._tree import flatten, is_abstract, leaves_by_path, name_of
from ._types import Layout, Path, PyTree


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter leaf and what the model does with it.

    Attributes:
        parts: its path.
        shape: its shape.
        dtype: its dtype.
        kind: `"dense"`, `"embed"` (rows are looked up) or `"conv"`; None if nothing linear uses
            it, or `"materialized"` if a rule then lets W + ΔW be formed.
        layout: which of its axes are stacked, contracted and produced; None without a kind. Of a
            materialized site, the last axis counts as produced.
        unsupported: its uses that have no factored form.
        materialized: the layout that it would have as a materialized site.
        used: whether the traced call depends on it; None if it was not traced.
        scheme: the scheme in which it is quantized, or None.
        rule: the rule that it matches, or None.
        asked_rank: the rank of the rule as it was written, where the site cannot have it.
    """

    parts: Path
    shape: tuple[int, ...]
    dtype: Any
    kind: str | None
    layout: Layout | None
    unsupported: tuple[Unsupported, ...] = ()
    materialized: Layout | None = None
    used: bool | None = None
    scheme: Scheme | None = None
    rule: Rule | None = None
    asked_rank: int | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return repr(self.path) if self.parts else name_of(self.parts)

    @property
    def path(self) -> str:
        """The path, joined by `/`."""
        return "/".join(self.parts)

    @property
    def size(self) -> int:
        """The number of parameters; a PRNG key is none."""
        return 0 if jnp.issubdtype(self.dtype, jax.dtypes.prng_key) else math.prod(self.shape)

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
        return 0 if self.rule is None else self.rule.trainable(self.layout, self.shape)

    @property
    def unsupported_uses(self) -> tuple[str, ...]:
        """Primitive and source line of each use that has no factored form."""
        return tuple(dict.fromkeys(u.reason for u in self.unsupported))

    @property
    def is_listed(self) -> bool:
        """Whether the table has it: a site, or a matrix that is used in another way."""
        return self.kind is not None or any(len(u.axes) >= 2 for u in self.unsupported)

    @property
    def is_missed(self) -> bool:
        """Whether a rule may have been meant to take it, though it is no site."""
        meant = any(len(u.axes) >= 2 and not u.added for u in self.unsupported)
        return meant and self.kind is None and self.rule is None

    @property
    def is_adapted(self) -> bool:
        """Whether a method takes it, rather than that it is frozen or trained in full."""
        return self.rule is not None and not isinstance(self.rule, Full)


@dataclasses.dataclass(frozen=True)
class Sites:
    """The sites of a model: `str()` is a table, and iteration gives each `Site`.

    Attributes:
        leaves: every parameter leaf in tree order, also those that are no sites.
    """

    leaves: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return (s for s in self.leaves if s.kind is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, path: str) -> Site:
        for site in self.leaves:
            if site.path == path:
                return site
        raise KeyError(f"no leaf {path!r}. {near(path, [s.path for s in self.leaves])}")

    @property
    def total(self) -> int:
        """The number of parameters of the model."""
        return sum(s.size for s in self.leaves)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(s.trainable for s in self.leaves)

    @property
    def missed(self) -> list[Site]:
        """Matrices that the model uses, though in no way that has a factored form, without rule."""
        return [s for s in self.leaves if s.is_missed]

    def __str__(self) -> str:
        header = ["path", "shape", "kind", "axes", "parameters", "rule", "rank", "trainable"]
        shown = [s for s in self.leaves if s.is_listed or s.rule is not None]
        rows = [_row(s) for s in shown]
        if any(s.scheme is not None for s in shown):
            header.append("scheme")
            pairs = zip(rows, (s.scheme for s in shown), strict=True)
            rows = [(*row, "-" if scheme is None else spelled(scheme)) for row, scheme in pairs]
        if any(s.kind is None and s.rule is None for s in shown):
            header.append("reason")
            rows = [(*row, _reason(s)) for row, s in zip(rows, shown, strict=True)]
        lines = aligned(header, rows, {"parameters", "rank", "trainable"})
        rule = "─" * max(map(len, lines))
        share = 100 * self.trainable / max(self.total, 1)
        adapted = sum(s.is_adapted for s in self.leaves)
        total = (
            f"{adapted} of {len(self)} sites adapted; "
            f"{self.trainable:,} of {self.total:,} parameters trainable ({share:.3g}%)"
        )
        if self.missed:
            total += f"; {len(self.missed)} more weights have no factored form"
        return "\n".join([lines[0], rule, *lines[1:], rule, total])


def _row(site: Site) -> tuple[str, ...]:
    rule = site.rule
    return (
        site.path or "(root)",
        "×".join(map(str, site.shape)) or "scalar",
        site.kind or "-",
        _axes(site),
        f"{site.size:,}",
        "-" if rule is None else rule_name(rule),
        _rank(site),
        f"{site.trainable:,}" if rule is not None else "-",
    )


def _reason(site: Site) -> str:
    """Why it is no site."""
    no_site = site.kind is None and site.rule is None and site.unsupported_uses
    return f"used in {site.unsupported_uses[0]}" if no_site else "-"


def _rank(site: Site) -> str:
    rank = "-" if site.rule is None else site.rule.sizes(site.layout).get("rank", "-")
    return f"{rank} (of {site.asked_rank})" if site.asked_rank else str(rank)


def _axes(site: Site) -> str:
    """`stack | inputs → outputs`, each as lengths."""
    if site.layout is None:
        return "-"
    stack, inputs, outputs, _ = site.layout
    lengths = ["·".join(str(site.shape[d]) for d in dims) for dims in (stack, inputs, outputs)]
    return (f"{lengths[0]} | " if stack else "") + f"{lengths[1]} → {lengths[2]}"


# --------------------------------------------------------------------------------- how it is found


class Traced(NamedTuple):
    """The model's jaxpr as a function of some of its parameters and of abstract arguments.

    Attributes:
        jaxpr: the jaxpr.
        specs: the types of its inputs.
        paths: of the parameters among them, which come first.
    """

    jaxpr: Any
    specs: list[jax.ShapeDtypeStruct]
    paths: list[Path]

    def uses(self, weights: set[Path]) -> Uses:
        """What it does with the leaves at the paths `weights`."""
        found = Uses()

        def weight(path: Path, x: Any) -> Weight:
            w = leaf_weight(x, Change(), "/".join(path), materialize=True)
            return dataclasses.replace(w, origin=w.origin._replace(uses=found))

        self._evaluate(lambda path, x: weight(path, x) if path in weights else x)
        return found

    def check(self, adapter: dict[Path, Any]) -> None:
        """Raises where the model, adapted, uses a weight in a way that has no factored form."""
        nodes = {path: x for path, x in adapter.items() if is_node(x)}

        def changed(path: Path, x: Any) -> Any:
            if (node := nodes.get(path)) is None:
                return x
            name = "/".join(path)
            change = change_of(node, x, name)
            return leaf_weight(x, change, name, node.materialize)

        self._evaluate(changed)

    def _evaluate(self, weight: Callable[[Path, Any], Any]) -> None:
        def call(*values: Any) -> None:
            n = len(self.paths)
            weights = map(weight, self.paths, values[:n])
            for x in evaluate(self.jaxpr, *weights, *values[n:]):
                materialized(x, lambda: "the function's outputs", added=True)

        jax.eval_shape(call, *self.specs)

    @property
    def used(self) -> set[Path]:
        """The paths of the parameters that something depends on."""
        read = {id(v) for eqn in self.jaxpr.eqns for v in eqn.invars}
        read |= {id(v) for v in self.jaxpr.outvars}
        variables = zip(self.paths, self.jaxpr.invars, strict=False)
        return {path for path, v in variables if id(v) in read}


def find_sites(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wanted: Callable[[str], type | None],
) -> tuple[Sites, Traced]:
    """Traces `apply_fn` on shapes and finds what it does with each leaf of `params`.

    `wanted` gives the type of the rule that may take the leaf at a path. Where Python code of
    `apply_fn` reads the value of a leaf, only those are traced that a method may take; the others
    are not listed as sites then.
    """
    shapes = {path: _abstract(x, path) for path, x in leaves_by_path(params)}
    rules = {path: wanted("/".join(path)) for path in shapes}
    matrices = {path for path, x in shapes.items() if _is_matrix(x)}
    try:
        full = {path for path, rule in rules.items() if rule is Full}
        traced = _trace(apply_fn, params, args, kwargs, matrices | full)
    except ValueReadError:
        matrices &= {path for path, rule in rules.items() if rule not in (None, Full)}
        traced = _trace(apply_fn, params, args, kwargs, matrices)
    uses, used = traced.uses(matrices), traced.used

    schemes = {path: x.scheme for path, x in leaves_by_path(params) if is_quantized(x)}

    def site(path: Path, x: Any) -> Site:
        key = "/".join(path)
        found = _site(path, x, uses.products[key], uses.unsupported[key])
        is_used = path in used if path in traced.paths else None
        return dataclasses.replace(found, used=is_used, scheme=schemes.get(path))

    return Sites(tuple(site(path, x) for path, x in shapes.items())), traced


def _trace(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    paths: set[Path],
) -> Traced:
    """The jaxpr as a function of the leaves at `paths`, and of all that is abstract."""
    found, structure = leaves_by_path(params), flatten(params)[1]
    leaves = [x for _, x in found]
    at = [i for i, (path, x) in enumerate(found) if path in paths or _is_abstract(x)]
    rest, put = take((args, kwargs), is_abstract)

    def call(*values: Any) -> Any:
        args, kwargs = put(values[len(at) :])
        full = dict(enumerate(leaves)) | dict(zip(at, values, strict=False))
        tree = jax.tree.unflatten(structure, list(full.values()))
        outputs = apply_fn(tree, *args, **kwargs)
        check_kept(tree, {path: full[i] for i, (path, _) in enumerate(found)})
        return outputs

    specs = [_abstract(leaves[i], found[i][0]) for i in at]
    specs += [abstract(x if hasattr(x, "dtype") else jnp.asarray(x)) for x in rest]
    jaxpr, _ = trace(call, specs, ["/".join(path) for path in paths])
    return Traced(jaxpr, specs, [found[i][0] for i in at])


def _is_abstract(x: Any) -> bool:
    return is_abstract(x) or is_quantized(x)


def _abstract(x: Any, parts: Path) -> jax.ShapeDtypeStruct:
    if is_quantized(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    check_leaf(x, parts)
    return abstract(x if hasattr(x, "dtype") else jnp.asarray(x))


def _is_matrix(x: Any) -> bool:
    return x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)


def _site(path: Path, x: Any, products: list[ProductUse], unsupported: list[Unsupported]) -> Site:
    kinds = {u.kind for u in products}
    kind = next((k for k in ("embed", "conv", "dense") if k in kinds), None)
    # A tied embedding is laid out as its lookup has it: A by rows.
    first = next((u for u in products if u.kind == kind), None)
    layout = first and _layout(first.inputs, first.outputs, x.shape)
    if first and not layout:
        lost = "a product that leaves it no inputs or no outputs"
        unsupported = [*unsupported, Unsupported(lost, ())]
    wanted = None
    if unsupported:
        *rest, last = range(x.ndim)
        each = (_materialized_layout(u.axes, x.shape) for u in unsupported if u.axes)
        wanted = next(filter(None, each), Layout((), tuple(rest), (last,)))
    kind = kind if layout else None
    return Site(path, x.shape, x.dtype, kind, layout, tuple(unsupported), wanted)


def _materialized_layout(axes: tuple[frozenset[int], ...], shape: tuple[int, ...]) -> Layout | None:
    """The last axis of the weight as its outputs."""
    return _layout(frozenset().union(*axes[:-1]), axes[-1], shape)


def _layout(
    contracted: frozenset[int], kept: frozenset[int], shape: tuple[int, ...]
) -> Layout | None:
    """Axes that are contracted are inputs, those kept are outputs, the others are a stack."""
    inputs = [d for d in range(len(shape)) if d in contracted]
    outputs = [d for d in range(len(shape)) if d in kept - contracted]
    stack = [d for d in range(len(shape)) if d not in contracted | kept]
    # A reshape may lose track of an axis of length 1, which may count as anything.
    for role in (inputs, outputs):
        if not role and (one := next((d for d in stack if shape[d] == 1), None)) is not None:
            stack.remove(one)
            role.append(one)
    if not outputs and not kept:  # a vector of it is contracted: its place is an output
        stack, outputs = [], stack
    return Layout(tuple(stack), tuple(inputs), tuple(outputs)) if inputs and outputs else None
