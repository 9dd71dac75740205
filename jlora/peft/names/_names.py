"""A row of a name table: what leaves are called in PyTorch, and how their axes lie there."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

from ..._types import Layout

RANK = "rank"  # what nodes call the axis that the weight has not
Axes = tuple[int | str, ...]  # axes of the weight, and the rank
Groups = list[Axes]  # for each axis of an array of PyTorch, the axes that it flattens


@dataclasses.dataclass(frozen=True)
class Name:
    r"""One row of a name table: the leaves at `path` are `module`'s `parameter` in PyTorch.

    The first row of a table whose `path` and number of axes fit a leaf names it.

    Attributes:
        path: a regular expression for the whole `/`-joined path, a leading `params/` left out.
        module: PyTorch's module. `\1` stands for a group of `path`, in which `/` becomes `.`, and
            each `{}` for the index along a stacked axis. Where layers are scanned in blocks, a sum
            stands between the braces: `{6*+1*+2}` is 6·i + j + 2 for the indices i and j along two
            stacked axes, `{\1+3}` is a group + 3. A tuple for a leaf that holds several modules.
        axes: a letter for each axis of the leaf. `i`: inputs; `o`: outputs; `v`: rows that are
            looked up, of an embedding; `k`: an axis of a convolution's window; `l`: stacked, one
            module for each index; `e`: experts of one PyTorch parameter; `s`: the outputs of the
            modules of a tuple, one for each index, such as k and v (2, heads, d, head_dim): `soio`.
            Several `i` or `o` are flattened in order, as the kernels of `DenseGeneral`
            (d, heads, head_dim) are: `ioo`.
        parameter: the name of the parameter in the module.
        transposed: whether PyTorch keeps the weight as (inputs, outputs), as GPT-2's `Conv1D`
            does, and Llama 4's experts (experts, inputs, outputs).
        is_transposed: whether a module of `transposed` experts says so, as that of gpt-oss does by
            an attribute of this name. PEFT's A then belongs to the inputs, else to the outputs.
        tied: the module that shares an embedding as its weight. It counts as tied where no other
            leaf of the tree is that weight and the module that holds it is there.
        part: (j, n) for what is the j-th of n equal parts of the parameter's outputs, as gate and
            up are of the experts' `gate_up_proj`. PEFT has one A for all of them: it is loaded for
            each, and written once if it is still the same; else their ranks add up.
        alternating: whether the outputs of the parts alternate, as gpt-oss's do.
        interleaved: whether the last `o` alternates between what PyTorch keeps in two halves, as
            the queries and keys of some rotary embeddings do.
        times: a function of the leaf's shape that gives the factor by which the leaf exceeds
            PyTorch's parameter. It multiplies the scale of an adapter's ΔW, not A and B.

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
    alternating: bool = False
    is_transposed: bool = False

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
        if any(_count_indices(module) != counts["l"] for module in self.modules):
            return "`module` needs one {} for each l of `axes`, or a sum with it such as {2*+1}"
        if (self.tied or "v" in self.axes) and set(self.axes) != {"v", "o"}:
            return "an embedding has the axes v and o, and only an embedding is `tied`"
        if self.part is not None:
            j, n = self.part
            if not 0 <= j < n:
                return "`part` must be (j, n) with 0 <= j < n"
            is_odd = self.transposed and self.kind != "experts"
            if is_odd or self.kind in ("embedding", "conv") or "s" in counts:
                return "a `part` is of experts, or of a linear weight which is not transposed"
        return None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of one index along the stacked axes."""
        return self.module if isinstance(self.module, tuple) else (self.module,)

    @property
    def kind(self) -> str | None:
        """`linear`, `embedding`, `conv`, `experts`, or None for what is no matrix."""
        if not set("ivk") & set(self.axes):
            return None
        kinds = {"e": "experts", "v": "embedding", "k": "conv", "i": "linear"}
        return next((kind for letter, kind in kinds.items() if letter in self.axes), None)

    def where(self, letters: str) -> tuple[int, ...]:
        """Returns the axes that have one of `letters`."""
        return tuple(d for d, letter in enumerate(self.axes) if letter in letters)

    @property
    def is_plain(self) -> bool:
        """Whether the leaf differs from PyTorch's parameter in its axes alone."""
        return self.times is None and not self.interleaved

    @property
    def layout(self) -> Layout:
        """The layout of a `LowRank` node."""
        count = len(self.modules)
        slots = next(((count, tuple(range(count)), axis) for axis in self.where("s")), None)
        return Layout(self.where("le"), self.where("ikv"), self.where("so"), slots)

    @property
    def is_swapped(self) -> bool:
        """Whether PEFT's A is our B."""
        return self.transposed and self.kind == "experts" and not self.is_transposed

    @property
    def factor_groups(self) -> dict[str, Groups]:
        """PEFT's A, B and magnitudes in this order, for each axis those of the weight it flattens.

        Where they are swapped, PEFT's own are those of `swap`.
        """
        i, o, e = self.where("ikv"), self.where("o"), self.where("e")
        if self.kind == "conv":
            window, ones = [(d,) for d in self.where("k")], [()] * len(self.where("k"))
            a, b, m = [(RANK,), self.where("i"), *window], [o, (RANK,), *ones], [(), o, *ones]
            return {"a": a, "b": b, "m": m}
        return {"a": [(*e, RANK), i], "b": [o, (RANK, *e)], "m": [o]}

    @property
    def weight_groups(self) -> Groups:
        """For each axis of the weight in PyTorch, the axes of the leaf that it flattens."""
        i, o = self.where("iv"), self.where("o")
        experts = [(d,) for d in self.where("e")]
        if self.kind is None:
            return [*experts, o]
        if self.kind == "embedding" or self.transposed:
            return [*experts, i, o]
        return [*experts, o, i, *((d,) for d in self.where("k"))]


_SUM = re.compile(r"\{((?:(?:\d+\*?|\\\d+)(?:\+(?:\d+\*?|\\\d+))*)?)\}")


def _count_indices(module: str) -> int:
    return sum(terms.count("*") if terms else 1 for terms in _SUM.findall(module))


def fill_indices(module: str, indices: Sequence[int]) -> str:
    """Replaces each `{}`, and each sum between braces, by a number."""
    left = iter(indices)

    def compute(found: re.Match[str]) -> str:
        terms = (found[1] or "1*").split("+")
        return str(sum(int(x.rstrip("*")) * (next(left) if "*" in x else 1) for x in terms))

    return _SUM.sub(compute, module)


def multiply_lengths(groups: Sequence[Axes], sizes: Mapping[int | str, int]) -> tuple[int, ...]:
    """Returns the length of each group of axes."""
    return tuple(math.prod(sizes[d] for d in group) for group in groups)
