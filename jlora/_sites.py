"""Records how the model uses each leaf, and the table of all sites."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ._compat import current_scope
from ._core import REPEATED, Axis, ProductAxes, Weight
from ._quantized import spell
from ._rules import near_misses, rule_name
from ._site import Site, Unsupported
from ._text import align_columns, fold_numbers

LONG = 32  # characters of a rule that several rows do not repeat


class ProductUse(NamedTuple):
    """One product with a leaf, in the leaf's own axes.

    Attributes:
        kind: `"dense"`, `"conv"` or `"embed"`.
        inputs: the axes that are contracted, or looked up.
        outputs: the axes that are kept; none if the leaf was sliced to a vector.
        batch: the axes that are batched with the activation.
    """

    kind: str
    inputs: frozenset[int]
    outputs: frozenset[int]
    batch: frozenset[int] = frozenset()


class Uses:
    """Records the uses of each leaf, by path, in program order."""

    def __init__(self) -> None:
        """Starts without uses."""
        self.products: dict[str, list[ProductUse]] = defaultdict(list)
        self.unsupported: dict[str, list[Unsupported]] = defaultdict(list)
        self.scopes: dict[str, set[str]] = defaultdict(set)

    def product(self, w: Weight, kind: str, roles: ProductAxes) -> None:
        """Records a product in which the axes of the weight `w` have `roles`."""
        lengths = w.lengths
        long = [a for a in (*roles.inputs, *roles.outputs) if lengths[a] > 1]
        if any(REPEATED in a.leaf for a in long):
            self.no_product(w, "a product in which it is repeated, as an activation is")
            return
        vector = not roles.outputs and all(lengths[a] == 1 for a in roles.stack)
        if not roles.inputs or not (roles.outputs or vector):
            self.no_product(w, "a product that is not a matrix product")
            return
        for path in w.origin.paths:
            batch, inputs, outputs = (_of(path, axes) for axes in roles)
            picked = frozenset(d for p, d in w.picked if p == path)
            if inputs - picked and (vector or outputs - picked):  # one of a stack was looked up
                inputs, outputs = inputs - picked, outputs - picked
            self._add(path, ProductUse(kind, inputs, outputs, batch))

    def no_product(self, w: Weight, reason: str, added: bool = False) -> None:
        """Records a use of the weight `w` that is not a product; a looked-up row counts as one."""
        for path in w.origin.paths:
            axes = tuple(_of(path, [a]) for a, n in zip(w.axes, w.shape, strict=True) if n > 1)
            # Along these axes of the leaf rows were looked up, as of an embedding.
            picked = frozenset(d for p, d in w.picked if p == path)
            if picked:
                rest = frozenset().union(*axes) - picked
                self._add(path, ProductUse("embed", picked, rest))
            else:
                self.unsupported[path].append(Unsupported(reason, axes, added))

    def _add(self, path: str, use: ProductUse) -> None:
        self.products[path].append(use)
        self.scopes[path].add(current_scope())


def _of(path: str, axes: Iterable[Axis]) -> frozenset[int]:
    """Finds the axes of the leaf at `path` within `axes`."""
    return frozenset(d for a in axes for p, d in a.leaf if p == path)


@dataclasses.dataclass(frozen=True)
class Sites:
    """The sites of a model: the weights that can be adapted. Iteration yields each `Site`.

    `sites[path]` is the leaf at a path, a site or not; a path that is none raises `KeyError`.

    `print` shows a table, in which three or more equal layers share a row: it reads
    `layer_0…11/query/kernel` with the shape `12 × 768×768` and the parameters of all twelve. Below
    it, by their numbers, are long rules, and notes that say why weights are not sites.

    Attributes:
        leaves: every parameter leaf in tree order, also those that are not sites.
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
        raise KeyError(f"no leaf {path!r}. {near_misses(path, [s.path for s in self.leaves])}")

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
        """Matrices without a rule that the model uses only where they have no factored form."""
        return [s for s in self.leaves if s.is_missed]

    def table(self) -> str:
        """Returns the table without folding equal layers."""
        return self._table(fold=False)

    def __str__(self) -> str:
        return self._table(fold=True)

    def _table(self, fold: bool) -> str:
        shown = [s for s in self.leaves if s.is_listed or s.rule is not None]
        columns = dict(_COLUMNS)
        if all(s.scheme is None for s in shown):
            del columns["scheme"]
        names = list(map(_rule, shown))
        long = [x for x in dict.fromkeys(names) if len(x) > LONG and names.count(x) > 1]
        columns["rule"] = lambda s, n: f"rule {long.index(x) + 1}" if (x := _rule(s)) in long else x
        reasons = list(dict.fromkeys(filter(None, map(_reason, shown))))
        if reasons:
            columns["note"] = lambda s, n: str(reasons.index(r) + 1) if (r := _reason(s)) else "-"
        paths = [s.path or "(root)" for s in shown]
        cells = [tuple(cell(s, 1) for cell in columns.values()) for s in shown]
        folded = fold_numbers(paths, cells) if fold else [(p, [n]) for n, p in enumerate(paths)]
        rows = [
            (path, *(cell(shown[ns[0]], len(ns)) for cell in columns.values()))
            for path, ns in folded
        ]
        numbers = {"parameters", "rank", "trainable", "note"}
        lines = align_columns(("path", *columns), rows, numbers)
        line = "─" * max(map(len, lines))
        share = 100 * self.trainable / max(self.total, 1)
        adapted = sum(s.is_adapted for s in self.leaves)
        total = (
            f"{adapted} of {len(self)} sites adapted; "
            f"{self.trainable:,} of {self.total:,} parameters trainable ({share:.3g}%)"
        )
        if self.missed:
            total += f"; {len(self.missed)} more weights have no factored form"
        rules = [f"rule {i}: {name}" for i, name in enumerate(long, 1)]
        notes = [f"note {i}: {reason}" for i, reason in enumerate(reasons, 1)]
        return "\n".join([lines[0], line, *lines[1:], line, total, *rules, *notes])


