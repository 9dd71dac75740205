"""The tensors of an adapter by PyTorch's parameters: headers, and values once they are read."""

import math
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeGuard, TypeVar

import jax
import numpy as np

from ..._errors import Problem
from ..._types import PyTree
from .._file import TensorInfo
from ..names._kinds import CONV, ROWS, Kind

MAGNITUDE = ".lora_magnitude_vector"
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
        m: PEFT's magnitudes of DoRA, or None.
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
        """A, B, and the magnitudes if there are any."""
        return (self.a, self.b) if self.m is None else (self.a, self.b, self.m)

    @property
    def rank(self) -> int:
        """The rank of one expert."""
        return self.a.shape[0] // self.experts

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of B·A of one expert."""
        return self.b.shape[0], math.prod(self.a.shape[1:])

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of PEFT's magnitudes: one for each output."""
        n = self.b.shape[0]
        return (1, n, *[1] * (len(self.a.shape) - 2)) if self.kind is CONV else (n,)

    def delta(self, transposed: bool) -> tuple[int, ...]:
        """Returns the shape of ΔW if it is B·A, or its transpose."""
        return self.kind.delta(self.experts, self.b.shape[0], self.a.shape[1:], transposed)


class Tokens(NamedTuple, Generic[T]):
    """Rows of an embedding.

    Attributes:
        module: PyTorch's module.
        rows: the numbers of the k rows.
        v: the new values, (k, dim).
    """

    module: str
    rows: RowNumbers
    v: T


class Parameters(NamedTuple, Generic[T]):
    """The tensors of an adapter by PyTorch's parameters: `Headers`, or `Values` once they are read.

    Attributes:
        parts: A and B.
        full: tensors that replace a parameter.
        frozen: tensors that must equal the base's parameter.
        tokens: rows that replace those of an embedding.
        biases: tensors that `lora_bias` adds to the bias of a module, with their scale.
    """

    parts: list[Part[T]]
    full: Mapping[str, T] = {}
    frozen: Mapping[str, T] = {}
    tokens: Mapping[str, Tokens[T]] = {}
    biases: Mapping[str, tuple[T, float]] = {}

    @property
    def changed(self) -> list[str]:
        """The parameters that the adapter changes, but for the biases to which it adds."""
        return [*(part.name for part in self.parts), *self.full, *self.tokens]

    def list_unheld(self, form: str) -> list[Problem]:
        """Lists what a dialect or a profile has no form for."""
        found = [Problem(name, "trained in full") for name in self.full]
        found += [Problem(x.module, ROWS.name) for x in self.tokens.values()]
        odd = (x for x in self.parts if form in x.kind.refused)
        return [*found, *(Problem(x.key, f"of kind {x.kind.name}") for x in odd)]


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
