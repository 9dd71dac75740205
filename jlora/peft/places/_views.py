"""A parameter of a model, as rows of the tensors of a checkpoint."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
ALL = slice(None)


class Piece(NamedTuple):
    """Rows of a stored tensor, and the rows of the parameter whose values they have.

    Attributes:
        tensor: the name of the tensor.
        at: the rows of the tensor.
        expert: the index of one of several matrices of the parameter, such as the experts of a
            layer, which are tensors of their own; None if the parameter has none.
        rows: the rows of the parameter, or of this matrix.
    """

    tensor: str
    at: slice = ALL
    expert: int | None = None
    rows: slice = ALL


class View(NamedTuple):
    """A parameter: its shape, and the pieces that it consists of."""

    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def tensor(self) -> str:
        """The tensor of the first piece."""
        return self.pieces[0].tensor

    @property
    def is_tensor(self) -> bool:
        """Whether the parameter is a tensor of the checkpoint."""
        return self.pieces == (Piece(self.tensor),)

    def read(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """Puts the parameter together; `read` reads a tensor."""
        if self.is_tensor:
            return read(self.tensor)
        each = [read(piece.tensor)[piece.at] for piece in self.pieces]
        found = np.empty(self.shape, np.result_type(*each))
        for piece, x in zip(self.pieces, each, strict=True):
            whole = found if piece.expert is None else found[piece.expert]
            whole[piece.rows] = x
        return found


class Places(dict[str, View]):
    """Where each parameter of a model is stored, by its name in the model.

    Attributes:
        prefix: the first component that the stored names lack; None if only some lack it, or if
            they have one more.
    """

    prefix: str | None = ""

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of all parameters."""
        return {name: view.shape for name, view in self.items()}

    def tensor(self, name: str) -> str:
        """Returns the first tensor of a parameter, or `name` if the checkpoint has none."""
        return self[name].tensor if name in self else name


def module_of(name: str) -> str:
    """Returns the module of a parameter."""
    return name.rpartition(".")[0]


def last_of(name: str) -> str:
    """Returns the last name of a parameter's module; it is empty if there is no module."""
    return module_of(name).rpartition(".")[2]
