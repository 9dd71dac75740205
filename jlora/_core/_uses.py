"""What the model does with its parameter leaves, recorded while sites are searched."""

from collections import defaultdict
from typing import Any, NamedTuple

from ._axes import REPEATED

Axes = frozenset[int]


class ProductUse(NamedTuple):
    """One product with a leaf, in the leaf's own axes.

    Attributes:
        kind: `"dense"`, `"conv"` or `"embed"`.
        inputs: the axes that are contracted, or looked up.
        outputs: the axes that are kept; none where the leaf was cut down to a vector.
    """

    kind: str
    inputs: Axes
    outputs: Axes


class Unsupported(NamedTuple):
    """One use of a leaf that has no factored form.

    Attributes:
        reason: primitive and source line.
        axes: the axes of the leaf in each axis that the weight has there of a length above 1.
        added: whether it is an activation: added to one, concatenated with one, or returned.
    """

    reason: str
    axes: tuple[Axes, ...]
    added: bool = False


class Uses:
    """What each leaf is used for, by path, in program order."""

    def __init__(self) -> None:
        """A record without uses."""
        self.products: dict[str, list[ProductUse]] = defaultdict(list)
        self.unsupported: dict[str, list[Unsupported]] = defaultdict(list)

    def product(self, w: Any, kind: str, roles: Any) -> None:
        """Records a product in which the axes of the weight `w` have `roles`."""
        lengths = w.lengths
        long = [a for a in (*roles.inputs, *roles.outputs) if lengths[a] > 1]
        if any(REPEATED in a.leaf for a in long):
            self.no_product(w, "a product in which it is repeated, as an activation is")
            return
        vector = not roles.outputs and all(lengths[a] == 1 for a in roles.stack)
        if not roles.inputs or not (roles.outputs or vector):
            self.no_product(w, "a product that is no matrix product")
            return
        for path in w.origin.paths:
            inputs, outputs = (_of(path, axes) for axes in (roles.inputs, roles.outputs))
            picked = frozenset(d for p, d in w.picked if p == path)
            if inputs - picked and (vector or outputs - picked):  # one of a stack was looked up
                inputs, outputs = inputs - picked, outputs - picked
            self.products[path].append(ProductUse(kind, inputs, outputs))

    def no_product(self, w: Any, reason: str, added: bool = False) -> None:
        """Records a use of the weight `w` that is no product; a row that was looked up is one."""
        for path in w.origin.paths:
            axes = tuple(_of(path, [a]) for a, n in zip(w.axes, w.shape, strict=True) if n > 1)
            picked = frozenset(d for p, d in w.picked if p == path)
            if picked:
                rest = frozenset().union(*axes) - picked
                self.products[path].append(ProductUse("embed", picked, rest))
            else:
                self.unsupported[path].append(Unsupported(reason, axes, added))


def _of(path: str, axes: Any) -> Axes:
    """Finds the axes of the leaf at `path` that lie in `axes`."""
    return frozenset(d for a in axes for p, d in a.leaf if p == path)
