"""A checkpoint to merge into, and what may have to be added to it first."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .._changed import change
from .._checkpoint import Checkpoint
from .._file import TensorInfo
from ._renaming import Model, Piece, View


class Target(NamedTuple):
    """A checkpoint, and its parameters by the names that the adapter uses."""

    checkpoint: Checkpoint
    model: Model

    @property
    def prefix(self) -> str | None:
        """The first components that the adapter's names have before the checkpoint's.

        None if it is not the same for all names.
        """
        pairs = [(name, view.pieces[0].tensor) for name, view in self.model.items()]
        lost = {name.removesuffix(x) for name, x in pairs if name.endswith("." + x)}
        longer = any(x.endswith("." + name) for name, x in pairs)
        if not lost:
            return None if longer else ""
        is_mixed = longer or len(lost) > 1 or any(name == x for name, x in pairs)
        return None if is_mixed else lost.pop()

    def resize(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> "Target":
        """Gives parameters of one tensor each other shapes, and the checkpoint a configuration."""
        resized = {self.model.tensor(name): shape for name, shape in shapes.items()}
        views = {name: self.model[name]._replace(shape=shape) for name, shape in shapes.items()}
        checkpoint = change(self.checkpoint, config, resized=resized)
        checkpoint.origins |= dict.fromkeys(resized)
        return Target(checkpoint, Model(self.model | views))

    def add(
        self,
        tensors: Mapping[str, TensorInfo],
        config: Mapping[str, Any],
        origin: str | None = None,
    ) -> "Target":
        """Adds tensors by the adapter's names, with the old values of the tensor `origin`.

        If the checkpoint's names lack the prefix of the adapter's, they get it: `transformers`
        does not read a head beside names without it.
        """
        prefix = self.prefix or ""
        added = {name: (info, origin) for name, info in tensors.items()}
        checkpoint = change(self.checkpoint, config, prefix=prefix, added=added)
        views = {name: _rename(view, prefix) for name, view in self.model.items()}
        views |= {name: View(info.shape, (Piece(name),)) for name, info in tensors.items()}
        return Target(checkpoint, Model(views))


def _rename(view: View, prefix: str) -> View:
    pieces = tuple(piece._replace(tensor=prefix + piece.tensor) for piece in view.pieces)
    return view._replace(pieces=pieces)
