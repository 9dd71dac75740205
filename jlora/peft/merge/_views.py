"""The parameters of a model, as rows of the tensors of a checkpoint.

A tensor may have several parameters, such as queries, keys and values; a parameter may consist of
several tensors, such as those of single experts.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ..names._leaves import FUSED
from ._blocks import Rows
from ._replace import Shapes


class Piece(NamedTuple):
    """Rows of a parameter in a tensor of the checkpoint.

    Attributes:
        tensor: its name.
        expert: the expert whose rows these are; None if the parameter has no experts.
        start: the first row, in the expert or the parameter.
        rows: the number of rows; 0 for all.
        at: the place of the first row in the tensor; None if the tensor has no other rows.
        heads: the heads in which rows of the first and the second half alternate in the tensor, for
            rotary embeddings; 0 if the rows have the parameter's order.
    """

    tensor: str
    expert: int | None = None
    start: int = 0
    rows: int = 0
    at: int | None = None
    heads: int = 0

    @property
    def own(self) -> Rows:
        """The rows of the expert, or of the parameter, in the order of the tensor."""
        if not self.heads:
            return slice(self.start, self.start + self.rows)
        return np.arange(self.rows).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)


class View(NamedTuple):
    """A parameter of the model: its shape, and the pieces that it consists of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def tensor(self) -> str:
        """The tensor of the first piece."""
        return self.pieces[0].tensor

    @property
    def is_tensor(self) -> bool:
        """Whether the parameter is a tensor of the checkpoint."""
        return self.pieces == (Piece(self.tensor),)


Named = Mapping[str, View]  # by the names in the model
Experts = Mapping[str, re.Match[str]]

_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight")


def view_tensors(shapes: Shapes) -> dict[str, View]:
    """Makes a parameter of each tensor."""
    return {name: View(shape, (Piece(name),)) for name, shape in shapes.items()}


def split(name: str, view: View, heads: int) -> dict[str, View]:
    """Finds the parameters that each have an equal part of a tensor's rows.

    Braces list them in order, such as `attn.{q~,k~,v}_proj.weight`. Where `~` is, the halves of
    each of the `heads` alternate.
    """
    before, _, rest = name.partition("{")
    inside, _, after = rest.partition("}")
    parts = inside.split(",")
    rows, odd = divmod(sum(view.shape[:1]), len(parts))
    if odd or not rows or ("~" in inside and (heads < 1 or rows % (2 * heads))):
        return {view.tensor: view}
    found = {}
    for i, part in enumerate(parts):
        piece = Piece(view.tensor, None, 0, rows, i * rows, heads * part.endswith("~"))
        found[before + part.removesuffix("~") + after] = View((rows, *view.shape[1:]), (piece,))
    return found


def find_experts(names: Iterable[str]) -> Experts:
    """Finds the weights of single experts, with the components of their names."""
    return {name: found for name in names if (found := _EXPERT.fullmatch(name))}


def join_experts(named: Named, stored: Mapping[str, View], experts: Experts) -> dict[str, View]:
    """Makes the parameters of all experts of each module: (experts, rows, columns)."""
    modules: dict[str, dict[str, dict[int, View]]] = {}
    new = find_experts(name for name in named if name not in stored)
    for name, found in ({**experts, **new} if new else experts).items():
        view = named.get(name)
        if view is not None and view.is_tensor and len(view.shape) == 2:
            parts = modules.setdefault(found["module"], {})
            parts.setdefault(found["part"], {})[int(found["expert"])] = view
    views = {}
    for module, parts in modules.items():
        for parameter, ways in FUSED.items():
            for way in ways:
                if view := _stack([parts.get(part, {}) for part in way]):
                    views[f"{module}.{parameter}"] = view
    return views


def join_modules(named: Named, wanted: Iterable[str]) -> dict[str, View]:
    """Makes the weights of gates that are two in the checkpoint, if one of them is `wanted`."""
    gate, up, both = "gate_proj.weight", "up_proj.weight", "gate_up_proj.weight"
    views = {}
    for name, first in named.items() if any(name.endswith(f".{both}") for name in wanted) else ():
        second = named.get(name.removesuffix(gate) + up)
        if not (name.endswith(f".{gate}") and second and first.is_tensor and second.is_tensor):
            continue
        if len(first.shape) == 2 and first.shape[1:] == second.shape[1:]:
            n, m = first.shape[0], second.shape[0]
            pieces = Piece(first.tensor, rows=n), Piece(second.tensor, start=n, rows=m)
            views[name.removesuffix(gate) + both] = View((n + m, first.shape[1]), pieces)
    return views


def _stack(parts: list[dict[int, View]]) -> View | None:
    """Concatenates the rows of `parts` for each expert; None if their shapes do not fit."""
    count = len(parts[0])
    sizes = [{view.shape for view in part.values()} for part in parts]
    if not count or any(set(part) != set(range(count)) for part in parts):
        return None
    if any(len(each) > 1 for each in sizes):
        return None
    rows, columns = zip(*(next(iter(each)) for each in sizes), strict=True)
    if len(set(columns)) > 1:
        return None
    pieces = [
        Piece(part[e].tensor, e, sum(rows[:i]), rows[i])
        for e in range(count)
        for i, part in enumerate(parts)
    ]
    return View((count, sum(rows), columns[0]), tuple(pieces))
