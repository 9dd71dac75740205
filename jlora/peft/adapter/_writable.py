"""What PEFT's files cannot hold: by how leaves are trained, which `sites` knows, and by values."""

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
from ..._errors import InputError, Problem, stop
from ..._tree import name_of
from ..._types import Layout, Path, PyTree
from .._file import DTYPES
from ..names._advice import advise
from ..names._kinds import EMBEDDING
from ..names._leaves import (
    NamedLeaf,
    find_leaves,
    find_tied_heads,
    path_in_names,
    select_by_parameter,
    sort_by_row,
)
from ..names._names import Name
from ..names._torch_layout import keep_adapted
from ._methods import FACTORED

MERGE = "or merge what is trained: jlora.merge, and jlora.peft.save_base."
LEAVE_OUT = f"Leave these leaves out of the rules, {MERGE}"


class Use(NamedTuple):
    """How a leaf is trained.

    Attributes:
        node: the class of its node; None if it is trained in full.
        layout: the layout of the node.
        shape: the shape of the leaf.
    """

    node: type[Node] | None
    layout: Layout
    shape: tuple[int, ...]


def name_leaves(base: PyTree, names: Sequence[Name], for_peft: bool) -> list[NamedLeaf]:
    """Finds the leaves that `names` has rows for, in the order in which PEFT wraps them."""
    leaves = sort_by_row(find_leaves(base, names), names)
    return select_by_parameter(leaves) if for_peft else leaves


