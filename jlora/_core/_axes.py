"""Named axes of a weight, and factors: arrays whose axes have these names.

The model transposes, reshapes, slices and scans its weights before it multiplies with them. Each
axis of a weight keeps its name through all of that. Each axis of A and B has the name of the axis
of W that it follows. So a transpose of W changes neither A nor B, and a slice of W's columns slices
only B. W itself is the factor that has every axis.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .._arrays import abstract

T = TypeVar("T")


class Axis(NamedTuple):
    """An axis of a weight.

    Attributes:
        name: distinguishes it from the other axes of the weight. It depends only on what the model
            does with the weight, so it is the same in each trace.
        leaf: the axes of parameter leaves that it covers, as (path, number); `REPEATED` marks an
            axis made by a broadcast.
    """

    name: int
    leaf: frozenset[tuple[str | None, int]] = frozenset()


RANK = Axis(-1)
REPEATED = (None, -1)


class ProductAxes(NamedTuple):
    """The axes of W that a product batches, contracts and keeps."""

    stack: tuple[Axis, ...]
    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]


class Unfactorable(Exception):  # noqa: N818 - a signal to the interpreter, never the user's error
    """The result of an operation on W has no factored form.

    `added` means that W acts as an activation: it is added to one, or concatenated with one.
    """

    def __init__(self, *reason: str, added: bool = False) -> None:
        super().__init__(*reason)
        self.added = added


Along = Mapping[Axis, Callable[[jax.Array, int], jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array with named axes; it is constant along the other axes of the weight.

    Attributes:
        value: the array.
        axes: the names of its axes; A and B have `RANK`.
        varying: mesh axes over which it may vary within a `shard_map` that does not check this.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora.extend import RANK, Axis, Factor
        >>> a = Factor(jnp.ones((4, 2)), (Axis(0), RANK))
        >>> a.length(RANK)
        2
    """

    value: Any
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    varying: frozenset[Any] = dataclasses.field(default=frozenset(), metadata={"static": True})

    def replace(self, value: jax.Array, axes: Sequence[Axis] | None = None) -> "Factor":
        """Returns a copy with another array and, optionally, other axes."""
        return Factor(value, self.axes if axes is None else tuple(axes), self.varying)

    # ---------------------------------------------------------------- what `Packed` implements too

    @property
    def array(self) -> jax.Array:
        """The array."""
        return self.value

    @property
    def type(self) -> jax.ShapeDtypeStruct:
        """The type of the array."""
        return abstract(self.value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the array."""
        return self.value.dtype

    def each(self, f: Callable[[jax.Array], jax.Array]) -> "Factor":
        """Applies `f`, an operation on each element, to the array."""
        return self.replace(f(self.value))

    def along(self, functions: Along) -> "Factor":
        """Applies each function to the array and the number of its axis."""
        value = self.value
        for i, axis in enumerate(self.axes):
            if axis in functions:
                value = functions[axis](value, i)
        return self.replace(value)

    def without(self, axes: Collection[Axis]) -> "Factor":
        """Removes those of `axes` that have length 1."""
        at = [i for i, a in enumerate(self.axes) if a in axes and self.shape[i] == 1]
        if not at:
            return self
        kept = [a for i, a in enumerate(self.axes) if i not in at]
        return self.replace(lax.squeeze(self.value, at), kept)

    def transpose(
        self, axes: Sequence[Axis], shape: Sequence[int], sharding: NamedSharding | None = None
    ) -> "Factor":
        """Transposes to the order of `axes`, and repeats along the axes that are missing."""
        value = lax.transpose(self.value, [self.axis(a) for a in axes if a in self.axes])
        if len(axes) > len(self.axes):
            at = [i for i, a in enumerate(axes) if a in self.axes]
            value = lax.broadcast_in_dim(value, tuple(shape), at, out_sharding=sharding)
        return self.replace(value, axes)

    def reshape(
        self,
        groups: Sequence["Group"],
        others: Sequence["Factor"] = (),
        sharding: NamedSharding | None = None,
    ) -> "Factor":
        """Reshapes like W; `others` are the factors that it is multiplied with."""
        if self.axes == tuple(a for group in groups for a in group.old):
            new = {a: length for group in groups for a, length in group.new.items()}
            value = lax.reshape(self.value, tuple(new.values()), out_sharding=sharding)
            return self.replace(value, tuple(new))
        f = self
        for group in groups:
            if group.old != group.new:
                f = f._reshape_group(group, others)
        return f

    def _reshape_group(self, group: "Group", others: Sequence["Factor"]) -> "Factor":
        f = self.without(group.old)
        if not any(a in f.axes for a in group.old):
            return f
        old, new = ({a: n for a, n in x.items() if n > 1} for x in group)
        if any(a in other.axes for a in old if a not in f.axes for other in others):
            raise Unfactorable("axes of A and of B are merged")
        f = f.repeat(old).to_front([*old])
        value = lax.reshape(f.value, (*new.values(), *f.shape[len(old) :]))
        return f.replace(value, (*new, *f.axes[len(old) :]))

    def with_pieces(self, _pieces: Mapping[Axis, int]) -> "Factor":
        """Returns itself, because an array can be split into pieces along all axes."""
        return self

    def with_axes(self, axes: Sequence[Axis], _shape: Sequence[int]) -> "Factor":
        """Renames all axes; the array has the shape already."""
        return self.replace(self.value, axes)

    def multiply(
        self, f: Callable[..., jax.Array], *xs: jax.Array, in_turn: Axis | None = None
    ) -> jax.Array:
        """Computes `f(W, *xs)`, which is linear in the first of `xs`."""
        del in_turn  # nothing is to be unpacked
        return f(self.value, *xs)

    # ------------------------------------------------------------------------- for A, B and gains

    @property
    def is_key(self) -> bool:
        """Whether it holds keys of dropout."""
        return jnp.issubdtype(self.dtype, jax.dtypes.prng_key)

    @property
    def is_row(self) -> bool:
        """Whether it is a vector along the rank."""
        return all(a == RANK or n == 1 for a, n in zip(self.axes, self.shape, strict=True))

    def axis(self, axis: Axis) -> int:
        """Returns the position of an axis."""
        return self.axes.index(axis)

    @property
    def lengths(self) -> dict[Axis, int]:
        """The length of each axis."""
        return dict(zip(self.axes, self.shape, strict=True))

    def length(self, axis: Axis) -> int:
        """Returns the length of an axis."""
        return self.shape[self.axis(axis)]

    def may_vary(self, mesh_axes: Iterable[Any]) -> "Factor":
        """Marks it as possibly varying over `mesh_axes` too."""
        return Factor(self.value, self.axes, self.varying.union(mesh_axes))

    def specs(self, of_weight: Mapping[Axis, Any]) -> "Factor":
        """Replaces the array by its PartitionSpec; `of_weight` has the entries of W's, by axis."""
        return Factor(PartitionSpec(*map(of_weight.get, self.axes)), self.axes, self.varying)

    def rename(self, names: Mapping[Axis, Axis]) -> "Factor":
        """Renames axes."""
        return self.replace(self.value, [names.get(a, a) for a in self.axes])

    def repeat(self, lengths: Mapping[Axis, int]) -> "Factor":
        """Broadcasts along the axes of `lengths` that it lacks; they come first."""
        new = {a: n for a, n in lengths.items() if a not in self.axes}
        value = jnp.broadcast_to(self.value, (*new.values(), *self.shape)) if new else self.value
        return self.replace(value, (*new, *self.axes))

    def to_front(self, axes: Sequence[Axis]) -> "Factor":
        """Puts `axes` first, in this order."""
        rest = [a for a in self.axes if a not in axes]
        return self.replace(self.expand_to([*axes, *rest]), [*axes, *rest])

    def expand_to(self, axes: Sequence[Any]) -> jax.Array:
        """Returns the array with the axes `axes`; missing axes have length 1."""
        order = [self.axis(a) for a in axes if a in self.axes]
        value = lax.transpose(self.value, order)
        return lax.expand_dims(value, [i for i, a in enumerate(axes) if a not in self.axes])


def map_factors(f: Callable[..., Any], tree: T, *others: T) -> T:
    """Applies `f` to each `Factor` of a change, a weight or another tree."""
    return jax.tree.map(f, tree, *others, is_leaf=lambda x: isinstance(x, Factor))


class Group(NamedTuple):
    """The axes `old` of a weight that a reshape turns into the axes `new`, with their lengths."""

    old: dict[Axis, int]
    new: dict[Axis, int]
