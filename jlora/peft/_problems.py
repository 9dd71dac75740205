"""Problems with a user's files are collected and raised together."""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

from ._file import CONFIG, TensorInfo, itemize, show


class Problems:
    """Collects problems until `stop` raises all of them in one error.

    Attributes:
        found: what is wrong.
        unused: names in a configuration that match nothing; PEFT accepts them, and so does jlora.
    """

    def __init__(self, title: str, advice: Callable[[Sequence[str]], str] = lambda found: ""):
        """The error begins with `title` and ends with the `advice` for what was found."""
        self.title, self.advice = title, advice
        self.found: list[str] = []
        self.unused: list[str] = []

    def add(self, where: str, why: str) -> Literal[False]:
        """Adds what is wrong with a tensor, module or field, which the files may call anything.

        Returns:
            False, for the caller that answers whether it is right.
        """
        self.found.append(f"{show(where)}: {why}")
        return False

    def add_not_floating(self, tensor: TensorInfo) -> None:
        """Adds a tensor of integers or the like, where numbers are expected."""
        self.add(tensor.key, f"expected a floating-point dtype, got {tensor.dtype}")

    def stop(self, *more: str) -> None:
        """Raises if anything is wrong, the problems that are passed included."""
        self.found += more
        if self.found:
            raise ValueError(f"{self.title}. {itemize(self.found)}{self.advice(self.found)}")

    def warn(self) -> None:
        """Warns about what is unused, on behalf of the function that the user called."""
        if self.unused:
            text = "; ".join(self.unused[:9])
            warnings.warn(f"{CONFIG} of the adapter: {text}.", stacklevel=3)
