"""The term of ΔW that only looks: it follows a weight and writes down what it is used for."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ._factor import BROADCAST, Along, Dims, reshape_groups
from ._weight import Roles


@dataclasses.dataclass(frozen=True)
class Use:
    """One linear use of a leaf, in the leaf's own axes."""

    kind: str
    inputs: frozenset[int]
    outputs: frozenset[int]


class Log:
    """What a leaf is used for, in program order."""

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.others: list[str] = []
        self.formed: list[Use] = []


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Probe:
    """A term of ΔW that only looks: for each dimension of W, the axes of the leaf within it."""

    log: Log
    axes: tuple[frozenset[int], ...]
    looked_up: frozenset[int] = frozenset()
    whole: bool = True  # concatenated with activations, it would be one of them

    def move(self, dims: Dims, along: Along) -> "Probe":
        """See `Term.move`."""
        del along
        return self._with(
            frozenset[int]() if d is None else frozenset({d}) if d == BROADCAST else self.axes[d]
            for d in dims
        )

    def reshape(self, old: tuple[int, ...], new: tuple[int, ...]) -> "Probe":
        """See `Term.reshape`."""
        axes = [frozenset[int]()] * len(new)
        for group in reshape_groups(old, new):
            ones = all(group.sizes[d] == 1 for d in group.old)
            for i in group.new:
                if new[i] == 1 and not ones:  # an axis that the reshape adds
                    continue
                axes[i] = frozenset().union(*(self.axes[d] for d in group.old))
        return self._with(axes)

    def _with(self, axes: Any) -> "Probe":
        return dataclasses.replace(self, axes=tuple(axes))

    def pad(self, config: Sequence[tuple[int, int, int]], shape: tuple[int, ...]) -> "Probe":
        """See `Term.pad`."""
        del config, shape
        return self

    def map(self, f: Callable[[jax.Array], jax.Array]) -> "Probe":
        """See `Term.map`."""
        del f
        return self

    def scale_by(self, scalar: jax.Array) -> "Probe":
        """See `Term.scale_by`."""
        del scalar
        return self

    def unstack(self) -> tuple[Any, Callable[[Any], "Probe"]]:
        """See `Term.unstack`."""
        return (), lambda _: self._with(self.axes[1:])

    def specs(self, spec: Any) -> "Probe":
        """See `Term.specs`."""
        del spec
        return self

    def indexed(self, dims: Sequence[int]) -> "Probe":
        """See `Term.indexed`."""
        return dataclasses.replace(self, looked_up=self._union(dims))

    @property
    def row(self) -> bool:
        """See `Term.row`."""
        return False

    def follows(self, indexed: Sequence[int], others: int) -> bool:
        """See `Term.follows`: what is left of a matrix is a row, of a stack a matrix."""
        del indexed
        return others >= 2

    def look_up(self, f: Callable[..., Any], dims: Dims, indexed: Sequence[int]) -> "Probe":
        """See `Term.look_up`."""
        del f
        rows = self._union(indexed)
        moved = self.indexed(indexed)
        return moved._with(rows if d is None else self.axes[d] for d in dims)

    def use(self, kind: str, roles: Roles, product: Callable[..., Any]) -> None:
        """See `Term.use`: writes it down."""
        del product
        inputs, outputs = self._union(roles.inputs), self._union(roles.outputs)
        if inputs - self.looked_up and outputs - self.looked_up:  # one of a stack was looked up
            inputs, outputs = inputs - self.looked_up, outputs - self.looked_up
        if BROADCAST in inputs | outputs:
            self.log.others.append("a product in which it is broadcast, as an activation is")
        elif roles.inputs and roles.outputs:
            self.log.uses.append(Use(kind, inputs, outputs))
        else:
            self.log.others.append("a product that is no matrix product")

    def dense(self, w: Any, why: str) -> None:
        """See `Term.dense`: writes down what stands in the way."""
        if self.looked_up:
            rest = frozenset().union(*self.axes) - self.looked_up
            self.log.uses.append(Use("embed", self.looked_up, rest))
            return
        self.log.others.append(why)
        if w.ndim >= 2:
            self.log.formed.append(Use("formed", self._union(range(w.ndim - 1)), self.axes[-1]))

    def _union(self, dims: Sequence[int]) -> frozenset[int]:
        return frozenset().union(*(self.axes[d] for d in dims))
