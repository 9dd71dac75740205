"""Sites: which leaves the model multiplies with, found by tracing it.

The model is evaluated once, on shapes, by the interpreter of `apply`, with a `Probe` beside each
weight in the place of A and B. So what is found is what `apply` can compute, by construction.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _control, _linear, _moves  # noqa: F401 - they register their rules
from ._interpret import ValueReadError, evaluate, materialize, trace
from ._probe import Log, Probe, Use
from ._rules import Full, LoRA, Rule, near, rule_name
from ._table import aligned
from ._tree import abstract, factor_shapes, is_abstract, leaves_by_path, name_of, take
from ._types import Layout, Path, PyTree
from ._weight import Weight


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter leaf and what the model does with it.

    Attributes:
        parts: its path.
        shape: its shape.
        dtype: its dtype.
        kind: `"dense"`, `"embed"` (rows are looked up) or `"conv"`; None if nothing linear uses
            it, or `"formed"` if a rule then lets W + ΔW be formed.
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
        if not isinstance(self.rule, LoRA):
            return self.size if isinstance(self.rule, Full) else 0
        assert self.layout is not None
        a, b = factor_shapes(self.layout, self.shape, self.rule.rank)
        return math.prod(a) + math.prod(b)


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

    def __str__(self) -> str:
        header = ("path", "shape", "kind", "axes", "parameters", "rule", "rank", "trainable")
        shown = [s for s in self.leaves if s.kind is not None or s.rule is not None]
        right = {"parameters", "rank", "trainable"}
        lines = aligned(header, [_row(s) for s in shown], right)
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
    stack, inputs, outputs, _ = site.layout
    lengths = ["·".join(str(site.shape[d]) for d in dims) for dims in (stack, inputs, outputs)]
    return (f"{lengths[0]} | " if stack else "") + f"{lengths[1]} → {lengths[2]}"


def find_sites(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_named: Callable[[str], bool],
) -> Sites:
    """Traces `apply_fn` on shapes and finds what it does with each leaf of `params`.

    Where Python code of `apply_fn` reads the value of a matrix, only those are traced that
    `is_named`; the others are not listed as sites then.
    """
    shapes = {path: _abstract(x, path) for path, x in leaves_by_path(params)}
    logs = {path: Log() for path, x in shapes.items() if _is_matrix(x)}
    call = functools.partial(_probe_all, apply_fn, params, args, kwargs)
    try:
        call(logs)
    except ValueReadError:
        logs = {path: Log() for path in logs if is_named("/".join(path))}
        call(logs)
    return Sites(tuple(_site(path, x, logs.get(path, Log())) for path, x in shapes.items()))


def _probe_all(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    logs: dict[Path, Log],
) -> None:
    """Writes into `logs` how the leaves at its paths are used."""
    found, structure = leaves_by_path(params), jax.tree.structure(params)
    paths, leaves = [path for path, _ in found], [x for _, x in found]
    traced = [i for i, x in enumerate(leaves) if paths[i] in logs or is_abstract(x)]
    rest, put = take((args, kwargs), is_abstract)

    def call(*values: Any) -> Any:
        args, kwargs = put(values[len(traced) :])
        full = dict(enumerate(leaves)) | dict(zip(traced, values, strict=False))
        return apply_fn(jax.tree.unflatten(structure, list(full.values())), *args, **kwargs)

    specs = [abstract(x) for x in (*(leaves[i] for i in traced), *rest)]
    jaxpr, _ = trace(call, specs, ["/".join(path) for path in logs])

    def probe(*values: Any) -> None:
        operands = list(values)
        for at, i in enumerate(traced):
            if paths[i] in logs:
                operands[at] = _probe(values[at], "/".join(paths[i]), logs[paths[i]])
        for x in evaluate(jaxpr, *operands):
            materialize(x, "the function's outputs")

    jax.eval_shape(probe, *specs)


def _abstract(x: Any, parts: Path) -> jax.ShapeDtypeStruct:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        if not isinstance(x, int | float | complex | bool | np.generic):
            raise TypeError(
                f"`params` must be a pytree of arrays; the leaf {name_of(parts)!r} is {x!r} "
                f"of type {type(x).__name__}."
            )
        x = jnp.asarray(x)
    return abstract(x)


def _is_matrix(x: Any) -> bool:
    return x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)


def _probe(x: Any, path: str, log: Log) -> Weight:
    axes = tuple(frozenset({d}) for d in range(x.ndim))
    return Weight(x, (Probe(log, axes),), path, materialize=True)


def _site(path: Path, x: Any, log: Log) -> Site:
    kinds = {u.kind for u in log.uses}
    kind = next((k for k in ("embed", "conv", "dense") if k in kinds), None)
    # A tied embedding is laid out as its lookup has it: A by rows.
    first = next((u for u in log.uses if u.kind == kind), None)
    layout = first and _layout(first, x.shape)
    if first and not layout:
        log.others.append("a product that leaves it no inputs or no outputs")
    formed = None
    if log.others:
        last = x.ndim - 1
        default = Layout((), tuple(range(last)), (last,))
        formed = next((f for u in log.formed if (f := _layout(u, x.shape))), default)
    others = tuple(dict.fromkeys(log.others))
    return Site(path, x.shape, x.dtype, kind if layout else None, layout, others, formed)


def _layout(use: Use, shape: tuple[int, ...]) -> Layout | None:
    """Axes that are contracted are inputs, those kept are outputs, the others are a stack."""
    inputs = [d for d in range(len(shape)) if d in use.inputs]
    outputs = [d for d in range(len(shape)) if d in use.outputs - use.inputs]
    stack = [d for d in range(len(shape)) if d not in use.inputs | use.outputs]
    # A reshape may lose track of an axis of length 1, which may count as anything.
    for role in (inputs, outputs):
        if not role and (one := next((d for d in stack if shape[d] == 1), None)) is not None:
            stack.remove(one)
            role.append(one)
    return Layout(tuple(stack), tuple(inputs), tuple(outputs)) if inputs and outputs else None
