"""A checkpoint to merge into, and what may have to be added to it first."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .._changed import change
from .._checkpoint import Checkpoint
from .._file import TensorInfo
from ..places._views import Piece, Places, View


class Target(NamedTuple):
    """A checkpoint, and its parameters by the names that the adapter uses."""

    checkpoint: Checkpoint
    model: Places

    def resize(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> "Target":
        """Gives parameters of one tensor each other shapes, and the checkpoint a configuration."""
        resized = {self.model.tensor(name): shape for name, shape in shapes.items()}
        views = {name: self.model[name]._replace(shape=shape) for name, shape in shapes.items()}
        checkpoint = change(self.checkpoint, config, resized=resized)
        model = Places(self.model | views)
        model.prefix = self.model.prefix
        return Target(checkpoint, model)

    def add(
        self,
        tensors: Mapping[str, TensorInfo],
        config: Mapping[str, Any],
        prefix: str,
        origins: Mapping[str, str] = {},
    ) -> "Target":
        """Adds tensors by the adapter's names, with the old values of the tensors `origins`.

        All other tensors get the prefix that the adapter's names have and theirs lack:
        `transformers` does not read a head beside names without it.
        """
        added = {info.key: (info, origins.get(name)) for name, info in tensors.items()}
        checkpoint = change(self.checkpoint, config, prefix=prefix, added=added)
        views = {name: _rename(view, prefix) for name, view in self.model.items()}
        views |= {name: View(info.shape, (Piece(info.key),)) for name, info in tensors.items()}
        return Target(checkpoint, Places(views))


def _rename(view: View, prefix: str) -> View:
    pieces = tuple(piece._replace(tensor=prefix + piece.tensor) for piece in view.pieces)
    return view._replace(pieces=pieces)
