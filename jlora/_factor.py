"""One factor of ΔW on its way through the model: an array whose axes follow dimensions of W."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

RANK = -1  # stands for the rank axis where an axis is named by its dimension of W
BROADCAST = -2  # stands for a new dimension along which W repeats

Dims = Sequence[int | None]
Along = Mapping[int, Callable[[jax.Array, int], jax.Array]]


class Unfactorable(Exception):  # noqa: N818 - a signal to the interpreter, never the user's error
    """The result of an operation on W has no factored form."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """A, B or the dropout keys: an array, and the dimension of W that each of its axes follows."""

    value: Any
    dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def axis(self, dim: int) -> int:
        """The axis that follows dimension `dim`."""
        return self.dims.index(dim)

    def move(self, dims: Dims, along: Along) -> "Factor":
        """See `Term.move`."""
        value = self.value
        for axis, dim in enumerate(self.dims):
            if dim in along:
                value = along[dim](value, axis)
        new = {old: i for i, old in enumerate(dims) if old is not None and old >= 0} | {RANK: RANK}
        lost = [axis for axis, dim in enumerate(self.dims) if dim not in new]
        kept = tuple(new[dim] for dim in self.dims if dim in new)
        return Factor(lax.squeeze(value, lost) if lost else value, kept)

    def carry(self, dim: int, length: int = 1) -> "Factor":
        """The same with a leading axis for a dimension of W that it does not follow."""
        if dim in self.dims:
            return self
        value = jnp.broadcast_to(self.value, (length, *self.value.shape))
        return Factor(value, (dim, *self.dims))

    def reshape(self, groups: Sequence["Group"]) -> "Factor":
        """Follows W through a reshape that is the product of `groups`."""
        value, dims = self.value, self.dims
        for group in groups:
            mine = [d for d in group.old if d in dims]
            if not mine:
                continue
            if missing := [d for d in group.old if d not in dims and group.sizes[d] > 1]:
                if any(group.sizes[d] > 1 for d in mine):
                    raise Unfactorable(f"dimensions {missing} and {mine} are merged")
                squeezed = [dims.index(d) for d in mine]
                value = lax.squeeze(value, squeezed)
                dims = tuple(d for d in dims if d not in mine)
                continue
            # Bring the group's axes together, in W's order, at the place of the first of them.
            rest = [i for i, d in enumerate(dims) if d not in mine]
            at = sum(i < dims.index(mine[0]) for i in rest)
            order = rest[:at] + [dims.index(d) for d in mine] + rest[at:]
            value = lax.transpose(value, order)
            lengths = [value.shape[i] for i in range(len(order))]
            value = lax.reshape(value, (*lengths[:at], *group.lengths, *lengths[at + len(mine) :]))
            left, right = [dims[i] for i in rest[:at]], [dims[i] for i in rest[at:]]
            # New dimensions are negative until every group is done, as old ones still mean old.
            dims = (*left, *(_fresh(d) for d in group.new), *right)
        return Factor(value, tuple(_settled(d) for d in dims))

    def arrange(self, dims: Sequence[int]) -> jax.Array:
        """The array with its axes in the order of `dims`, of length 1 where it follows none."""
        value = self.value
        lost = [axis for axis, d in enumerate(self.dims) if d not in dims]
        value = lax.squeeze(value, lost) if lost else value
        kept = [d for d in self.dims if d in dims]
        value = lax.transpose(value, [kept.index(d) for d in dims if d in kept])
        return lax.expand_dims(value, [i for i, d in enumerate(dims) if d not in kept])

    def label(self, names: Sequence[str], rank: str = "Z") -> str:
        """A letter an axis: that of its dimension in `names`, or `rank`."""
        return "".join(rank if d == RANK else names[d] for d in self.dims)

    def spec(self, spec: PartitionSpec) -> "Factor":
        """The partition of this factor, in its place."""
        full = tuple(spec)
        parts = [full[d] if 0 <= d < len(full) else None for d in self.dims]
        return Factor(PartitionSpec(*parts), self.dims)


def _fresh(dim: int) -> int:
    return -2 - dim


def _settled(dim: int) -> int:
    return -2 - dim if dim <= -2 else dim


@dataclasses.dataclass(frozen=True)
class Group:
    """The dimensions `old` that a reshape turns into the dimensions `new` of `lengths`."""

    old: tuple[int, ...]
    sizes: Mapping[int, int]
    new: tuple[int, ...]
    lengths: tuple[int, ...]


def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[Group]:
    """The finest factorization of a reshape of `old` to `new` into independent reshapes.

    >>> [(g.old, g.new) for g in reshape_groups((6, 4, 5), (2, 3, 20))]
    [((0,), (0, 1)), ((1, 2), (2,))]
    """
    if 0 in old:
        raise Unfactorable("a dimension is empty")
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        if i < len(old) and j < len(new) and old[i] == new[j]:
            i, j = i + 1, j + 1
        while (i, j) == (i0, j0) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        groups.append(
            Group(tuple(range(i0, i)), dict(enumerate(old)), tuple(range(j0, j)), new[j0:j])
        )
    return groups
