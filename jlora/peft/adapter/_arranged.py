"""Converts an adapter tree to A and B of PyTorch's parameters, and these to PEFT's tensors."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..._adapters import Replaced, is_node
from ..._tree import adapter_leaves, check_fits
from ..._types import Path, PyTree
from .._file import PREFIX
from ..names._kinds import EXPERTS, LINEAR, ROWS
from ..names._leaves import NamedLeaf, find_tied_heads
from ..names._names import Name
from ..names._torch_layout import (
    join_outputs,
    keep_adapted,
    rescale,
    split_factors,
    split_rows,
    swap,
)
from ..names._weights import split_all
from ._methods import FACTORED
from ._parts import Part, Values, Whole, wholes
from ._roles import make_saves
from ._sorted import BASE
from ._writable import check_adapter, name_leaves


class Tree(NamedTuple):
    """An adapter tree whose leaves have PyTorch's names.

    Attributes:
        leaves: the leaves of the base, in the order in which PEFT wraps them.
        found: the leaves of the adapter by path.
        low: the leaves with A and B; they have only their adapted modules.
        full: the leaves in full.
        rows: the leaves with rows.
        tied: a dict from the module of an embedding to the head that shares its weight.
        is_whole: whether `leaves` are all leaves of the model.
    """

    leaves: list[NamedLeaf]
    found: dict[Path, Any]
    low: list[NamedLeaf]
    full: list[NamedLeaf]
    rows: list[NamedLeaf]
    tied: Mapping[str, str]
    is_whole: bool

    @property
    def modules(self) -> set[str]:
        """All modules of the base."""
        return {module for leaf in self.leaves for module in leaf.modules}

    @property
    def whole(self) -> dict[str, Whole[np.ndarray]]:
        """The parameters in full, and the rows of embeddings, in PyTorch's layout."""
        full = wholes(split_all(leaf._replace(value=self.found[leaf.path]) for leaf in self.full))
        rows = ((leaf.parameters[0], leaf, self.found[leaf.path]) for leaf in self.rows)
        return full | {name: Whole(name, split_rows(leaf, x), x.rows) for name, leaf, x in rows}

    @property
    def parts(self) -> list[Part[np.ndarray]]:
        """A and B of each parameter."""
        pieces = collections.defaultdict[str, list[tuple[NamedLeaf, Part[np.ndarray]]]](list)
        for leaf in self.low:
            x, name, kind = self.found[leaf.path], leaf.name, leaf.kind
            assert kind is not None
            # Where A and B are swapped, PEFT's B·A has PyTorch's axes.
            transposed = name.transposed
            if kind is EXPERTS:
                transposed = False if name.is_swapped else name.is_transposed or None
            scale = x.scale / leaf.factor
            each = split_factors(leaf, x)
            for key, module, (a, b, *m) in zip(leaf.parameters, leaf.modules, each, strict=True):
                own = (a, b, scale, transposed, m[0] if m else None, leaf.experts)
                pieces[key].append((leaf, Part(key, kind, leaf.key(module), *own)))
        return [_swap(own[0][0], _join_parts(own)) for own in pieces.values()]


def arrange(base: PyTree, adapter: PyTree, names: Sequence[Name], for_peft: bool = True) -> Tree:
    """Names the leaves of an adapter tree; raises for those without a form in PyTorch or PEFT."""
    found = adapter_leaves(adapter)
    check_fits(base, found)
    leaves = name_leaves(base, names, for_peft)
    check_adapter(found, leaves, names, for_peft)
    tied = {leaf.modules[0]: head for head, leaf in find_tied_heads(leaves).items()}
    return make_tree(leaves, found, tied)


def make_tree(
    leaves: list[NamedLeaf], found: dict[Path, Any], tied: Mapping[str, str], is_whole: bool = True
) -> Tree:
    """Sorts the leaves by what is `found` at their paths."""
    own = [(leaf, found[leaf.path]) for leaf in leaves if leaf.path in found]
    low = [keep_adapted(leaf, x.layout) for leaf, x in own if isinstance(x, FACTORED)]
    full = [leaf for leaf, x in own if not is_node(x)]
    rows = [leaf for leaf, x in own if isinstance(x, Replaced)]
    return Tree(leaves, found, low, full, rows, tied, is_whole)


