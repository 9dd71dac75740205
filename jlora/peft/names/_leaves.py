"""The leaves of a JAX tree with their rows of a name table."""

import collections
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..._adapters import is_node
from ..._errors import Problem, shorten, stop
from ..._tree import leaves_by_path, name_of
from ..._types import Layout, Path, PyTree
from ._kinds import EXPERTS, LINEAR, Kind, find_kind
from ._names import Name, fill_indices, multiply_lengths
from ._peft import load_module_rules


class NamedLeaf(NamedTuple):
    """A leaf of the base with its name.

    Attributes:
        path: its path.
        value: the leaf.
        shape: its shape.
        name: the row that names it.
        modules: PyTorch's module for each index along the axes `l` and `s`, in C order.
        slots: the indices of `modules` in the row's tuple; None for all.
        by_parameter: whether PEFT finds the weight by its own name alone, as that of the module is
            one that PEFT takes for a part of experts.
    """

    path: Path
    value: Any
    shape: tuple[int, ...]
    name: Name
    modules: tuple[str, ...]
    slots: tuple[int, ...] | None = None
    by_parameter: bool = False

    def with_slots(self, slots: tuple[int, ...]) -> "NamedLeaf":
        """Returns the leaf with only some modules of its tuple."""
        [axis] = self.name.where("s")
        return self.take(axis, slots)._replace(slots=slots)

    def take(self, axis: int, indices: tuple[int, ...]) -> "NamedLeaf":
        """Returns the leaf with only some modules along an axis of them."""
        stacked = self.name.where("ls")
        every = np.arange(len(self.modules)).reshape([self.shape[d] for d in stacked])
        modules = tuple(self.modules[i] for i in every.take(indices, stacked.index(axis)).flat)
        shape = (*self.shape[:axis], len(indices), *self.shape[axis + 1 :])
        return self._replace(shape=shape, modules=modules)

    @property
    def layout(self) -> Layout:
        """The layout of a `LowRank` node for these modules."""
        layout = self.name.layout
        if layout.slots is None or self.slots is None:
            return layout
        count, _, axis = layout.slots
        return layout._replace(slots=(count, self.slots, axis))

    @property
    def kind(self) -> Kind | None:
        """The kind of the weight; None for a parameter that is no matrix."""
        return find_kind(self.name.axes)

    @property
    def parameters(self) -> list[str]:
        """PyTorch's parameters, in the order of `modules`."""
        return [f"{module}.{self.name.parameter}".removeprefix(".") for module in self.modules]

    @property
    def is_bare(self) -> bool:
        """Whether PEFT selects the parameter by its own name: one of experts, or no `weight`."""
        is_own = self.kind is EXPERTS or self.name.parameter != "weight"
        return is_own or self.by_parameter

    def key(self, module: str) -> str:
        """Returns the name by which PEFT selects the parameter: its own, or the module's."""
        return f"{module}.{self.name.parameter}".removeprefix(".") if self.is_bare else module

    @property
    def factor(self) -> float:
        """The factor from PyTorch's parameter to the leaf."""
        return 1.0 if self.name.times is None else self.name.times(self.shape)

    @property
    def experts(self) -> int:
        """The number of experts in a parameter."""
        return math.prod(self.shape[d] for d in self.name.where("e"))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of one module's parameter in PyTorch."""
        sizes: dict[int | str, int] = dict(enumerate(self.shape))
        if self.name.part is not None:
            sizes[self.name.where("o")[0]] *= self.name.part[1]
        return multiply_lengths(self.name.weight_groups, sizes)


def own_leaf(name: str, axes: str, shape: tuple[int, ...]) -> NamedLeaf:
    """Makes the leaf that is PyTorch's parameter `name` itself, with its axes."""
    module, _, parameter = name.rpartition(".")
    return NamedLeaf((name,), None, shape, _own_row(axes, parameter), (module,))


@functools.cache
def _own_row(axes: str, parameter: str) -> Name:
    return Name("", "", axes, parameter)


