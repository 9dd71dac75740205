"""A weight on its way through the model, with the change that an adapter makes to it."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from .. import _compat
from ._axes import Along, Axis, Factor, Group, ProductAxes, Unfactorable, map_factors
from ._change import Change
from ._packed import Packed


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a weight comes from, and what may be done with it.

    Attributes:
        paths: the paths of the leaves that it is made of. Equal layers differ in nothing else, so
            they are not compared.
        materialize: whether W + ΔW may be formed where it has no factored form.
        uses: records its products and other uses while sites are searched, else None.
        unchecked: mesh axes of the enclosing `shard_map`s that do not check what varies.
    """

    paths: tuple[str, ...] = dataclasses.field(compare=False)
    materialize: bool
    uses: "Recorder | None" = None
    unchecked: frozenset[Any] = frozenset()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """W with the change that is made to it.

    Attributes:
        w: the current W, the factor that has every axis.
        change: the change, whose factors have some of the axes of W.
        origin: the leaves that it comes from.
        picked: axes of the leaves along which one entry was looked up.
        last: the largest name of an axis that was used so far.
    """

    w: Factor | Packed
    change: Change
    origin: Origin = dataclasses.field(metadata={"static": True})
    picked: frozenset[tuple[str | None, int]] = dataclasses.field(
        default=frozenset(), metadata={"static": True}
    )
    last: int = dataclasses.field(default=-1, metadata={"static": True})

    def replace(self, w: Factor | Packed, change: Change | None = None) -> "Weight":
        """Returns a copy with another W and, optionally, another change."""
        change = self.change if change is None else change
        return dataclasses.replace(self, w=w, change=change, last=max(self._names))

    # -------------------------------------------------------------------------------- what W is

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of W."""
        return self.w.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return self.w.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of W."""
        return self.w.dtype

    @property
    def type(self) -> jax.ShapeDtypeStruct:
        """The type of W."""
        return self.w.type

    @property
    def array(self) -> jax.Array:
        """W as an array, without the change."""
        return self.w.array

    @property
    def lengths(self) -> dict[Axis, int]:
        """The length of each axis of W."""
        return self.w.lengths

    def new_names(self) -> Iterator[int]:
        """Yields names that no axis of W has or had."""
        return itertools.count(max(self._names) + 1)

    @property
    def _names(self) -> list[int]:
        return [self.last, *(a.name for a in self.axes)]

    # -------------------------------------------------------------------------------- how it moves

    def along(self, functions: Along) -> "Weight":
        """Applies each function along its axis."""
        change = map_factors(lambda f: f.along(functions), self.change)
        return self.replace(self.w.along(functions), change)

    def transpose(
        self,
        axes: Sequence[Axis],
        shape: Sequence[int] | None = None,
        sharding: NamedSharding | None = None,
    ) -> "Weight":
        """Transposes W to `axes`, and repeats it along new axes to `shape`.

        Old axes that are not among `axes` must have length 1; they are removed.
        """
        lost = [a for a in self.axes if a not in axes]
        shape = [self.lengths[a] for a in axes] if shape is None else shape
        change = map_factors(lambda f: f.without(lost), self.change)
        return self.replace(self.w.without(lost).transpose(axes, shape, sharding), change)

    def reshape(self, shape: Sequence[int], sharding: NamedSharding | None = None) -> "Weight":
        """Reshapes W to `shape`; `Unfactorable` if this merges axes of A with axes of B."""
        groups = reshape_groups(self.axes, self.shape, shape, self.new_names())
        gain = self.change.gain and self.change.gain.reshape(groups)
        deltas = tuple(
            map_factors(lambda f, d=d: f.reshape(groups, [x for x in (d.a, d.b) if x is not f]), d)
            for d in self.change.deltas
        )
        change = dataclasses.replace(self.change, deltas=deltas, gain=gain)
        return self.replace(self.w.reshape(groups, sharding=sharding), change)

    def each(self, f: Callable[[jax.Array], jax.Array]) -> "Weight":
        """Applies `f`, an operation on each element, to W alone."""
        return self.replace(self.w.each(f))

    def mark_varying(self) -> "Weight":
        """Marks the factors as possibly varying over unchecked mesh axes.

        This is needed after a traced value was mixed in.
        """
        unchecked = self.origin.unchecked
        return self.replace(self.w, map_factors(lambda f: f.may_vary(unchecked), self.change))

    @property
    def has_keys(self) -> bool:
        """Whether dropout is active."""
        return any(d.key is not None for d in self.change.deltas)

    def fold_in(self, use: int | jax.Array) -> "Weight":
        """Folds the number of a use into the keys of dropout, so that each has its own mask."""
        fold = lambda f: f.each(lambda x: _fold_in(x, use)) if f.is_key else f  # noqa: E731
        return self.replace(self.w, map_factors(fold, self.change)) if self.has_keys else self

    def mark_picked(self, axes: Sequence[Axis]) -> "Weight":
        """Remembers that one entry was looked up along each of `axes`."""
        return dataclasses.replace(self, picked=self.picked.union(*(a.leaf for a in axes)))

    def as_stack(self) -> "Weight":
        """Repeats every array along the first axis of W, so that `lax.scan` can slice it."""
        first, length = self.axes[0], self.shape[0]
        whole = self.replace(self.w.with_pieces({first: length}))
        return map_factors(lambda f: f.repeat({first: length}).to_front([first]), whole)

    def as_slice(self) -> "Weight":
        """Drops the first axis, which a scan over an `as_stack` weight has sliced."""
        one = map_factors(lambda f: f.replace(f.value, f.axes[1:]), self)
        return one.replace(one.w.with_axes(self.axes[1:], self.shape[1:]))

    # ---------------------------------------------------------------------- what the change makes

    @property
    def is_changed(self) -> bool:
        """Whether an adapter changes it, or its uses are recorded."""
        change, uses = self.change, self.origin.uses
        return bool(change.deltas) or change.gain is not None or uses is not None

    @property
    def is_row(self) -> bool:
        """Whether the change costs no more than an activation."""
        if not self.change.deltas:
            return sum(n > 1 for n in self.shape) <= 1
        return all(d.is_row for d in self.change.deltas)

    def form(self, why: str) -> jax.Array:
        """Forms W' because of `why`; raises `ValueError` if dropout has no input to drop."""
        for d in self.change.deltas:
            if d.key is not None and not d.a.is_row:
                raise ValueError(
                    f"dropout has no input to drop where W + ΔW is formed ({why}). Give this site "
                    "a rule with dropout=0."
                )
        return self.change.of(self.array, self.axes)