def check_adapter(
    found: Mapping[Path, Any], leaves: Sequence[NamedLeaf], names: Sequence[Name], for_peft: bool
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
    problems = list_unheld({p: _use(x) for p, x in found.items()}, leaves, names, for_peft)
    known = {problem.where for problem in problems}
    each = ((name_of(path), x) for path, x in found.items())
    problems += [Problem(n, why) for n, x in each if n not in known and (why := _explain_values(x))]
    stop(problems, "adapter", "cannot be written with `names`.")


def _use(x: AdapterLeaf) -> Use:
    if isinstance(x, Node):
        return Use(type(x), x.layout, weight_shape(x))
    return Use(None, Layout((), (), ()), x.shape)


# ------------------------------------------------------------------- how the leaves are trained


def list_unheld(
    uses: Mapping[Path, Use],
    leaves: Sequence[NamedLeaf],
    names: Sequence[Name],
    for_peft: bool = True,
) -> list[Problem]:
    """Lists the trained leaves without a form in PyTorch or, `for_peft`, in PEFT's files."""
    own = {leaf.path: leaf for leaf in leaves}
    lost = {path: use.shape for path, use in uses.items() if path not in own}
    advice = advise(names, lost) if lost else ""
    trained = [(use, own[path]) for path, use in uses.items() if path in own]
    found = [Problem(name_of(path), _explain_lost(path, x), advice) for path, x in lost.items()]
    each = ((leaf, _explain_no_form(use, leaf, for_peft)) for use, leaf in trained)
    found += [Problem(name_of(leaf.path), *why) for leaf, why in each if why]
    found += _list_lone_parts(trained)
    if for_peft:
        found += _list_mixed(trained, find_tied_heads(leaves))
    first = dict[str, Problem]()
    for problem in found:
        first.setdefault(problem.where, problem)
    return [*first.values()]


def _explain_lost(path: Path, shape: tuple[int, ...]) -> str:
    axes = "1 axis" if len(shape) == 1 else f"{len(shape)} axes"
    return f"no row of `names` fits {path_in_names(path)!r} with {axes}"


def _explain_no_form(use: Use, leaf: NamedLeaf, for_peft: bool) -> tuple[str, ...]:
    """Explains why a leaf has no form, and what to do; empty if it has one."""
    ours, name, wanted = use.layout, leaf.name, leaf.name.layout
    if use.node is None:
        return ("is in full, but is only a part of PyTorch's parameter",) if name.part else ()
    if not issubclass(use.node, (*FACTORED, Replaced)):
        return f"PEFT has no form for a {use.node.__name__}", LEAVE_OUT
    if name.refused and (for_peft or leaf.kind is None):
        pattern = "jlora.torch.all_linear(apply, sites) is a pattern of what PEFT adapts."
        return f"PEFT has no form for an adapter of it: {name.refused}", f"{LEAVE_OUT} {pattern}"
    if leaf.kind is None:
        why = f"`names` has {leaf.parameters[0]} as a parameter without inputs (axes {name.axes!r})"
        return f"PEFT has no form for an adapter of it: {why}", LEAVE_OUT
    if issubclass(use.node, Replaced):
        is_one = leaf.kind is EMBEDDING and ours == wanted
        return () if is_one else ("has rows, but is not an embedding under `names`",)
    if not (set(wanted.inputs) <= set(ours.inputs) and set(wanted.outputs) <= set(ours.outputs)):
        return (f"expected {wanted} by `names`, got {ours}",)
    why = _explain_no_magnitudes(ours, leaf) if issubclass(use.node, Decomposed) else None
    return (why,) if why else ()


def _explain_no_magnitudes(ours: Layout, leaf: NamedLeaf) -> str | None:
    """Explains why PEFT cannot represent magnitudes, if it cannot."""
    if leaf.by_parameter:
        return "is DoRA, but PEFT takes its name for that of experts, for which it has only LoRA"
    if leaf.is_bare:
        return "is DoRA, but PEFT has only LoRA for bare parameters, such as those of experts"
    if set(ours.inputs) != set(leaf.name.layout.inputs):
        return f"has norms over axes {ours.inputs}, PEFT over {leaf.name.layout.inputs}"
    slots = ours.slots
    if slots is not None and len(slots[1]) < slots[0] and keep_adapted(leaf, ours) is leaf:
        return f"has magnitudes for slots {slots[1]} only, PEFT for all {slots[0]}"
    return None


def _list_lone_parts(trained: Sequence[tuple[Use, NamedLeaf]]) -> Iterator[Problem]:
    """Lists parts with magnitudes whose parameter has other parts without."""
    parts = [leaf for use, leaf in trained if use.node is Decomposed and leaf.name.part]
    there = collections.Counter(leaf.parameters[0] for leaf in parts)
    for leaf in parts:
        name = leaf.parameters[0]
        _, n = leaf.name.part or (0, 1)
        if there[name] < n:
            why = f"is DoRA, but only {there[name]} of the {n} parts of {name} are"
            yield Problem(name_of(leaf.path), why)


def _list_mixed(
    trained: Sequence[tuple[Use, NamedLeaf]], heads: Mapping[str, NamedLeaf]
) -> Iterator[Problem]:
    """Lists DoRA beside LoRA, as PEFT has one method for all sites, and DoRA of what is tied."""
    dora = [leaf for use, leaf in trained if use.node is Decomposed]
    other = next((leaf for use, leaf in trained if use.node is LowRank), None)
    tied = {leaf.path: head for head, leaf in heads.items()}
    for leaf in dora:
        if leaf.path in tied:
            why = (
                f"is DoRA, but {tied[leaf.path]} shares it, and PEFT normalizes the two separately"
            )
            yield Problem(name_of(leaf.path), why, LEAVE_OUT)
        elif other:
            why = f"is DoRA and {name_of(other.path)} is LoRA, but PEFT has one `use_dora` for all"
            yield Problem(name_of(leaf.path), why, f"Choose one of the two, {MERGE}")


# ---------------------------------------------------------------------------------- the values


def _explain_values(x: AdapterLeaf) -> str | None:
    """Explains why the values of a trained leaf cannot be stored, if they cannot."""
    arrays: list[Any] = list(state(x).values()) if is_node(x) else [x]
    if empty := [array.shape for array in arrays if 0 in array.shape]:
        return f"has an array without values, of shape {empty[0]}"
    if odd := next(filter(None, map(explain_unstored, arrays)), None):
        return odd
    if any(not np.isfinite(np.asarray(y)).all() for y in arrays):
        return "has values that are not finite"
    is_zero = isinstance(x, Decomposed) and not np.asarray(x.m).any()
    return "has magnitudes that are all 0" if is_zero else None


def explain_unstored(x: Any, dtypes: Mapping[str, np.dtype] = DTYPES) -> str | None:
    """Explains why an array cannot be stored as one of the `dtypes`, if it cannot."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return "expected arrays, got jax.ShapeDtypeStruct"
    known = x.dtype in dtypes.values()
    return None if known else f"expected a dtype of {', '.join(dtypes)}, got {x.dtype}"