def _join_parts(pieces: Sequence[tuple[NamedLeaf, Part[np.ndarray]]]) -> Part[np.ndarray]:
    """Joins the parts of a parameter.

    If all parts have the same A, the result has it once. Otherwise the A's are concatenated, and B
    has zeros outside the outputs of each part.
    """
    leaf, first = pieces[0]
    # Two parts of 3 outputs and rank 2, gate and up: A is [A_gate; A_up], of rank 4, and B, of
    # shape (6, 4), is [[B_gate, 0], [0, B_up]].
    if leaf.name.part is None:
        return first
    (_, count), experts = leaf.name.part, leaf.experts
    own = {other.name.part[0]: part for other, part in pieces if other.name.part}
    a = [x.a.reshape(experts, -1, x.a.shape[1]) for x in own.values()]
    ends = np.cumsum([x.shape[1] for x in a])
    if len(own) == count and all(
        x.scale == first.scale and np.array_equal(x.a, first.a) for x in own.values()
    ):
        ends = [a[0].shape[1]] * count
        a = a[:1]
    scale = next((x.scale for x in own.values() if x.scale), first.scale)
    b = np.zeros((count, len(first.b), ends[-1], experts), first.b.dtype)
    for (j, x), end in zip(own.items(), ends, strict=True):
        factor = x.b.reshape(len(x.b), -1, experts)
        b[j, :, end - factor.shape[1] : end] = rescale(factor, x.scale / scale if scale else 1.0)
    whole = np.concatenate(a, 1).reshape(-1, first.a.shape[1])
    b = join_outputs(b, leaf.name)
    each = [m for j in range(count) if j in own and (m := own[j].m) is not None]
    m = join_outputs(np.stack(each), leaf.name) if each else None
    return first._replace(a=whole, b=b.reshape(len(b), -1), scale=scale, m=m)


def _swap(leaf: NamedLeaf, part: Part[np.ndarray]) -> Part[np.ndarray]:
    """Returns a part with PEFT's A and B, which may be swapped."""
    if not leaf.name.is_swapped:
        return part
    a, b = map(np.ascontiguousarray, swap(part.a, part.b, leaf.experts))
    return part._replace(a=a, b=b)


def make_tensors(
    fields: Mapping[str, Any], own: Values, tied: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Makes the tensors of an adapter, and of heads `tied` to adapted embeddings, by PEFT's keys.

    In PEFT each adapted parameter of a module wraps the parameters before it.
    """
    parts = [*own.parts, *(_make_head(x, tied[x.key]) for x in own.parts if x.key in tied)]
    left = collections.Counter(part.name.rpartition(".")[0] for part in parts)
    adapted = {*left}
    saves = make_saves(fields)
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        module = part.name.rpartition(".")[0]
        left[module] -= 1
        start = f"{PREFIX}{module}{BASE * left[module]}"
        tensors |= {start + end: x for end, x in zip(part.keys, part.arrays, strict=True)}
    for name, x in own.whole.items():
        module, _, parameter = name.rpartition(".")
        is_wrapped = name in own.frozen or (module in adapted and not saves(module))
        tensors[f"{PREFIX}{module}{BASE * is_wrapped}.{parameter}"] = x.x
    [end] = ROWS.keys
    tensors |= {f"{PREFIX}{x.module}{end}": x.x for x in own.tokens.values()}
    # Contiguous, as the safetensors library writes memory in its order.
    return {key: np.asarray(x, order="C") for key, x in tensors.items()}


def _make_head(table: Part[np.ndarray], head: str) -> Part[np.ndarray]:
    """Makes the part of the head that shares the weight of an embedding."""
    a, b = table.b.T, table.a.T
    return table._replace(name=f"{head}.weight", kind=LINEAR, key=head, a=a, b=b)
