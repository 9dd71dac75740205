"""Named axes of a weight, and the factors whose axes follow them.

The model transposes, reshapes, slices and scans its weights before it multiplies with them. Each
axis of a weight has a name that stays its own through all of that, and A and B say of each of their
axes which axis of the weight it follows. So a transpose of W touches neither A nor B, and a slice
of W's columns slices B alone.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec


class Axis(NamedTuple):
    """An axis of a weight.

    Attributes:
        name: tells it from the other axes of the weight. It follows from what the model does with
            the weight, so that it is the same in each trace.
        leaf: the axes of parameter leaves that lie in it, each as path and number, and `REPEATED`
            where the weight was repeated.
    """

    name: int
    leaf: frozenset[tuple[str | None, int]] = frozenset()


RANK = Axis(-1)
REPEATED = (None, -1)


def axes_of_leaf(path: str, ndim: int) -> tuple[Axis, ...]:
    """The axes of a weight that is still the parameter leaf at `path`."""
    return tuple(Axis(d, frozenset({(path, d)})) for d in range(ndim))


def new_names(axes: Sequence[Axis]) -> Iterator[int]:
    """Names that none of `axes` has."""
    return iter(range(max((a.name for a in axes), default=-1) + 1, 10**9))


class Unfactorable(Exception):  # noqa: N818 - a signal to the interpreter, never the user's error
    """The result of an operation on W has no factored form.

    `added` says that W is added to an activation or joined with one, so that it is one itself.
    """

    def __init__(self, *reason: str, added: bool = False) -> None:
        super().__init__(*reason)
        self.added = added


Along = Mapping[Axis, Callable[[jax.Array, int], jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array whose axes follow axes of a weight; along the weight's others it is constant.

    Attributes:
        value: the array.
        axes: for each of its axes that of the weight, or `RANK`.
        varying: mesh axes over which it may vary within a `shard_map` that does not check this.
    """

    value: Any
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    varying: frozenset[Any] = dataclasses.field(default=frozenset(), metadata={"static": True})

    def replace(self, value: Any, axes: Sequence[Axis] | None = None) -> "Factor":
        """The same with another array, of axes of its own if they are given."""
        return Factor(value, self.axes if axes is None else tuple(axes), self.varying)

    def without(self, axes: Collection[Axis]) -> "Factor":
        """The same without those of `axes` that have length 1, along which it is constant."""
        at = [i for i, a in enumerate(self.axes) if a in axes and self.value.shape[i] == 1]
        if not at:
            return self
        kept = [a for i, a in enumerate(self.axes) if i not in at]
        return self.replace(lax.squeeze(self.value, at), kept)

    @property
    def is_key(self) -> bool:
        """Whether it holds keys of a dropout."""
        return jnp.issubdtype(self.value.dtype, jax.dtypes.prng_key)

    @property
    def is_row(self) -> bool:
        """Whether it has one entry for each of the rank."""
        return all(a == RANK or n == 1 for a, n in zip(self.axes, self.value.shape, strict=True))

    def axis(self, axis: Axis) -> int:
        """The number of the axis that follows `axis`."""
        return self.axes.index(axis)

    def length(self, axis: Axis) -> int:
        """The length of the axis that follows `axis`."""
        return self.value.shape[self.axis(axis)]

    def along(self, functions: Along) -> "Factor":
        """Each of `functions` of the array and the number of the axis that follows its axis."""
        value = self.value
        for i, axis in enumerate(self.axes):
            if axis in functions:
                value = functions[axis](value, i)
        return self.replace(value)

    def may_vary(self, mesh_axes: Iterable[Any]) -> "Factor":
        """The same, which may vary over `mesh_axes` too."""
        return Factor(self.value, self.axes, self.varying.union(mesh_axes))

    def renamed(self, names: Mapping[Axis, Axis]) -> "Factor":
        """The same with other names for axes."""
        return self.replace(self.value, [names.get(a, a) for a in self.axes])

    def repeated(self, axis: Axis, length: int) -> "Factor":
        """The same with a leading axis, along which it is constant, if it does not follow that."""
        if axis in self.axes:
            return self
        value = jnp.broadcast_to(self.value, (length, *self.value.shape))
        return self.replace(value, (axis, *self.axes))

    def to_front(self, axes: Sequence[Axis]) -> "Factor":
        """The same with its axes `axes` first, in this order."""
        rest = [a for a in self.axes if a not in axes]
        return self.replace(self.arranged([*axes, *rest]), [*axes, *rest])

    def arranged(self, axes: Sequence[Axis]) -> jax.Array:
        """The array with its axes in the order of `axes`, of length 1 where it follows none."""
        order = [self.axis(a) for a in axes if a in self.axes]
        value = lax.transpose(self.value, order)
        return lax.expand_dims(value, [i for i, a in enumerate(axes) if a not in self.axes])

    def reshaped(self, groups: Sequence["Group"], others: Sequence["Factor"]) -> "Factor":
        """Follows W through a reshape; `others` are the factors that it is multiplied with."""
        f = self
        for group in groups:
            f = f.without(group.old)
            if not any(a in f.axes for a in group.old):
                continue
            for axis, length in group.old.items():
                if axis not in f.axes and length > 1:
                    if any(axis in other.axes for other in others):
                        raise Unfactorable("axes of A and of B are merged")
                    f = f.repeated(axis, length)
            f = f.to_front([a for a, length in group.old.items() if length > 1])
            n = sum(length > 1 for length in group.old.values())
            new = {a: length for a, length in group.new.items() if length > 1}
            value = lax.reshape(f.value, (*new.values(), *f.value.shape[n:]))
            f = f.replace(value, (*new, *f.axes[n:]))
        return f

    def label(self, letters: Mapping[Axis, str]) -> str:
        """A letter for each axis, as in an einsum."""
        return "".join(letters[a] for a in self.axes)

    def spec(self, of_weight: Mapping[Axis, Any]) -> PartitionSpec:
        """Its partition, where that of the weight's axes is `of_weight`."""
        return PartitionSpec(*(of_weight.get(a) for a in self.axes))


