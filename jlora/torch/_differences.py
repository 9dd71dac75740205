"""What differs from PyTorch, as data."""

import dataclasses
import math
from typing import NamedTuple

MOST = 10  # differences that a text lists


class Difference(NamedTuple):
    """A result of `apply` that is not PyTorch's.

    Attributes:
        what: `"output"`; `"output of call 2"`, if that of PyTorch is another one than of its first
            call; `"gradient"`; `"adapted output"`, for one with the adapter.
        where: the path of the output, or of the leaf whose gradient it is.
        error: the largest difference, relative to the largest entry; infinite if the shapes differ,
            or what is not finite.
        bound: how large rounding may be. PyTorch itself tells: it computes in float64 too.
    """

    what: str
    where: str
    error: float
    bound: float

    def __str__(self) -> str:
        name = f"{self.what} {self.where}".strip()
        if math.isinf(self.error):
            return f"{name} has another shape, or is not finite elsewhere"
        return f"{name} is off by {self.error:.1e} of its largest entry; rounding: {self.bound:.1e}"


CAUSES = {
    "output": "an operator that differs, or a branch that asks PyTorch for what JAX has not.",
    "output of call 2": "the model keeps a state from call to call, or draws random numbers.",
    "gradient": "a hook on gradients, or an operator that has another gradient in PyTorch.",
    "adapted output": "the model calls a module that PEFT does not reach, as of a plain list.",
}


@dataclasses.dataclass(frozen=True)
class Differences:
    """What `jlora.torch.compare` found; false if `apply` computes what PyTorch does.

    Attributes:
        found: the results that differ.
        module: the first module, in the order of calls, whose output differs; empty if none does.
    """

    found: tuple[Difference, ...] = ()
    module: str = ""

    def __bool__(self) -> bool:
        return bool(self.found)

    @property
    def cause(self) -> str:
        """What it likely is."""
        return CAUSES[self.found[0].what] if self.found else ""

    def __str__(self) -> str:
        if not self.found:
            return "`apply` computes what PyTorch does."
        lines = ["`apply` does not compute what PyTorch does:", *map(str, self.found[:MOST])]
        lines += [f"and {len(self.found) - MOST} more"] if len(self.found) > MOST else []
        lines += [f"The first module that differs is {self.module}"] if self.module else []
        return "\n  ".join([*lines, f"Likely cause: {self.cause}"])
