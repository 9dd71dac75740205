"""Sites: which leaves the model multiplies with, found by tracing it.

The model is evaluated once, on shapes, by the interpreter of `apply`, with a `Probe` beside each
weight in the place of A and B. So what is found is what `apply` can compute, by construction.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _control, _linear, _moves  # noqa: F401 - they register their rules
from ._interpret import evaluate, materialize, trace
from ._probe import Log, Probe, Use
from ._rules import Full, LoRA, Rule, near, rule_name
from ._tree import abstract, factor_shapes, is_abstract, leaves_by_path, take
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
    stack, inputs, outputs, _ = site.layout
    lengths = ["·".join(str(site.shape[d]) for d in dims) for dims in (stack, inputs, outputs)]
    return (f"{lengths[0]} | " if stack else "") + f"{lengths[1]} → {lengths[2]}"


def find_sites(
    apply_fn: Callable[..., Any], params: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Sites:
    """Traces `apply_fn` on shapes and finds what it does with each leaf of `params`."""
    flat, tree = leaves_by_path(params), jax.tree.structure(params)
    leaves = [_abstract(x, path) for path, x in flat]
    logs = [Log() for _ in leaves]
    rest, put = take((args, kwargs), is_abstract)

    def call(*values: Any) -> Any:
        args, kwargs = put(values[len(leaves) :])
        return apply_fn(jax.tree.unflatten(tree, values[: len(leaves)]), *args, **kwargs)

    jaxpr, _ = trace(call, *leaves, *rest)

    def probe(*values: Any) -> None:
        operands = [
            Weight(x, (_probe(x, log),), "/".join(path), materialize=True) if _is_matrix(x) else x
            for x, log, (path, _) in zip(values, logs, flat, strict=False)
        ]
        outs = evaluate(jaxpr, *operands, *values[len(leaves) :])
        for x in outs:
            materialize(x, "the function's outputs")

    jax.eval_shape(probe, *leaves, *rest)
    return Sites(
        tuple(_site(path, x, log) for (path, _), x, log in zip(flat, leaves, logs, strict=True))
    )


def _abstract(x: Any, parts: Path) -> jax.ShapeDtypeStruct:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        if not isinstance(x, int | float | complex | bool | np.generic):
            raise TypeError(
                f"`params` must be a pytree of arrays; the leaf {'/'.join(parts)!r} is {x!r} "
                f"of type {type(x).__name__}."
            )
        x = jnp.asarray(x)
    return abstract(x)


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
