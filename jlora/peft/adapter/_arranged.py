"""Converts an adapter tree to A and B of PyTorch's parameters, and these to PEFT's tensors."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._adapters import (
    AdapterLeaf,
    Decomposed,
    LowRank,
    Node,
    Replaced,
    is_node,
    state,
    weight_shape,
)
from ..._errors import InputError, Problem
from ..._tree import adapter_leaves, check_fits, name_of
from ..._types import Path, PyTree
from .._file import DTYPES, PREFIX
from ..names._advice import advise
from ..names._kinds import EMBEDDING, EXPERTS, LINEAR, LONE_ROWS, ROWS
from ..names._leaves import NamedLeaf, find_tied_heads, path_in_names, resolve, sort_by_row
from ..names._names import Name
from ..names._torch_layout import (
    join_outputs,
    keep_adapted,
    rescale,
    split_factors,
    split_rows,
    swap,
)
from ._config import ROWS_ALONE
from ._parts import MAGNITUDE, Part, Tokens, Values
from ._roles import make_saves
from ._sorted import BASE

_FACTORED = (LowRank, Decomposed)


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
    def tokens(self) -> dict[str, Tokens[np.ndarray]]:
        """The rows of embeddings in PyTorch's layout, by parameter."""
        each = ((leaf, self.found[leaf.path]) for leaf in self.rows)
        found = (Tokens(leaf.modules[0], x.rows, split_rows(leaf, x)) for leaf, x in each)
        return {f"{x.module}.weight": x for x in found}

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


def arrange(base: PyTree, adapter: PyTree, names: Sequence[Name]) -> Tree:
    """Names the leaves of an adapter tree; raises for leaves that PEFT cannot represent."""
    found = adapter_leaves(adapter)
    check_fits(base, found)
    leaves = sort_by_row(resolve(base, names), names)
    _check_writable(found, {leaf.path: leaf for leaf in leaves}, names)
    tied = {leaf.modules[0]: head for head, leaf in find_tied_heads(leaves).items()}
    return make_tree(leaves, found, tied)


def make_tree(
    leaves: list[NamedLeaf], found: dict[Path, Any], tied: Mapping[str, str], is_whole: bool = True
) -> Tree:
    """Sorts the leaves by what is `found` at their paths."""
    own = [(leaf, found[leaf.path]) for leaf in leaves if leaf.path in found]
    low = [keep_adapted(leaf, x) for leaf, x in own if isinstance(x, _FACTORED)]
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
        ends = (*part.kind.keys, MAGNITUDE)
        tensors |= {start + end: x for end, x in zip(ends, part.arrays, strict=False)}
    for name, x in {**own.full, **own.frozen}.items():
        module, _, parameter = name.rpartition(".")
        is_wrapped = name in own.frozen or (module in adapted and not saves(module))
        tensors[f"{PREFIX}{module}{BASE * is_wrapped}.{parameter}"] = x
    [end] = (LONE_ROWS if fields["peft_type"] == ROWS_ALONE else ROWS).keys
    tensors |= {f"{PREFIX}{x.module}{end}": x.v for x in own.tokens.values()}
    # Contiguous, as the safetensors library writes memory in its order.
    return {key: np.asarray(x, order="C") for key, x in tensors.items()}


def _make_head(table: Part[np.ndarray], head: str) -> Part[np.ndarray]:
    """Makes the part of the head that shares the weight of an embedding."""
    a, b = table.b.T, table.a.T
    return table._replace(name=f"{head}.weight", kind=LINEAR, key=head, a=a, b=b)


# --------------------------------------------------------------------------------- what is refused


def _check_writable(
    found: dict[Path, Any], leaves: dict[Path, NamedLeaf], names: Sequence[Name]
) -> None:
    """Raises for leaves that cannot be written, and names all of them."""
    residual = [name_of(path) for path, x in found.items() if is_node(x) and x.residual]
    if residual:
        raise InputError(
            "adapter",
            "needs the base that an initializer changed, which PEFT and engines do not "
            f"have, at {', '.join(residual)}.",
            remedy="Give jlora.arithmetic.difference(adapter, initial), where `initial` is the "
            "adapter from init, or merge the adapter into its base. If you publish the changed "
            "base, mark the nodes: node.replace(residual=False).",
        )
    wrong = {path: why for path, x in found.items() if (why := _why_unwritable(path, x, leaves))}
    wrong |= {path: why for path, why in _find_lone_parts(found, leaves) if path not in wrong}
    unnamed = {path: x for path, x in found.items() if path not in leaves}
    lost = {path: weight_shape(x) if is_node(x) else x.shape for path, x in unnamed.items()}
    if wrong:
        raise InputError(
            "adapter",
            "cannot be written with `names`.",
            problems=[Problem(name_of(path), why) for path, why in wrong.items()],
            remedy=advise(names, lost) if lost else "",
        )


