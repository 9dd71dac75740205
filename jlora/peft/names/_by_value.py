"""Finds the rows of a name table by the values of the parameters."""

import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..._errors import InputError, Problem, stop
from ..._progress import progress
from ..._site import Site
from ..._tree import leaves_by_path, name_of
from ..._types import PyTree
from .._checkpoint import Checkpoint, open_checkpoint
from .._file import DTYPES
from ..places._declared import Ties, find_class, find_ties, find_transposed
from ..places._find import as_transformers_stores, stored_as_is
from ..places._views import module_of
from ._generalized import Held, Home, find_homes, generalize
from ._kinds import EMBEDDING, EXPERTS, find_kind
from ._leaves import NamedLeaf, find_leaves, path_in_names
from ._names import Name
from ._torch_layout import split_weight, take_part

EXACT, ROUNDED = 1e-5, 4e-3  # relative differences of sums, in 32 bits and in 16
SLOTS = 4  # modules that one leaf may hold along an axis of its own
SHORT = 8  # vectors that are shorter are not recognized up to a factor


class HasSites(Protocol):
    """What `Transformed.sites` returns; files do not import the transform."""

    @property
    def leaves(self) -> tuple[Site, ...]:
        """All leaves, with how the model uses them."""
        ...


@dataclasses.dataclass(frozen=True)
class Times:
    """A constant factor from PyTorch's parameter to the leaf."""

    factor: float

    def __call__(self, shape: tuple[int, ...]) -> float:
        """Returns the factor, for any shape."""
        del shape
        return self.factor


class Found(tuple[Name, ...]):
    """A name table that was found by value; `print` shows it as code.

    Attributes:
        left: the leaves without a row, and why.
    """

    left: tuple[Problem, ...]

    def __new__(cls, rows: Sequence[Name], left: Sequence[Problem] = ()) -> "Found":
        """Makes the table of `rows`."""
        found = super().__new__(cls, rows)
        found.left = tuple(left)
        return found

    def __str__(self) -> str:
        lines = ["(", *(f"    {_write(row)}," for row in self), ")"]
        return "\n".join([*lines, *(f"# not found: {problem}" for problem in self.left)])