class Group(NamedTuple):
    """The axes `old` of a weight that a reshape turns into the axes `new`, with their lengths."""

    old: dict[Axis, int]
    new: dict[Axis, int]


def reshape_groups(
    axes: Sequence[Axis], old: tuple[int, ...], new: tuple[int, ...], names: Iterator[int]
) -> tuple[list[Group], tuple[Axis, ...]]:
    """The finest factorization of a reshape into independent reshapes, and the new axes.

    An axis that is alone before and after stays as it is; the others get `names`.

    >>> axes = axes_of_leaf("w", 3)
    >>> groups, axes = reshape_groups(axes, (6, 4, 5), (2, 3, 20), new_names(axes))
    >>> [(list(g.old.values()), list(g.new.values())) for g in groups]
    [([6], [2, 3]), ([4, 5], [20])]
    >>> [sorted(d for _, d in axis.leaf) for axis in axes]
    [[0], [0], [1, 2]]
    """
    groups, result = [], []
    for (i, i_end), (j, j_end) in _factorize(old, new):
        if i_end - i == j_end - j == 1:
            result.append(axes[i])
            continue
        leaf = frozenset().union(*(a.leaf for a in axes[i:i_end]))
        ones = all(n == 1 for n in old[i:i_end])
        added = [Axis(next(names), leaf if n > 1 or ones else frozenset()) for n in new[j:j_end]]
        groups.append(
            Group(
                dict(zip(axes[i:i_end], old[i:i_end], strict=True)),
                dict(zip(added, new[j:j_end], strict=True)),
            )
        )
        result += added
    return groups, tuple(result)


def _factorize(
    old: tuple[int, ...], new: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of `old` and of `new` whose products are equal, as short as can be."""
    if 0 in old:
        raise Unfactorable("an axis is empty")
    i, j = 0, 0
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        if i < len(old) and j < len(new) and old[i] == new[j]:
            i, j = i + 1, j + 1
        while (i, j) == (i0, j0) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        yield (i0, i), (j0, j)
