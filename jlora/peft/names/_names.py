"""A row of a name table: the names of leaves in PyTorch, and the order of their axes."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

from ..._types import Layout
from ._kinds import CONV, EMBEDDING, EXPERTS, find_kind

RANK = "rank"  # the axis of A and B that the weight does not have
AxisGroup = tuple[int | str, ...]  # axes of the weight, and the rank
Groups = list[AxisGroup]  # for each axis of a PyTorch array, the axes that are flattened into it


@dataclasses.dataclass(frozen=True)
class Name:
    r"""One row of a name table: the leaves at `path` are `parameter` of `module` in PyTorch.

    The first row that fits the path and the number of axes of a leaf names it.

    Attributes:
        path: a regular expression that matches the whole `/`-joined path, without a leading
            `params/`.
        module: PyTorch's module. `\1` is a group of `path`, with `.` for `/`. Each `{}` is the
            index along a stacked axis. For layers that are scanned in blocks, braces contain a sum:
            `{6*+1*+2}` is 6·i + j + 2 for the indices i and j along two stacked axes, and `{\1+3}`
            is a group plus 3. For a leaf that holds several modules, a tuple of modules.
        axes: a letter for each axis of the leaf. `i`: inputs. `o`: outputs. `v`: the rows of an
            embedding. `k`: an axis of a convolution's window, or a further axis of a parameter that
            is no matrix. `l`: stacked, one module for each index. `e`: the experts of one PyTorch
            parameter. `s`: the modules of a tuple, such as k and v in a leaf (2, heads, d,
            head_dim): `soio`. Several `i` or `o` are flattened in order, such as `ioo` for the
            kernel (d, heads, head_dim) of a `DenseGeneral`. A scalar has no letters.
        parameter: the name of the parameter in the module.
        transposed: whether PyTorch stores the weight as (inputs, outputs), as in GPT-2's `Conv1D`,
            or as (experts, inputs, outputs), as in Llama 4.
        is_transposed: whether the PyTorch module of `transposed` experts has an attribute
            `is_transposed`, as in gpt-oss. PEFT's A then has the inputs, otherwise the outputs.
        tied: the module, usually a head, that shares the embedding. It counts as tied if the tree
            has its parent module, but no leaf for its weight.
        part: (j, n) for the j-th of n equal parts of the parameter's outputs, such as gate and up
            of the experts' `gate_up_proj`. PEFT has one A for all parts. It is loaded for each part
            and written once if all parts still have the same; otherwise their ranks add up.
        alternating: whether the outputs of the parts alternate, as in gpt-oss.
        interleaved: whether the last `o` alternates between entries that PyTorch keeps in two
            halves, as queries and keys of some rotary embeddings do.
        times: a function of the leaf's shape that returns leaf ÷ parameter of PyTorch. The scale of
            an adapter's ΔW is multiplied by it; A and B are not.
        refused: why PEFT has no form for an adapter of the leaf; empty if it has one.

    Each module of a tuple has its own A and B, as with `LoRA(..., slots=Slots(2, (0, 1)))`.

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
    refused: str = ""

    def __post_init__(self) -> None:
        if wrong := self._wrong():
            raise ValueError(f"Name({self.path!r}, {self.module!r}, {self.axes!r}): {wrong}.")

    def _wrong(self) -> str | None:
        try:
            re.compile(self.path)
        except re.error as e:
            return f"`path` is not a regular expression: {e}"
        counts = collections.Counter(self.axes)
        lacks_o = bool(self.axes) and not counts["o"]
        if counts.keys() - set("iovkles") or max(counts["e"], counts["s"]) > 1 or lacks_o:
            return (
                "`axes` may have the letters i, o, v, k, l, at most one e and one s, and needs an o"
            )
        if isinstance(self.module, tuple) != ("s" in counts) or not self.modules:
            return "`module` must be a tuple if `axes` has an s, and otherwise a string"
        if "s" in counts and counts.keys() - set("iols"):
            return "an s in `axes` can be combined only with i, o and l"
        if any(_count_indices(module) != counts["l"] for module in self.modules):
            return "`module` needs one {} for each l of `axes`, or a sum with it such as {2*+1}"
        if (self.tied or "v" in self.axes) and set(self.axes) != {"v", "o"}:
            return "an embedding has only the axes v and o, and only an embedding can be `tied`"
        if self.part is not None:
            j, n = self.part
            if not 0 <= j < n:
                return "`part` must be (j, n) with 0 <= j < n"
            kind = find_kind(self.axes)
            is_odd = self.transposed and kind is not EXPERTS
            if is_odd or kind in (EMBEDDING, CONV) or "s" in counts:
                return "only experts, and linear weights that are not transposed, have a `part`"
        return None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of one index along the stacked axes."""
        return self.module if isinstance(self.module, tuple) else (self.module,)

    @property
    def kind(self) -> str | None:
        """`linear`, `embedding`, `conv` or `experts`; None for a parameter that is no matrix."""
        kind = find_kind(self.axes)
        return kind and kind.name

    def where(self, letters: str) -> tuple[int, ...]:
        """Returns the axes that have one of `letters`."""
        return tuple(d for d, letter in enumerate(self.axes) if letter in letters)

    @property
    def is_plain(self) -> bool:
        """Whether the leaf differs from PyTorch's parameter only in its axes."""
        return self.times is None and not self.interleaved

    @functools.cached_property
    def layout(self) -> Layout:
        """The layout of a `LowRank` node."""
        count = len(self.modules)
        slots = next(((count, tuple(range(count)), axis) for axis in self.where("s")), None)
        return Layout(self.where("le"), self.where("ikv"), self.where("so"), slots)

    @property
    def is_swapped(self) -> bool:
        """Whether PEFT's A is jlora's B."""
        return self.transposed and find_kind(self.axes) is EXPERTS and not self.is_transposed

    @property
    def is_reversed(self) -> bool:
        """Whether the parameter is the transpose of PEFT's B·A."""
        return "v" in self.axes or (self.transposed and not self.is_swapped)

    @functools.cached_property
    def factor_groups(self) -> dict[str, Groups]:
        """For PEFT's A, B and magnitudes: the axes of the weight that each axis flattens.

        If A and B are swapped, `swap` makes PEFT's.
        """
        i, o, e = self.where("iv"), self.where("o"), self.where("e")
        window = [(d,) for d in self.where("k")]
        ones = [()] * len(window)
        m = [*ones[:1], o, *ones]
        return {"a": [(*e, RANK), i, *window], "b": [o, (RANK, *e), *ones], "m": m}

    @property
    def weight_groups(self) -> Groups:
        """For each axis of the weight in PyTorch, the axes of the leaf that it flattens."""
        i, o = self.where("iv"), self.where("o")
        experts = [(d,) for d in self.where("e")]
        window = [(d,) for d in self.where("k")]
        if not i:
            return [*experts, *([o] if o else []), *window]
        if "v" in self.axes or self.transposed:
            return [*experts, i, o]
        return [*experts, o, i, *window]


_SUM = re.compile(r"\{((?:(?:\d+\*?|\\\d+)(?:\+(?:\d+\*?|\\\d+))*)?)\}")


def _count_indices(module: str) -> int:
    return sum(terms.count("*") if terms else 1 for terms in _SUM.findall(module))


def fill_indices(module: str, indices: Sequence[int]) -> str:
    """Replaces each `{}`, and each sum in braces, with a number."""
    left = iter(indices)

    def compute(found: re.Match[str]) -> str:
        terms = (found[1] or "1*").split("+")
        return str(sum(int(x.rstrip("*")) * (next(left) if "*" in x else 1) for x in terms))

    return _SUM.sub(compute, module)


def multiply_lengths(
    groups: Sequence[AxisGroup], sizes: Mapping[int | str, int]
) -> tuple[int, ...]:
    """Returns the length of each group of axes, flattened."""
    return tuple(math.prod(sizes[d] for d in group) for group in groups)