def find_names(path: str | os.PathLike[str], params: PyTree, sites: HasSites) -> Found:
    r"""Finds a name table by the values: which tensor of a checkpoint each leaf holds.

    Use it if the model's own code loads Hugging Face's checkpoints. A leaf may hold one tensor, or
    several that are stacked (layers, experts, modules such as k and v), or a part of one (gate or
    up). Axes may be transposed or split, the last one interleaved; values may be rounded, or
    multiplied by a number. A tensor is recognized by its sums along each axis. Tensors are read
    one at a time: all of them once, and those that no leaf holds whole again for each part.

    Args:
        path: the folder of the checkpoint, in floats.
        params: the parameters, as the model loaded them from there.
        sites: of `params`. How the model uses a leaf tells its inputs from its outputs.

    Returns:
        The rows, with the numbers of layers as patterns; `print` shows code to keep. Leaves without
        a row, and why, are in `left`: their values are in no tensor, or in several, such as norms
        that are all 1.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the folder has no checkpoint in floats, or `params` has no arrays.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> draw = lambda i: jax.random.normal(jax.random.key(i), (4, 2, 3))
        >>> params = {f"layer_{i}": {"up": draw(i)} for i in range(2)}
        >>> names = [peft.Name(r"layer_(\d+)/up", r"h.\1.up", "ioo")]
        >>> f = lambda p, x: [jnp.einsum("bi,ijk->bjk", x, p[k]["up"]) for k in p]
        >>> sites = jlora.transform(f, jlora.LoRA()).sites(params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save_base(f"{folder}/base", params, names)
        ...     print(peft.find_names(f"{folder}/base", params, sites))
        (
            Name(r'layer_(\d+)/up', r'h.\1.up', 'ioo'),
        )
    """
    tensors = _Candidates(open_checkpoint(path, "path", follow_links=True))
    if not tensors.shapes:
        why = f"{path} is quantized; give the checkpoint in floats."
        raise InputError("path", why, path=path)
    uses = {site.parts: site for site in sites.leaves}
    leaves = leaves_by_path(params)
    odd = [at for at, x in leaves if at not in uses or not hasattr(x, "__array__")]
    each = [Problem(name_of(at), "is no array, or not in `sites`") for at in odd]
    stop(each, "params", "must be the arrays that `sites` lists.")
    found, left = dict[str, Held](), dict[str, str]()
    for is_part in (False, True):
        for at, x in progress(leaves, "parts" if is_part else "leaves", unit="leaf"):
            if (name := path_in_names(at)) not in found and name not in left:
                try:
                    held = _find(name, np.asarray(x), uses[at], tensors, is_part)
                    found |= {name: held} if held else {}
                except _SeveralError as e:
                    left[name] = f"its values are in several tensors: {e}"
        tensors.used |= {key for held in found.values() for key in held.keys.flat}
    # Of two leaves that hold the same, the embedding has the name, or else the first.
    owners = dict[tuple[str, tuple[int, int] | None], str]()
    for held in sorted(found.values(), key=lambda held: find_kind(held.row.axes) is not EMBEDDING):
        for key in held.keys.flat:
            owners.setdefault((key, held.row.part), held.path)
    for name, held in list(found.items()):
        others = [owners[key, held.row.part] for key in held.keys.flat]
        if other := next((x for x in others if x != name), None):
            left[name] = f"holds what {other} holds: {held.keys.flat[0]}"
            del found[name]
    rows, known = generalize(found.values(), tensors.find_homes(found.values()))
    named = {path_in_names(x.path): x.parameters for x in find_leaves(params, rows)} if rows else {}
    for name in (path_in_names(path) for path, _ in leaves):
        if name not in found:
            left.setdefault(name, "its values are in no tensor")
        elif name not in known or named.get(name) != [*known[name].keys.flat]:
            left[name] = f"no row can express {', '.join(map(str, found[name].keys.flat[:9]))}"
    return Found(rows, [Problem(*item) for item in left.items()])


# ------------------------------------------------------------------------------------ by values


class _SeveralError(Exception):
    """The values of a leaf are in several tensors, which it lists."""


class _Measures(NamedTuple):
    """Arrays of one shape, measured.

    Attributes:
        names: their names.
        sums: for each, its sums along each axis, divided by its norm.
        norms: their norms.
        keys: a random projection of the sums, by which most are told apart.
    """

    names: list[str]
    sums: np.ndarray
    norms: np.ndarray
    keys: np.ndarray

    def find(self, x: np.ndarray, far: float) -> dict[str, float]:
        """Finds the arrays that have the values of `x` up to a factor, and the factors."""
        one = _measure([("", x)])
        size = np.linalg.norm(one.sums)
        [near] = np.nonzero(np.abs(self.keys - one.keys) <= 6 * far * size)
        differ = np.linalg.norm(self.sums[near] - one.sums, axis=1)
        found = near[(differ <= far * size) & ((self.norms[near] > 0) == (one.norms > 0))]
        return {self.names[n]: float(one.norms[0] / (self.norms[n] or 1)) or 1.0 for n in found}


def _measure(arrays: Iterable[tuple[str, np.ndarray]]) -> _Measures:
    """Measures arrays of one shape."""
    names, sums, norms = list[str](), list[np.ndarray](), list[float]()
    for name, x in arrays:
        blocks = np.array_split(x.reshape(-1), x.size // 2**20 + 1)
        norm = math.sqrt(sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks))
        others = (tuple(d for d in range(x.ndim) if d != axis) for axis in range(x.ndim))
        own = np.concatenate([x.sum(axis=axes, dtype=np.float64) for axes in others])
        names.append(name)
        sums.append(own / (norm or 1.0))
        norms.append(norm)
    every = np.array(sums)
    random = np.random.default_rng(0).standard_normal(every.shape[-1])
    return _Measures(names, every, np.array(norms), every @ random)