def find_leaves(base: PyTree, names: Sequence[Name]) -> list[NamedLeaf]:
    """Finds the leaves of `base` that `names` has rows for, in tree order.

    Raises:
        TypeError: if `names` is not a table.
        ValueError: if two leaves have the same name.
    """
    rows = list(names) if isinstance(names, Iterable) else []
    if not rows or not all(isinstance(row, Name) for row in rows):
        raise TypeError(
            "`names` must be a table of jlora.peft.Name rows, such as jlora.peft.TABLES['llama']; "
            f"got {shorten(names)}."
        )
    found = (_leaf(path, x, rows) for path, x in leaves_by_path(base, is_node))
    leaves = [leaf for leaf in found if leaf is not None]
    owners = collections.defaultdict[str, list[NamedLeaf]](list)
    for leaf in leaves:
        for parameter in leaf.parameters:
            owners[parameter].append(leaf)
    twice = [
        Problem(name, ", ".join(name_of(leaf.path) for leaf in own))
        for name, own in owners.items()
        if len(own) > 1 and not _are_parts(own)
    ]
    has_biases = any(leaf.path[-1] == "bias" for name in twice for leaf in owners[name.where])
    of_biases = " A row for biases needs parameter='bias'; 'weight' is the default." * has_biases
    remedy = f"Narrow its patterns.{of_biases}"
    stop(twice, "names", "gives leaves the same name.", remedy)
    return leaves


def _are_parts(leaves: Sequence[NamedLeaf]) -> bool:
    """Whether leaves are different parts of one parameter."""
    parts = [leaf.name.part for leaf in leaves]
    return None not in parts and len(set(parts)) == len(parts)


ONE_EXPERT = re.compile(r"\bexperts\.\d+\.")


def select_by_parameter(leaves: Sequence[NamedLeaf]) -> list[NamedLeaf]:
    """Marks the leaves whose weights PEFT may adapt only if `target_parameters` names them.

    These are linear modules beside experts, with names that PEFT takes for those of experts.
    """

    def is_one_expert(leaf: NamedLeaf) -> bool:
        return bool(ONE_EXPERT.search(leaf.modules[0]))

    def is_confused(leaf: NamedLeaf) -> bool:
        is_plain = leaf.kind is LINEAR and not (leaf.name.transposed or is_one_expert(leaf))
        return is_plain and leaf.modules[0].rpartition(".")[2] in confused

    confused = {name for answer in load_module_rules().values() for name in answer.modules}
    if not any(leaf.kind is EXPERTS or is_one_expert(leaf) for leaf in leaves):
        return [*leaves]
    return [leaf._replace(by_parameter=is_confused(leaf)) for leaf in leaves]


def path_in_names(path: Path) -> str:
    """Returns a path in the form that rows match."""
    return "/".join(path).removeprefix("params/")


def _leaf(path: Path, x: object, rows: Sequence[Name]) -> NamedLeaf | None:
    shape = tuple(getattr(x, "shape", ()))
    if (found := row_of(path, shape, rows)) is None:
        return None
    row, matched = found
    templates = [matched.expand(module).replace("/", ".") for module in row.modules]
    return NamedLeaf(path, x, shape, row, tuple(_modules(row, shape, templates)))


def row_of(
    path: Path, shape: tuple[int, ...], rows: Sequence[Name]
) -> tuple[Name, re.Match[str]] | None:
    """Finds the row that names a leaf, with the match of its pattern."""
    for row in rows:
        if len(row.axes) != len(shape) or any(shape[d] != len(row.modules) for d in row.where("s")):
            continue
        if matched := re.fullmatch(row.path, path_in_names(path)):
            return row, matched
    return None


def _modules(row: Name, shape: tuple[int, ...], templates: Sequence[str]) -> Iterator[str]:
    stacked = row.where("ls")
    for at in itertools.product(*(range(shape[d]) for d in stacked)):
        slot = next((n for n, d in zip(at, stacked, strict=True) if row.axes[d] == "s"), 0)
        index = [n for n, d in zip(at, stacked, strict=True) if row.axes[d] == "l"]
        yield fill_indices(templates[slot], index)


def sort_by_row(leaves: Sequence[NamedLeaf], names: Sequence[Name]) -> list[NamedLeaf]:
    """Sorts leaves by their rows, which is the order in which PEFT wraps parameters."""
    order = {name: i for i, name in reversed(list(enumerate(names)))}
    return sorted(leaves, key=lambda leaf: order[leaf.name])


def find_tied_heads(leaves: Sequence[NamedLeaf]) -> dict[str, NamedLeaf]:
    """Maps each tied head to the embedding in this tree whose weight it shares."""
    parameters = {name for leaf in leaves for name in leaf.parameters}

    def is_tied(head: str) -> bool:
        parent, dot, _ = head.rpartition(".")
        has_parent = not dot or any(name.startswith(parent) for name in parameters)
        return f"{head}.weight" not in parameters and has_parent

    return {head: leaf for leaf in leaves if (head := leaf.name.tied) and is_tied(head)}
