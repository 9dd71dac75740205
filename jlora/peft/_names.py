"""What a leaf of a JAX tree is called in PyTorch, and how its axes lie there."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._tree import leaves_by_path, name_of
from .._types import Layout, Path, PyTree
from ..adapters import LowRank, is_node, low_rank_axes, without_slots

RANK = -1  # stands for the rank beside the numbers of a weight's axes
Groups = list[tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Name:
    r"""One row of a name table: the leaves at `path` are `module`'s `parameter` in PyTorch.

    The first row of a table whose `path` and number of axes fit a leaf names it.

    Attributes:
        path: a regular expression for the whole `/`-joined path, a leading `params/` left out.
        module: PyTorch's module. `\1` stands for a group of `path`, in which `/` becomes `.`, and
            each `{}` for the index along a stacked axis.
        axes: a letter for each axis of the leaf. `i`: inputs; `o`: outputs; `v`: rows that are
            looked up, of an embedding; `k`: an axis of a convolution's window; `l`: stacked, one
            module for each index; `e`: experts of one PyTorch parameter. Several `i` or `o` are
            flattened in order, as the kernels of `DenseGeneral` (d, heads, head_dim) are: `ioo`.
        parameter: the name of the parameter in the module.
        transposed: whether PyTorch keeps the weight as (inputs, outputs), as GPT-2's `Conv1D`
            does. Of experts: whether PEFT's A belongs to the outputs, as it does where a module
            keeps (experts, inputs, outputs) and has no `is_transposed`.
        tied: the module that shares an embedding as its weight. It counts as tied where no other
            leaf of the tree is that weight and the module that holds it is there.

    Raises:
        ValueError: if the fields contradict each other.

    Examples:
        >>> from jlora import peft
        >>> peft.Name(r"blocks/(\w+)/kernel", r"model.layers.{}.\1_proj", "lio").kind
        'linear'
    """

    path: str
    module: str
    axes: str
    parameter: str = "weight"
    transposed: bool = False
    tied: str | None = None

    def __post_init__(self) -> None:
        if wrong := self._wrong():
            raise ValueError(f"{self!r}: {wrong}.")

    def _wrong(self) -> str | None:
        try:
            re.compile(self.path)
        except re.error as e:
            return f"`path` is not a regular expression: {e}"
        if set(self.axes) - set("iovkle") or self.axes.count("e") > 1 or "o" not in self.axes:
            return "`axes` must be of the letters i, o, v, k, l and one e, with at least one o"
        if self.module.count("{}") != self.axes.count("l"):
            return "`module` needs one {} for each l of `axes`"
        if (self.tied or "v" in self.axes) and set(self.axes) != {"v", "o"}:
            return "an embedding has the axes v and o, and only an embedding is `tied`"
        return None

    @property
    def kind(self) -> str | None:
        """`linear`, `embedding`, `conv`, `experts`, or None for what is no matrix."""
        kinds = {"e": "experts", "v": "embedding", "k": "conv", "i": "linear"}
        return next((kind for letter, kind in kinds.items() if letter in self.axes), None)

    def where(self, letters: str) -> tuple[int, ...]:
        """The axes that have one of `letters`."""
        return tuple(d for d, letter in enumerate(self.axes) if letter in letters)

    @property
    def layout(self) -> Layout:
        """The layout of a `LowRank` node."""
        return Layout(self.where("le"), self.where("ikv"), self.where("o"))

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
        modules: PyTorch's module for each index along the stacked axes, in C order.
    """

    path: Path
    value: Any
    shape: tuple[int, ...]
    name: Name
    modules: tuple[str, ...]

    def key(self, module: str) -> str:
        """What `target_modules`, or `target_parameters` for experts, and patterns match."""
        return f"{module}.{self.name.parameter}" if self.name.kind == "experts" else module

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B of one module in the file."""
        sizes = {**dict(enumerate(self.shape)), RANK: rank}
        return lengths(self.name.a_groups, sizes), lengths(self.name.b_groups, sizes)

    @property
    def experts(self) -> int:
        """How many experts share a parameter."""
        return math.prod(self.shape[d] for d in self.name.where("e"))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of one module's parameter in PyTorch."""
        return lengths(self.name.weight_groups, dict(enumerate(self.shape)))


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
    owners = collections.defaultdict(list)
    for leaf in leaves:
        for module in leaf.modules:
            owners[f"{module}.{leaf.name.parameter}"].append(name_of(leaf.path))
    twice = [f"  {name}: {', '.join(paths)}" for name, paths in owners.items() if len(paths) > 1]
    if twice:
        raise ValueError(
            "`names` gives two leaves one name:\n" + "\n".join(twice) + "\nNarrow its patterns."
        )
    return leaves