class _Candidates:
    """The tensors of a checkpoint.

    Attributes:
        shapes: those of each shape, measured.
        used: those that leaves hold as a whole.
        head: the head that shares the embedding.
        table: the last name of the embedding; empty if it is not known.
        transposed: the last names of modules that are `is_transposed`, as in `Name`.
    """

    def __init__(self, checkpoint: Checkpoint):
        """Measures all tensors in floats."""
        self.checkpoint = checkpoint
        self.used = set[str]()
        ties = find_ties(checkpoint.shapes, checkpoint.config) or Ties()
        self.head = module_of(ties.names.get(ties.head or "", "")) or None
        own = find_class(checkpoint.config)
        self.table = own.table.rpartition(".")[2] if own else ""
        self.transposed = find_transposed(checkpoint.config) or set()
        names = collections.defaultdict[tuple[int, ...], list[str]](list)
        for name in checkpoint.where:
            if (entry := checkpoint.entry(name)).dtype in DTYPES and entry.shape:
                names[entry.shape].append(name)
        each = progress(names.items(), "tensors", unit="shape")
        self.shapes = {shape: self._measure(own) for shape, own in each}
        self.parts = dict[Any, _Measures]()

    def _measure(self, names: Iterable[str], row: Name | None = None) -> _Measures:
        """Measures tensors, or the part of each that a row names."""
        each = ((name, self._read(name)) for name in names)
        return _measure((name, x if row is None else take_part(x, row)) for name, x in each)

    def _read(self, name: str) -> np.ndarray:
        entry = self.checkpoint.entry(name)
        data = b"".join(self.checkpoint.pieces(name))
        return np.frombuffer(data, DTYPES[entry.dtype]).reshape(entry.shape)

    def match(self, leaf: NamedLeaf) -> tuple[list[str], Name] | None:
        """Finds the parameters of a leaf's modules, and completes its row; None if it has none."""
        if (table := self._find_table(leaf)) is None:
            return None
        row = leaf.name
        keys = list[str]()
        factors = list[float]()
        for x in split_weight(leaf, leaf.value).values():
            found = table.find(x, ROUNDED if x.dtype.itemsize == 2 else EXACT)
            names = [*found]
            if leaf.kind is EMBEDDING and names:
                row, names = self._tie(row, names)
            if len(names) > 1:
                raise _SeveralError(", ".join(names[:9]))
            if not names:
                return None
            keys += names
            factors.append(found[names[0]])
        factor = _round_factor(float(np.median(factors)))
        is_one = all(math.isclose(x, factor, rel_tol=ROUNDED) for x in factors)
        is_telling = leaf.weight_shape[-1] >= SHORT and bool(np.ptp(leaf.value))
        if not is_one or len(set(keys)) < len(keys) or not (factor == 1 or is_telling):
            return None
        if factor != 1:
            row = dataclasses.replace(row, times=Times(factor))
        if row.transposed and leaf.kind is EXPERTS:
            last = module_of(keys[0]).rpartition(".")[2]
            row = dataclasses.replace(row, is_transposed=last in self.transposed)
        return keys, row

    def find_homes(self, found: Iterable[Held]) -> dict[str, Home]:
        """Finds what all tensors of leaves are in the model; as they are stored if some are not."""
        keys = {key for held in found for key in held.keys.flat}
        shapes, config = self.checkpoint.shapes, self.checkpoint.config
        whole, *joined = stored_as_is(shapes)
        tried = map(find_homes, (*as_transformers_stores(shapes, config), *joined))
        return next((homes for homes in tried if homes.keys() >= keys), find_homes(whole))

    def _find_table(self, leaf: NamedLeaf) -> _Measures | None:
        """Finds the tensors, or parts of tensors, with the shape of a module of a leaf."""
        whole, row = leaf.weight_shape, leaf.name
        if row.part is None or whole not in self.shapes:
            return self.shapes.get(whole)
        key = whole, row.weight_groups.index(row.where("o")), row.part, row.alternating
        left = [name for name in self.shapes[whole].names if name not in self.used]
        if key not in self.parts and left:
            self.parts[key] = self._measure(left, row)
        return self.parts.get(key)

    def _tie(self, row: Name, names: list[str]) -> tuple[Name, list[str]]:
        """Tells an embedding from the head that has the same values."""
        tables = [name for name in names if name.endswith(f".{self.table}.weight")]
        if len(names) == 2 and len(tables) == 1:
            [head] = {*names} - {*tables}
            return dataclasses.replace(row, tied=head.rpartition(".")[0]), tables
        return dataclasses.replace(row, tied=self.head), names


