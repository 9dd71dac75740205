"""A reshape of a weight as reshapes of few axes, each independent of the others."""

from collections.abc import Iterator, Sequence

from ._axes import Axis, Group, Unfactorable


def reshape_groups(
    axes: Sequence[Axis], old: Sequence[int], new: Sequence[int], names: Iterator[int]
) -> list[Group]:
    """The finest factorization of a reshape into independent reshapes.

    An axis that is alone before and after stays as it is; the others get `names`.

    >>> from jlora._core._axes import axes_of_leaf, new_names
    >>> axes = axes_of_leaf("w", 3)
    >>> groups = reshape_groups(axes, (6, 4, 5), (2, 3, 20), new_names(axes))
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
