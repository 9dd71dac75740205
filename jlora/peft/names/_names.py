"""What a leaf of a JAX tree is called in PyTorch, and how its axes lie there."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..._adapters import is_node
from ..._tree import leaves_by_path, name_of
from ..._types import Layout, Path, PyTree

RANK = -1  # stands for the rank beside the numbers of a weight's axes
Groups = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Name:
    r"""One row of a name table: the leaves at `path` are `module`'s `parameter` in PyTorch.

    The first row of a table whose `path` and number of axes fit a leaf names it.

    Attributes:
        path: a regular expression for the whole `/`-joined path, a leading `params/` left out.
        module: PyTorch's module. `\1` stands for a group of `path`, in which `/` becomes `.`, and
            each `{}` for the index along a stacked axis. A tuple for a leaf that holds several.
        axes: a letter for each axis of the leaf. `i`: inputs; `o`: outputs; `v`: rows that are
            looked up, of an embedding; `k`: an axis of a convolution's window; `l`: stacked, one
            module for each index; `e`: experts of one PyTorch parameter; `s`: the outputs of the
            modules of a tuple, one for each index, such as k and v (2, heads, d, head_dim): `soio`.
            Several `i` or `o` are flattened in order, as the kernels of `DenseGeneral`
            (d, heads, head_dim) are: `ioo`.
        parameter: the name of the parameter in the module.
        transposed: whether PyTorch keeps the weight as (inputs, outputs), as GPT-2's `Conv1D`
            does. Of experts: whether PEFT's A belongs to the outputs, as it does where a module
            keeps (experts, inputs, outputs) and has no `is_transposed`.
        tied: the module that shares an embedding as its weight. It counts as tied where no other
            leaf of the tree is that weight and the module that holds it is there.
        part: (j, n) for what is the j-th of n equal parts of the parameter's outputs, as gate and
            up are of the experts' `gate_up_proj`. PEFT has one A for all of them: it is loaded for
            each, and written once if it is still the same; else their ranks add up. Such a row is
            for adapters, not for checkpoints.
        interleaved: whether the last `o` has in pairs what PyTorch has in two halves, one after the
            other, as the queries and keys of some rotary positions do.
        times: the number that PyTorch's parameter is multiplied with here, from the leaf's shape.
            The scale of an adapter's ΔW is multiplied with it, A and B are not.

    Each module of a tuple has an A and a B of its own, as by `LoRA(..., slots=Slots(2, (0, 1)))`.

    Raises:
        ValueError: if the fields contradict each other.

    Examples:
        >>> from jlora import peft
        >>> peft.Name(r"blocks/(\w+)/kernel", r"model.layers.{}.\1_proj", "lio").kind
        'linear'
        >>> peft.Name(r"attn/kv/w", ("attn.k_proj", "attn.v_proj"), "soio").layout.slots
        (2, (0, 1), 0)
    """

    path: str
    module: str | tuple[str, ...]
    axes: str
    parameter: str = "weight"
    transposed: bool = False
    tied: str | None = None
    part: tuple[int, int] | None = None
    interleaved: bool = False
    times: Callable[[tuple[int, ...]], float] | None = None

    def __post_init__(self) -> None:
        if wrong := self._wrong():
            raise ValueError(f"{self!r}: {wrong}.")

    def _wrong(self) -> str | None:
        try:
            re.compile(self.path)
        except re.error as e:
            return f"`path` is not a regular expression: {e}"
        counts = collections.Counter(self.axes)
        if counts.keys() - set("iovkles") or max(counts["e"], counts["s"]) > 1 or not counts["o"]:
            return (
                "`axes` must be of the letters i, o, v, k, l, one e and one s, with at least one o"
            )
        if isinstance(self.module, tuple) != ("s" in counts) or not self.modules:
            return "`module` is a tuple where `axes` has an s"
        if "s" in counts and counts.keys() - set("iols"):
            return "an s goes with i, o and l"
        if any(module.count("{}") != counts["l"] for module in self.modules):
            return "`module` needs one {} for each l of `axes`"
        if (self.tied or "v" in self.axes) and set(self.axes) != {"v", "o"}:
            return "an embedding has the axes v and o, and only an embedding is `tied`"
        if self.part is not None:
            j, n = self.part
            if not 0 <= j < n:
                return "`part` must be (j, n) with 0 <= j < n"
            if self.transposed or self.kind not in ("linear", "experts") or "s" in counts:
                return "a `part` is of a linear weight or of experts, which is not transposed"
        return None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of one index along the stacked axes."""
        return self.module if isinstance(self.module, tuple) else (self.module,)

    @property
    def kind(self) -> str | None:
        """`linear`, `embedding`, `conv`, `experts`, or None for what is no matrix."""
        kinds = {"e": "experts", "v": "embedding", "k": "conv", "i": "linear"}
        return next((kind for letter, kind in kinds.items() if letter in self.axes), None)

    def where(self, letters: str) -> tuple[int, ...]:
        """The axes that have one of `letters`."""
        return tuple(d for d, letter in enumerate(self.axes) if letter in letters)

    @property
    def is_plain(self) -> bool:
        """Whether the leaf is PyTorch's parameter but for its axes."""
        return self.times is None and not self.interleaved

    @property
    def layout(self) -> Layout:
        """The layout of a `LowRank` node."""
        count = len(self.modules)
        slots = next(((count, tuple(range(count)), axis) for axis in self.where("s")), None)
        return Layout(self.where("le"), self.where("ikv"), self.where("so"), slots)

    @property
    def swapped(self) -> bool:
        """Whether PEFT's A is our B."""
        return self.transposed and self.kind == "experts"

    @property
    def a_groups(self) -> Groups:
        """The axes of PEFT's A, each as the axes of ours that it flattens."""
        if self.kind == "conv":
            return [(RANK,), self.where("i"), *((d,) for d in self.where("k"))]
        inner = self.where("o") if self.swapped else self.where("ikv")
        return [(*self.where("e"), RANK), inner]

    @property
    def b_groups(self) -> Groups:
        """As `a_groups`, of PEFT's B."""
        ones: Groups = [()] * len(self.where("k"))
        outer = self.where("i") if self.swapped else self.where("o")
        return [outer, (RANK, *self.where("e")), *ones]

    @property
    def m_groups(self) -> Groups:
        """As `a_groups`, of PEFT's magnitudes."""
        ones: Groups = [()] * len(self.where("k"))
        return [(), self.where("o"), *ones] if self.kind == "conv" else [self.where("o")]

    @property
    def weight_groups(self) -> Groups:
        """As `a_groups`, of the weight in PyTorch."""
        i, o = self.where("iv"), self.where("o")
        if self.kind is None:
            return [o]
        experts = [(d,) for d in self.where("e")]
        if self.kind == "embedding" or self.transposed:
            return [*experts, i, o]
        return [*experts, o, i, *((d,) for d in self.where("k"))]

    @property
    def suffixes(self) -> tuple[str, str]:
        """How the keys of A and B end."""
        if self.kind == "embedding":
            return "lora_embedding_A", "lora_embedding_B"
        return "lora_A.weight", "lora_B.weight"


