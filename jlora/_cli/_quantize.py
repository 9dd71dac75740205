"""`jlora quantize`: a model with its matrices in 4 or 8 bits; and what such a model holds."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jlora

from .. import peft
from .._table import aligned, readable
from ._stage import staged

SCHEMES = {"nf4": jlora.NF4, "fp4": jlora.FP4, "int8": jlora.Int8}
HEADER = ("tensor", "shape", "scheme", "bits", "size", "error")


class Quantized(NamedTuple):
    """The answer: what is quantized, and where."""

    folder: Path
    matrices: list[peft.Matrix]

    exit_code = 0

    def as_json(self) -> dict[str, Any]:
        """A row for each tensor."""
        fields = peft.Matrix._fields[:-1]
        rows = [{name: getattr(m, name) for name in fields} for m in self.matrices]
        return {"path": str(self.folder), "tensors": rows}

    def __str__(self) -> str:
        lines = aligned(HEADER, list(map(_row, self.matrices)), {"bits", "size", "error"})
        size = readable(sum(m.size for m in self.matrices))
        return "\n".join([*lines, "", f"{self.folder}: {len(self.matrices)} matrices, {size}"])


def quantize(base: Path, out: Path, scheme: str, skip: str | None) -> Quantized:
    """Writes the model in `base` to `out` with its matrices in few bits."""
    options = {} if skip is None else {"skip": skip}
    found = staged(
        out, lambda path: peft.quantize_checkpoint(base, path, SCHEMES[scheme](), **options)
    )
    return Quantized(out, found)


def _row(m: peft.Matrix) -> tuple[str, ...]:
    return (
        m.name,
        "×".join(map(str, m.shape)),
        m.scheme,
        f"{8 * m.size / math.prod(m.shape):.3f}",
        readable(m.size),
        "-" if m.error is None else f"{m.error:.3g}",
    )