def _round_factor(x: float) -> float:
    """Rounds to 1, or to a number whose square, or that of its inverse, is an integer."""
    if math.isclose(x, 1, rel_tol=ROUNDED):
        return 1.0
    for power in (2, -2):
        n = round(x**power)
        if n and math.isclose(x, n ** (1 / power), rel_tol=ROUNDED):
            return n ** (1 / power)
    return x


def _find(path: str, x: np.ndarray, site: Site, tensors: _Candidates, is_part: bool) -> Held | None:
    """Tries all rows that fit the use of a leaf, the simplest first."""
    for row in _list_rows(site, x.shape, is_part):
        lengths = [x.shape[d] for d in row.where("ls")]
        modules = tuple(map(str, range(math.prod(lengths))))
        if found := tensors.match(NamedLeaf((), x, x.shape, row, modules)):
            return Held(path, found[1], np.array(found[0], object).reshape(lengths))
    return None


def _list_rows(site: Site, shape: tuple[int, ...], is_part: bool) -> Iterator[Name]:
    """Lists the rows that a leaf may have, by its use; path, module and parameter are missing."""
    parts = [((j, n), a) for n in (2, 3) for a in (False, True) for j in range(n)]
    each = itertools.product(
        _list_axes(site, shape), (False, True), (False, True), parts if is_part else [(None, False)]
    )
    for axes, transposed, interleaved, (part, alternating) in each:
        index = axes.find("s")
        module = ".".join(["{}"] * axes.count("l")) or "m"
        if interleaved and (part or "o" not in axes or shape[axes.rindex("o")] % 2):
            continue
        try:
            yield Name(
                "",
                module if index < 0 else (module,) * shape[index],
                axes,
                transposed=transposed,
                part=part,
                alternating=alternating,
                interleaved=interleaved,
            )
        except ValueError:  # the fields contradict each other
            continue


def _list_axes(site: Site, shape: tuple[int, ...]) -> Iterator[str]:
    """Lists letters for the axes of a leaf."""
    n = len(shape)
    if site.kind is None:
        letters = [("o", "l", "e")] * n if n < 4 else []
        yield from ["vo", "io", "oi"] if n == 2 else ["o" + "k" * (n - 1)] if n > 2 else []
        yield from sorted(map("".join, itertools.product(*letters)), key=lambda x: x.count("e"))
        return
    own = ["" for _ in shape]
    # Experts that all compute are outputs.
    for axes, choice in zip(site.layout[:3], ("les", "i", "oles"), strict=True):
        for d in axes:
            own[d] = choice
    if site.kind == "embed":
        own = ["v" if x == "i" else "o" for x in own]
    if site.kind == "conv":
        own = ["ik" if x == "i" else x for x in own]
    found = map("".join, itertools.product(*own))

    def oddness(axes: str) -> tuple[int, ...]:
        return sum(axes[d] == "l" for d in site.layout.outputs), axes.count("s"), axes.count("e")

    for axes in sorted(found, key=oddness):
        small = axes.find("s") < 0 or 1 < shape[axes.find("s")] <= SLOTS
        if small and (site.kind != "conv" or axes.count("i") == 1):
            yield axes


def _write(row: Name) -> str:
    """Writes a row as code, without fields that have their defaults."""
    words = list[str]()
    for n, field in enumerate(dataclasses.fields(row)):
        x = getattr(row, field.name)
        if n < 3 or x != field.default:
            text = f"lambda shape: {x.factor!r}" if isinstance(x, Times) else _quote(x)
            words.append(text if n < 3 else f"{field.name}={text}")
    return f"Name({', '.join(words)})"


def _quote(x: object) -> str:
    if isinstance(x, tuple):
        return f"({', '.join(map(_quote, x))})"
    return f"r{x!r}".replace("\\\\", "\\") if isinstance(x, str) and "\\" in x else repr(x)
