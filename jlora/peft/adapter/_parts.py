"""The tensors of an adapter by PyTorch's parameters: headers, and values once they are read."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar

import jax
import numpy as np

from ..._adapters import AdapterLeaf
from ..._arrays import put
from ..._errors import Problem, show
from ..._types import PyTree
from .._file import PREFIX, TensorInfo
from .._recognized import TENSORS
from ..names._kinds import CONV, EXPERTS, ROWS, Kind
from ..names._leaves import NamedLeaf, own_leaf
from ..names._torch_layout import join_factors, join_rows, join_weight
from ._config import PARAMETERS
from ._methods import BY_TENSORS, Method

WRAPPED = ".token_adapter"
INDICES = "trainable_token_indices"
RowNumbers = tuple[int, ...]
T = TypeVar("T", TensorInfo, np.ndarray)


class Part(NamedTuple, Generic[T]):
    """A and B of one parameter, in PEFT's layout.

    Attributes:
        name: PyTorch's parameter.
        kind: its kind.
        key: the name that patterns match: the module, or the parameter if it is targeted by name.
        a: PEFT's A.
        b: PEFT's B.
        scale: s.
        transposed: whether PyTorch stores the weight as the transpose of B·A; None if not known.
        m: the further tensor of its method, or None.
        experts: how many experts A and B are for.
    """

    name: str
    kind: Kind
    key: str
    a: T
    b: T
    scale: float
    transposed: bool | None = None
    m: T | None = None
    experts: int = 1

    @property
    def arrays(self) -> tuple[T, ...]:
        """A, B, and the further tensor if there is one."""
        return (self.a, self.b) if self.m is None else (self.a, self.b, self.m)

    @property
    def method(self) -> Method:
        """Its method."""
        return BY_TENSORS[self.m is not None]

    @property
    def keys(self) -> tuple[str, ...]:
        """The ends of the keys of its tensors."""
        return self.kind.keys + self.method.keys

    @property
    def rank(self) -> int:
        """The rank of one expert."""
        return self.a.shape[0] // self.experts

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of B·A of one expert."""
        return self.b.shape[0], math.prod(self.a.shape[1:])

    @property
    def further_shape(self) -> tuple[int, ...]:
        """The shape of PEFT's magnitudes: one for each output."""
        n = self.b.shape[0]
        return (1, n, *[1] * (len(self.a.shape) - 2)) if self.kind is CONV else (n,)

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of PyTorch's weight, unless its module stores it transposed."""
        rows, columns = self.b.shape[:1], self.a.shape[1:]
        stack = (self.experts,) if self.kind is EXPERTS else ()
        return stack + (columns + rows if self.kind.transposed else rows + columns)

    @property
    def leaf(self) -> NamedLeaf:
        """The leaf of PyTorch's axes that it adapts."""
        return own_leaf(self.name, self.kind.axes.ljust(len(self.weight), "k"), self.weight)

    def shapes(self, weight: tuple[int, ...], transposed: bool) -> list[tuple[int, ...]]:
        """Returns the shapes of A and B for a weight that is B·A, or its transpose."""
        rows, columns, *window = weight[self.kind is EXPERTS :]
        n, inputs = (columns, rows) if transposed else (rows, columns)
        wide = self.rank * self.experts
        return [(wide, inputs, *window), (n, wide, *[1] * len(window))]


class Whole(NamedTuple, Generic[T]):
    """New values of a parameter, or of some rows of an embedding.

    Attributes:
        name: PyTorch's parameter.
        x: the values.
        rows: the numbers of the rows; None for a whole parameter.
    """

    name: str
    x: T
    rows: RowNumbers | None = None

    @property
    def module(self) -> str:
        """PyTorch's module."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> NamedLeaf:
        """The leaf of PyTorch's axes in which it replaces rows."""
        return own_leaf(self.name, ROWS.axes, self.x.shape)

    @property
    def key(self) -> str:
        """The key of the values in the file, or what errors call values that are of none."""
        return getattr(self.x, "key", self.module if self.rows else self.name)


class Parameters(NamedTuple, Generic[T]):
    """The tensors of an adapter by PyTorch's parameters: `Headers`, or `Values` once they are read.

    Attributes:
        parts: A and B.
        full: tensors that replace a parameter, or rows of one.
        frozen: tensors that must equal the base's parameter.
        biases: tensors that `lora_bias` adds to the bias of a module, with their scale.
    """

    parts: list[Part[T]]
    full: Mapping[str, Whole[T]] = {}
    frozen: Mapping[str, Whole[T]] = {}
    biases: Mapping[str, tuple[T, float]] = {}

    @property
    def changed(self) -> list[str]:
        """The parameters that the adapter changes, but for the biases to which it adds."""
        return [*(part.name for part in self.parts), *self.full]

    @property
    def tokens(self) -> dict[str, Whole[T]]:
        """New rows of embeddings."""
        return {name: x for name, x in self.full.items() if x.rows}

    @property
    def whole(self) -> dict[str, Whole[T]]:
        """The tensors of whole parameters."""
        return {n: x for n, x in (*self.full.items(), *self.frozen.items()) if not x.rows}

    def list_unheld(self, form: str) -> list[Problem]:
        """Lists what a dialect or a profile has no form for."""
        found = [Problem(x.name, "trained in full") for x in self.full.values() if not x.rows]
        found += [Problem(x.module, ROWS.name) for x in self.tokens.values()]
        odd = (x for x in self.parts if form in x.kind.refused)
        return [*found, *(Problem(x.key, f"of kind {x.kind.name}") for x in odd)]