def _why_unwritable(path: Path, x: AdapterLeaf, leaves: Mapping[Path, NamedLeaf]) -> str | None:
    if (leaf := leaves.get(path)) is None:
        count = len(weight_shape(x) if isinstance(x, Node) else x.shape)
        axes = "1 axis" if count == 1 else f"{count} axes"
        return f"no row of `names` fits {path_in_names(path)!r} with {axes}"
    if is_node(x) and not isinstance(x, (*_FACTORED, Replaced)):
        return f"PEFT has no form for a {type(x).__name__}"
    arrays: list[Any] = list(state(x).values()) if is_node(x) else [x]
    if empty := [array.shape for array in arrays if 0 in array.shape]:
        return f"has an array without values, of shape {empty[0]}"
    if odd := next(filter(None, map(explain_unstored, arrays)), None):
        return odd
    if any(not np.isfinite(np.asarray(y)).all() for y in arrays):
        return "has values that are not finite"
    if not is_node(x):
        return "is in full, but is only a part of PyTorch's parameter" if leaf.name.part else None
    if leaf.name.kind is None:
        return f"is adapted, but is not a matrix under `names`, with axes {leaf.name.axes!r}"
    ours, wanted = x.layout, leaf.name.layout
    if isinstance(x, Replaced):
        is_one = leaf.kind is EMBEDDING and ours == wanted
        return None if is_one else "has rows, but is not an embedding under `names`"
    if not (set(wanted.inputs) <= set(ours.inputs) and set(wanted.outputs) <= set(ours.outputs)):
        return f"expected {wanted} by `names`, got {ours}"
    return _why_no_magnitudes(x, leaf) if isinstance(x, Decomposed) else None


def explain_unstored(x: Any, dtypes: Mapping[str, np.dtype] = DTYPES) -> str | None:
    """Explains why an array cannot be stored as one of the `dtypes`, if it cannot."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return "expected arrays, got jax.ShapeDtypeStruct"
    known = x.dtype in dtypes.values()
    return None if known else f"expected a dtype of {', '.join(dtypes)}, got {x.dtype}"


def _why_no_magnitudes(x: Decomposed, leaf: NamedLeaf) -> str | None:
    """Explains why PEFT cannot represent magnitudes, if it cannot."""
    if leaf.is_bare:
        return "is DoRA, but PEFT has only LoRA for bare parameters, such as those of experts"
    if set(x.layout.inputs) != set(leaf.name.layout.inputs):
        return f"has norms over axes {x.layout.inputs}, PEFT over {leaf.name.layout.inputs}"
    if not np.asarray(x.m).any():
        return "has magnitudes that are all 0"
    slots = x.layout.slots
    if slots is not None and len(slots[1]) < slots[0] and keep_adapted(leaf, x) is leaf:
        return f"has magnitudes for slots {slots[1]} only, PEFT for all {slots[0]}"
    return None


def _find_lone_parts(
    found: Mapping[Path, Any], leaves: Mapping[Path, NamedLeaf]
) -> Iterator[tuple[Path, str]]:
    """Finds parts with magnitudes whose parameter has other parts without."""
    parts = {p: leaves[p] for p, x in found.items() if isinstance(x, Decomposed) and p in leaves}
    parts = {path: leaf for path, leaf in parts.items() if leaf.name.part}
    there = collections.Counter(leaf.parameters[0] for leaf in parts.values())
    for path, leaf in parts.items():
        name = leaf.parameters[0]
        _, n = leaf.name.part or (0, 1)
        if there[name] < n:
            yield path, f"is DoRA, but only {there[name]} of the {n} parts of {name} are"


def check_one_method(tree: Tree) -> None:
    """Raises if sites have different methods, as PEFT has one for all."""
    paths = {
        kind: [name_of(leaf.path) for leaf in tree.low if isinstance(tree.found[leaf.path], kind)]
        for kind in _FACTORED
    }
    if all(paths.values()):
        why = "some sites and LoRA at others, but PEFT has one method for all (`use_dora`)"
        _refuse_dora(why, [Problem(kind.__name__, ", ".join(x)) for kind, x in paths.items()])
    heads = [
        Problem(name_of(leaf.path), tree.tied[leaf.modules[0]])
        for leaf in tree.low
        if name_of(leaf.path) in paths[Decomposed] and leaf.modules[0] in tree.tied
    ]
    if heads:
        why = "an embedding that the head shares, but PEFT normalizes the two separately"
        _refuse_dora(why, heads)


def _refuse_dora(where: str, listed: Sequence[Problem]) -> None:
    remedy = "Merge it into the model: jlora.peft.export_merged, or jlora merge."
    raise InputError("adapter", f"has DoRA at {where}.", problems=listed, remedy=remedy)