def _leaf(path: Path, x: Any, rows: Sequence[Name]) -> Leaf | None:
    shape = tuple(x.shape) if hasattr(x, "shape") else ()
    joined = "/".join(path).removeprefix("params/")
    for row in rows:
        matched = re.fullmatch(row.path, joined)
        if matched and len(row.axes) == len(shape):
            template = matched.expand(row.module).replace("/", ".")
            counts = [range(shape[d]) for d in row.where("l")]
            modules = tuple(template.format(*at) for at in itertools.product(*counts))
            return Leaf(path, x, shape, row, modules)
    return None


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


# ------------------------------------------------------------------------------- arrays
# Axes are permuted and flattened; values never change.


def factors(leaf: Leaf, delta: LowRank) -> list[tuple[np.ndarray, np.ndarray]]:
    """PEFT's A and B for each module of `leaf`.

    Slots have no equivalent there: they become one A of rank slots·r and one B with zeros outside
    of each slot's own outputs, which is the same ΔW exactly.
    """
    whole = without_slots(delta, leaf.shape)
    pair = list(zip((whole.a, whole.b), _axes(whole.layout), strict=True))
    a, b = pair[::-1] if leaf.name.swapped else pair
    packed = _pack(*a, leaf.name.a_groups, leaf), _pack(*b, leaf.name.b_groups, leaf)
    return list(zip(*packed, strict=True))


def low_rank(
    leaf: Leaf, pairs: Sequence[tuple[np.ndarray, np.ndarray]], rank: int, **static: Any
) -> LowRank:
    """The node of `leaf` from PEFT's A and B of each of its modules: the inverse of `factors`."""
    name, axes = leaf.name, _axes(leaf.name.layout)
    axes_a, axes_b = axes[::-1] if name.swapped else axes
    a = _unpack([a for a, _ in pairs], axes_a, name.a_groups, leaf, rank)
    b = _unpack([b for _, b in pairs], axes_b, name.b_groups, leaf, rank)
    a, b = (b, a) if name.swapped else (a, b)
    return LowRank(jnp.asarray(a), jnp.asarray(b), layout=name.layout, **static)


def _axes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of A and of B: the rank beside those of the weight."""
    found = low_rank_axes(layout)
    a, b = (tuple(d if isinstance(d, int) else RANK for d in found[n]) for n in ("a", "b"))
    return a, b


def weights(leaf: Leaf, value: Any) -> list[np.ndarray]:
    """PyTorch's parameter for each module of `leaf`."""
    return _pack(value, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf)


def weight(leaf: Leaf, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `weights`."""
    return _unpack(parts, tuple(range(len(leaf.shape))), leaf.name.weight_groups, leaf, 0)


def _pack(x: Any, axes: tuple[int, ...], groups: Groups, leaf: Leaf) -> list[np.ndarray]:
    x = np.asarray(x)
    stacked = leaf.name.where("l")
    order = [*stacked, *itertools.chain(*groups)]
    # Modules or experts that share a factor here get a copy each.
    shared = tuple(d for d in order if d not in axes)
    axes = (*shared, *axes)
    x = np.broadcast_to(x, (*(leaf.shape[d] for d in shared), *x.shape))
    sizes = dict(zip(axes, x.shape, strict=True))
    x = np.transpose(x, [axes.index(d) for d in order])
    x = x.reshape(lengths([stacked, *groups], sizes))
    # Contiguous: the writer of safetensors takes the memory as it lies.
    return [np.ascontiguousarray(part) for part in x]


def _unpack(
    parts: Sequence[np.ndarray], axes: tuple[int, ...], groups: Groups, leaf: Leaf, rank: int
) -> np.ndarray:
    sizes = {**dict(enumerate(leaf.shape)), RANK: rank}
    order = [*leaf.name.where("l"), *itertools.chain(*groups)]
    x = np.stack(parts).reshape([sizes[d] for d in order])
    return np.transpose(x, [order.index(d) for d in axes])