Operand = jax.Array | Weight  # of an equation


class Packable(Protocol):
    """A leaf that is no array, but from which W is computed."""

    @property
    def ndim(self) -> int:
        """The number of axes of W."""
        ...

    def packed(self, axes: Sequence[Axis]) -> Packed:
        """Returns W as the arrays from which it is computed, with the axes `axes`."""
        ...


class Recorder(Protocol):
    """Records the uses of weights while sites are searched."""

    def product(self, w: Weight, kind: str, roles: ProductAxes) -> None:
        """Records a product in which the axes of `w` have `roles`."""

    def no_product(self, w: Weight, reason: str, added: bool = False) -> None:
        """Records a use of `w` that is not a product."""


def leaf_weight(
    value: jax.Array | Packable,
    change: Change,
    path: str,
    materialize: bool,
    uses: Recorder | None = None,
) -> Weight:
    """Makes the weight of the leaf at `path`, an array or an object with a method `packed`."""
    # Only a search for sites needs the path in an axis, and the paths of equal layers differ.
    known = [(path, d) for d in range(value.ndim)] if uses is not None else []
    axes = tuple(Axis(d, frozenset(known[d : d + 1])) for d in range(value.ndim))
    unchecked = _compat.unchecked_axes()
    packed = getattr(value, "packed", None)
    w = Factor(value, axes) if packed is None else packed(axes)
    change = map_factors(lambda f: f.may_vary(unchecked), change)
    # The model must be traced with a weight that varies over the mesh as W' does.
    w = jax.tree.map(lambda x: _compat.vary_with(x, jax.tree.leaves(change)), w)
    return Weight(w, change, Origin((path,), materialize, uses, unchecked))


def _fold_in(keys: jax.Array, data: int | jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys.ravel(), data).reshape(keys.shape)


# ---------------------------------------------------------------------------- groups of a reshape


def reshape_groups(
    axes: Sequence[Axis], old: Sequence[int], new: Sequence[int], names: Iterator[int]
) -> list[Group]:
    """Finds the finest factorization of a reshape into independent reshapes.

    An axis that stays alone keeps its name; the other new axes get `names`.

    >>> axes = [Axis(d, frozenset({("w", d)})) for d in range(3)]
    >>> groups = reshape_groups(axes, (6, 4, 5), (2, 3, 20), itertools.count(3))
    >>> [(list(g.old.values()), list(g.new.values())) for g in groups]
    [([6], [2, 3]), ([4, 5], [20])]
    >>> [sorted(d for _, d in axis.leaf) for g in groups for axis in g.new]
    [[0], [0], [1, 2]]
    """
    groups = []
    for (i, i_end), (j, j_end) in _factorize(old, new):
        before = dict(zip(axes[i:i_end], old[i:i_end], strict=True))
        if i_end - i == j_end - j == 1:
            groups.append(Group(before, before))
            continue
        leaf = frozenset().union(*(a.leaf for a in before))
        ones = all(n == 1 for n in before.values())
        after = {Axis(next(names), leaf if n > 1 or ones else frozenset()): n for n in new[j:j_end]}
        groups.append(Group(before, after))
    return groups


def _factorize(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yields the shortest ranges of `old` and `new` that have equal products."""
    if 0 in old:
        raise Unfactorable("an axis is empty")
    i, j = 0, 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        a, b = 1, 1
        if i < len(old) and j < len(new) and old[i] == new[j]:
            i, j = i + 1, j + 1
        while (i, j) == (i0, j0) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        yield (i0, i), (j0, j)