class Leaf(NamedTuple):
    """A leaf of the base with its name.

    Attributes:
        path: its path.
        value: the leaf.
        shape: its shape.
        name: the row that names it.
        modules: PyTorch's module for each index along the axes `l` and `s`, in C order.
        slots: which modules of a tuple these are, if not all.
    """

    path: Path
    value: Any
    shape: tuple[int, ...]
    name: Name
    modules: tuple[str, ...]
    slots: tuple[int, ...] | None = None

    def only(self, slots: tuple[int, ...]) -> "Leaf":
        """That of some modules of a tuple alone."""
        [axis], stacked = self.name.where("s"), self.name.where("ls")
        every = np.arange(len(self.modules)).reshape([self.shape[d] for d in stacked])
        modules = tuple(self.modules[i] for i in every.take(slots, stacked.index(axis)).flat)
        shape = (*self.shape[:axis], len(slots), *self.shape[axis + 1 :])
        return self._replace(shape=shape, modules=modules, slots=slots)

    @property
    def layout(self) -> Layout:
        """The layout of a `LowRank` node for these modules."""
        layout = self.name.layout
        if layout.slots is None or self.slots is None:
            return layout
        count, _, axis = layout.slots
        return layout._replace(slots=(count, self.slots, axis))

    @property
    def parameters(self) -> list[str]:
        """PyTorch's parameters, in the order of `modules`."""
        return [f"{module}.{self.name.parameter}" for module in self.modules]

    def key(self, module: str) -> str:
        """What `target_modules`, or `target_parameters` for experts, and patterns match."""
        return f"{module}.{self.name.parameter}" if self.name.kind == "experts" else module

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B of one module in the file."""
        sizes = {**self._sizes, RANK: rank}
        return lengths(self.name.a_groups, sizes), lengths(self.name.b_groups, sizes)

    @property
    def factor(self) -> float:
        """What PyTorch's parameter is multiplied with."""
        return 1.0 if self.name.times is None else self.name.times(self.shape)

    @property
    def _sizes(self) -> dict[int, int]:
        """The lengths of its axes, as they are in PyTorch."""
        sizes = dict(enumerate(self.shape))
        if self.name.part is not None:
            sizes[self.name.where("o")[0]] *= self.name.part[1]
        return sizes

    @property
    def experts(self) -> int:
        """How many experts share a parameter."""
        return math.prod(self.shape[d] for d in self.name.where("e"))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of one module's parameter in PyTorch."""
        return lengths(self.name.weight_groups, self._sizes)


