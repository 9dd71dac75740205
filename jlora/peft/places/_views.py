"""A parameter of a model, as boxes of the tensors of a checkpoint."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Box = tuple[int | slice, ...]  # of the first axes of an array; `()` is all of it


class Piece(NamedTuple):
    """A box of a stored tensor, and the box of the parameter whose values it has.

    Attributes:
        tensor: the name of the tensor.
        at: the box of the tensor.
        own: the box of the parameter. An index is that of one of several matrices, such as the
            experts of a layer, which are tensors of their own.
    """

    tensor: str
    at: Box = ()
    own: Box = ()

    @property
    def expert(self) -> int | None:
        """The index of one of several matrices; None if the parameter has none."""
        first = self.own[0] if self.own else None
        return first if isinstance(first, int) else None

    @property
    def rows(self) -> slice:
        """The rows of the parameter, or of one of its matrices."""
        rows = self.own[self.expert is not None :]
        return rows[0] if rows and isinstance(rows[0], slice) else slice(None)

    @property
    def start(self) -> int | None:
        """The first row in the tensor; None if the tensor has no others."""
        return self.at[0].start if self.at and isinstance(self.at[0], slice) else None


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
            found[piece.own] = x
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
