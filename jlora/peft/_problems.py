"""Collects all problems with a user's files, and raises them together."""

import warnings
from collections.abc import Callable, Iterable, Mapping

from .._errors import InputError, Problem
from ._file import CONFIG, TensorInfo, explain_name


class Problems:
    """Collects problems until `stop` raises all of them in one error.

    Attributes:
        found: the problems.
        cause: a likely cause of them, with a remedy; empty if none is known.
        unused: names in the configuration that match nothing. PEFT accepts them, as does jlora.
        keys: what a file of another dialect has, by PEFT's keys and names of files.
    """

    def __init__(
        self,
        argument: str,
        sentence: str,
        path: object = None,
        advice: Callable[[], str] = lambda: "",
    ) -> None:
        """Takes fields of the error, and a remedy for tensors without a parameter."""
        self.argument, self.sentence, self.path, self.advice = argument, sentence, path, advice
        self.found: list[Problem] = []
        self.cause = ""
        self.unused: list[str] = []
        self.keys: Mapping[str, str] = {}

    @property
    def config(self) -> str:
        """What the file with the configuration is called."""
        return self.keys.get(CONFIG, CONFIG)

    def add(self, where: str, why: str, remedy: str = "") -> None:
        """Adds a problem with a tensor, module or field; `where` may be any text of a file."""
        self.found.append(Problem(self.keys.get(where, where), why, remedy))

    def add_homeless(self, where: str, why: str) -> None:
        """Adds a tensor or module for which the model has no parameter."""
        self.add(where, why, self.advice())

    def examine(self, tensors: Iterable[TensorInfo]) -> None:
        """Adds tensors of no size, and long names."""
        for key, shape in ((x.key, x.shape) for x in tensors):
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
            sentence = f"{self.sentence} {self.cause}".rstrip()
            raise InputError(self.argument, sentence, path=self.path, problems=self.found)

    def warn(self) -> None:
        """Warns about unused names. The warning points at the caller of the public function."""
        if self.unused:
            text = "; ".join(self.unused[:9])
            warnings.warn(f"{self.config} of the adapter: {text}.", stacklevel=3)