def lengths(groups: Sequence[tuple[int, ...]], sizes: dict[int, int]) -> tuple[int, ...]:
    """The length of each group of axes."""
    return tuple(math.prod(sizes[d] for d in group) for group in groups)


def resolve(base: PyTree, names: Sequence[Name]) -> list[Leaf]:
    """The leaves of `base` that `names` name, in tree order.

    Raises:
        TypeError: if `names` is no table.
        ValueError: if two leaves have one name.
    """
    rows = list(names)
    if not rows or not all(isinstance(row, Name) for row in rows):
        raise TypeError(
            "`names` must be a table of jlora.peft.Name rows, such as jlora.peft.LLAMA; "
            f"got {names!r}."
        )
    found = (_leaf(path, x, rows) for path, x in leaves_by_path(base, is_node))
    leaves = [leaf for leaf in found if leaf is not None]
    owners = collections.defaultdict[str, list[Leaf]](list)
    for leaf in leaves:
        for parameter in leaf.parameters:
            owners[parameter].append(leaf)
    twice = [
        f"  {name}: {', '.join(name_of(leaf.path) for leaf in own)}"
        for name, own in owners.items()
        if len(own) > 1 and not _are_parts(own)
    ]
    if twice:
        raise ValueError(
            "`names` gives two leaves one name:\n" + "\n".join(twice) + "\nNarrow its patterns."
        )
    return leaves


def _are_parts(leaves: Sequence[Leaf]) -> bool:
    """Whether they are different parts of one parameter."""
    parts = [leaf.name.part for leaf in leaves]
    return None not in parts and len(set(parts)) == len(parts)


def path_in_names(path: Path) -> str:
    """A path as the rows of a table have it."""
    return "/".join(path).removeprefix("params/")


def _leaf(path: Path, x: Any, rows: Sequence[Name]) -> Leaf | None:
    shape = tuple(x.shape) if hasattr(x, "shape") else ()
    if (found := row_of(path, shape, rows)) is None:
        return None
    row, matched = found
    templates = [matched.expand(module).replace("/", ".") for module in row.modules]
    return Leaf(path, x, shape, row, tuple(_modules(row, shape, templates)))


def row_of(
    path: Path, shape: tuple[int, ...], rows: Sequence[Name]
) -> tuple[Name, re.Match[str]] | None:
    """The row that names a leaf, and how its pattern matches."""
    for row in rows:
        matched = re.fullmatch(row.path, path_in_names(path))
        if matched and len(row.axes) == len(shape) and _holds_all(row, shape):
            return row, matched
    return None


def _holds_all(row: Name, shape: tuple[int, ...]) -> bool:
    return all(shape[d] == len(row.modules) for d in row.where("s"))


def _modules(row: Name, shape: tuple[int, ...], templates: Sequence[str]) -> Iterator[str]:
    stacked = row.where("ls")
    for at in itertools.product(*(range(shape[d]) for d in stacked)):
        slot = next((n for n, d in zip(at, stacked, strict=True) if row.axes[d] == "s"), 0)
        index = [n for n, d in zip(at, stacked, strict=True) if row.axes[d] == "l"]
        yield templates[slot].format(*index)


def by_row(leaves: Sequence[Leaf], names: Sequence[Name]) -> list[Leaf]:
    """The leaves in the order of the rows that name them, in which PEFT wraps parameters."""
    order = {name: i for i, name in reversed(list(enumerate(names)))}
    return sorted(leaves, key=lambda leaf: order[leaf.name])


def tied_to(leaf: Leaf, leaves: Sequence[Leaf]) -> str | None:
    """The module that shares the embedding `leaf`, if it is tied in this tree."""
    tied = leaf.name.tied
    if tied is None:
        return None
    modules = {m for other in leaves for m in other.modules}
    if tied in modules:
        return None
    parent, dot, _ = tied.rpartition(".")
    return tied if not dot or any(m.startswith(parent) for m in modules) else None
