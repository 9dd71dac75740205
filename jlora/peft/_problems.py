"""Collects all problems with a user's files, and raises them together."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from .._errors import InputError, Problem
from ._file import CONFIG, TENSORS, TensorInfo, explain_name
from ._recognized import find_cause


class Problems:
    """Collects problems until `stop` raises all of them in one error.

    Attributes:
        found: the problems.
        cause: a likely cause of them, with a remedy; empty if none is known.
        unused: names in the configuration that match nothing. PEFT accepts them, as does jlora.
        keys: what a file of another dialect has, by PEFT's keys and names of files.
    """

    def __init__(self, title: str, path: object = None, advice: Callable[[], str] = lambda: ""):
        """Takes the start of the error, and a remedy for tensors without a parameter."""
        self.title, self.path, self.advice = title, path, advice
        self.found: list[Problem] = []
        self.cause = ""
        self.unused: list[str] = []
        self.keys: Mapping[str, str] = {}

    def add(self, where: str, why: str, remedy: str = "") -> Literal[False]:
        """Adds a problem with a tensor, module or field; `where` may be any text of a file.

        Returns:
            False, so that a predicate can return it.
        """
        for name in (CONFIG, TENSORS):
            why = why.replace(name, self.keys.get(name, name))
        self.found.append(Problem(self.keys.get(where, where), why, remedy))
        return False

    def add_homeless(self, where: str, why: str) -> Literal[False]:
        """Adds a tensor or module for which the model has no parameter."""
        return self.add(where, why, self.advice())

    def examine(self, tensors: Iterable[TensorInfo]) -> None:
        """Looks for a cause in the keys and shapes; adds tensors of no size, and long names."""
        shapes = {x.key: x.shape for x in tensors}
        self.cause = find_cause(shapes)
        for key, shape in shapes.items():
            if why := explain_name(self.keys.get(key, key)):
                self.add(key, why)
            if 0 in shape:
                self.add(key, f"has no values, as its shape is {shape}")

    def add_not_floating(self, tensor: TensorInfo) -> None:
        """Adds a tensor whose dtype is not floating-point."""
        self.add(tensor.key, f"expected a floating-point dtype, got {tensor.dtype}")

    def stop(self, *more: Problem) -> None:
        """Raises if there are problems, including those passed here."""
        self.found += more
        if self.found:
            why = f"{self.title}. {self.cause}".rstrip()
            raise InputError(why, path=self.path, problems=self.found)

    def warn(self) -> None:
        """Warns about unused names. The warning points at the caller of the public function."""
        if self.unused:
            text = "; ".join(self.unused[:9])
            where = self.keys.get(CONFIG, CONFIG)
            warnings.warn(f"{where} of the adapter: {text}.", stacklevel=3)