def wholes(values: Mapping[str, T]) -> dict[str, Whole[T]]:
    """Makes records of whole parameters."""
    return {name: Whole(name, x) for name, x in values.items()}


def make_node(
    leaf: NamedLeaf, own: Sequence[Part[np.ndarray] | Whole[np.ndarray]], dropout: float
) -> AdapterLeaf:
    """Makes a leaf of an adapter tree from what PEFT has of its parameters."""
    first = own[0]
    if isinstance(first, Part):
        arrays = [x.arrays for x in own if isinstance(x, Part)]
        return join_factors(leaf, arrays, scale=first.scale * leaf.factor, dropout=dropout)
    if first.rows:
        return join_rows(leaf, first.rows, first.x)
    return put(join_weight(leaf, [x.x for x in own if isinstance(x, Whole)]))


Header = Part[TensorInfo]
Headers = Parameters[TensorInfo]
Values = Parameters[np.ndarray]


def list_tensors(tree: PyTree) -> list[TensorInfo]:
    """Lists the tensors of a tree."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_tensor) if _is_tensor(x)]


def fill(own: Parameters[T], values: Mapping[str, np.ndarray]) -> Values:
    """Replaces each header with its values; what has been read stays."""
    return jax.tree.map(lambda x: values[x.key] if _is_tensor(x) else x, own, is_leaf=_is_tensor)


def _is_tensor(x: object) -> TypeGuard[TensorInfo]:
    return isinstance(x, TensorInfo)


def list_changes(drafted: Values, again: Values) -> list[Problem]:
    """Lists what files say otherwise than the adapter that they were made of."""
    after = _list_numbers(again)
    found = list[Problem]()
    for name, (rank, scale, *arrays) in _list_numbers(drafted).items():
        wide, factor, *others = after.get(name, (0, 0.0))
        # The factor of a row of `names`, and alpha / r, may change the last bits of a scale.
        if rank != wide or not math.isclose(scale, factor, rel_tol=1e-15):
            forms = (f"rank {r} and scale {s}" for r, s in ((rank, scale), (wide, factor)))
            found.append(Problem(name, "has {}, but the files say {}".format(*forms)))
        elif len(arrays) != len(others) or not all(map(np.array_equal, arrays, others)):
            found.append(Problem(name, "has other values than the files"))
    return found


def _list_numbers(own: Values) -> dict[str, tuple[Any, ...]]:
    """Lists rank, scale and arrays of each parameter; whole parameters are of scale 1."""
    rows = {name: x.rows or () for name, x in own.full.items()}
    found = {n: (len(rows[n]), 1.0, np.asarray(rows[n]), x.x) for n, x in own.full.items()}
    return found | {x.name: (x.rank, x.scale, *x.arrays) for x in own.parts}


# ---------------------------------------------------------------------------- rows of embeddings


def find_rows(
    fields: Mapping[str, Any], modules: Iterable[str]
) -> tuple[dict[str, RowNumbers], list[str], list[Problem]]:
    """Finds the rows of each module with values, the listed names without values, and problems.

    A name without values may be a head that is tied to an embedding with the same rows. Any other
    is a problem.
    """
    listed = fields.get(INDICES)
    modules = list(modules)
    is_one = not isinstance(listed, dict)  # of the model's input embedding
    listed = {"": listed} if is_one and listed else listed or {}
    listed = {key: tuple(rows) for key, rows in listed.items()}
    if len(modules) > (1 if is_one else PARAMETERS):
        few = "one embedding" if is_one else f"at most {PARAMETERS}"
        why = f"expected rows of {few}; there are values for {len(modules)}"
        return {}, [], [Problem(INDICES, why)]
    found = dict[str, RowNumbers]()
    problems = list[Problem]()
    for module in modules:
        # As in PEFT: the ends of names are compared, also within a component.
        each = {rows for key, rows in listed.items() if module.endswith(key)}
        if len(each) == 1:
            found[module] = each.pop()
        else:
            why = f"{INDICES} lists {'other rows too' if each else 'none of its rows'}"
            problems.append(Problem(f"{PREFIX}{module}{ROWS.keys[0]}", f"unexpected; {why}"))
    alone = [key for key in listed if not any(module.endswith(key) for module in modules)]
    heads = [key for key in alone if listed[key] in found.values()]
    problems += [_without_values(key) for key in alone if key not in heads]
    return found, heads, problems


def _without_values(key: str) -> Problem:
    return Problem(INDICES, f"selects {show(key) or 'rows'}, but {TENSORS} has no values for it")


def list_lone_heads(heads: Iterable[str], modules: Iterable[str]) -> list[Problem]:
    """Lists problems with `heads` that are modules with a weight of their own."""
    modules = list(modules)
    return [_without_values(k) for k in heads if any(module.endswith(k) for module in modules)]


def find_table(
    name: str, tokens: Mapping[str, Whole[T]], tables: Container[str]
) -> Whole[T] | None:
    """Finds the rows of the embedding, one of the `tables`, to which `name` may be tied."""
    others = (x for other, x in tokens.items() if other != name and other in tables)
    return next((x for x in others if x.rows == tokens[name].rows), None)


def list_unequal(
    pairs: Iterable[tuple[TensorInfo, TensorInfo, bool]], values: Mapping[str, np.ndarray]
) -> list[Problem]:
    """Lists heads whose values are not those of the embedding, or their transpose."""
    return [
        Problem(
            head.key,
            f"expected the {'transpose' if is_transposed else 'values'} of {show(table.key)}, got "
            "other values",
        )
        for head, table, is_transposed in pairs
        if not np.array_equal(
            values[head.key], values[table.key].T if is_transposed else values[table.key]
        )
    ]