def _reason(site: Site) -> str:
    """Says why a leaf is not a site; "" if it is one."""
    no_site = site.kind is None and site.rule is None and site.unsupported_uses
    return f"used in {site.unsupported_uses[0]}" if no_site else ""


def _shape(site: Site, n: int) -> str:
    shape = "×".join(map(str, site.shape)) or "scalar"
    return f"{n} × {shape}" if n > 1 else shape


def _rule(site: Site) -> str:
    return "-" if site.rule is None else rule_name(site.rule)


def _rank(site: Site) -> str:
    rank = "-" if site.rule is None else site.rule.sizes(site.layout).get("rank", "-")
    return f"{rank} (of {site.asked_rank})" if site.asked_rank else str(rank)


def _axes(site: Site) -> str:
    """Returns `stack | inputs → outputs`, as lengths."""
    if site.kind is None:
        return "-"
    stack, inputs, outputs, _ = site.layout
    lengths = ["·".join(str(site.shape[d]) for d in dims) for dims in (stack, inputs, outputs)]
    return (f"{lengths[0]} | " if stack else "") + f"{lengths[1]} → {lengths[2]}"


_COLUMNS = {  # functions of a site and of the number of equal sites in its row
    "shape": _shape,
    "kind": lambda s, n: s.kind or "-",
    "axes": lambda s, n: _axes(s),
    "parameters": lambda s, n: f"{n * s.size:,}",
    "rule": lambda s, n: _rule(s),
    "rank": lambda s, n: _rank(s),
    "trainable": lambda s, n: "-" if s.rule is None else f"{n * s.trainable:,}",
    "scheme": lambda s, n: "-" if s.scheme is None else spell(s.scheme),
}
