"""`jlora inspect`: what an adapter holds and how much it changes."""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from .. import analysis, peft
from .._adapters import Decomposed, LowRank, Replaced, is_node, state, weight_shape
from .._table import aligned, readable
from .._tree import count, size_in_bytes
from ._inputs import Opened, format_of, open_adapter
from ._words import called

SHOWN = 4  # singular values in the table
HEADER = ("site", "inputs × outputs", "r", "s", "‖ΔW‖", "stable", "effective", "singular values")
RIGHT = set(HEADER[1:-1])
MATRICES = ("tensor", "shape", "scheme", "bits", "size")


class Matrix(NamedTuple):
    """ΔW at one index of a site's stack."""

    indices: tuple[int, ...]
    norm: float
    spectrum: list[float]
    stable_rank: float
    effective_rank: float


class Site(NamedTuple):
    """A leaf with A and B; of DoRA ΔW is s·A·B, to whose sum with W the norms are given."""

    name: str
    method: str
    shape: tuple[int, ...]
    inputs: int
    outputs: int
    rank: int
    scale: float
    dropout: float
    dtype: str
    parameters: int
    matrices: list[Matrix]


class Full(NamedTuple):
    """A leaf that is trained in full, or so many rows of one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int


class Inspection(NamedTuple):
    """The answer; `every` asks the table for a row a matrix."""

    adapter: Opened
    sites: list[Site]
    full: list[Full]
    rows: list[Full]
    every: bool

    exit_code = 0

    def as_json(self) -> dict[str, Any]:
        """All numbers; null where they are not finite."""
        return {
            "path": str(self.adapter.folder),
            "format": self.adapter.format,
            **self.adapter.about,
            "parameters": count(self.adapter.leaves),
            "bytes": size_in_bytes(self.adapter.leaves),
            "sites": [_site_json(site) for site in self.sites],
            "full": [x._asdict() for x in self.full],
            "rows": [x._asdict() for x in self.rows],
        }

    def __str__(self) -> str:
        rows = [row for site in self.sites for row in _rows(site, self.every)]
        lines = aligned(HEADER, rows, RIGHT) if rows else []
        if any(site.method == "DoRA" for site in self.sites):
            lines.append("DoRA: ΔW is s·A·B, and W + ΔW is given norms")
        for what, leaves in (("in full", self.full), ("rows of", self.rows)):
            own = [(x.name, "×".join(map(str, x.shape)), x.dtype) for x in leaves]
            lines += [""] * bool(lines and own)
            lines += aligned((what, "shape", "dtype"), own, {"shape"}) if own else []
        leaves = self.adapter.leaves
        about = "".join(f"; {k.replace('_', ' ')} {v}" for k, v in _plain(self.adapter.about))
        total = f"{count(leaves):,} parameters, {readable(size_in_bytes(leaves))}"
        matrices = sum(len(site.matrices) for site in self.sites)
        sites = f"{len(self.sites)} sites of {matrices} matrices, {len(self.full)} leaves in full"
        sites += f", rows of {len(self.rows)}" if self.rows else ""
        return "\n".join([*lines, "", f"{self.adapter.format} adapter: {sites}; {total}{about}"])


class Quantized(NamedTuple):
    """The answer: what is quantized, and where."""

    folder: Path
    matrices: list[peft.Matrix]

    exit_code = 0

    def as_json(self) -> dict[str, Any]:
        """A row for each tensor."""
        return {"path": str(self.folder), "tensors": [m._asdict() for m in self.matrices]}

    def __str__(self) -> str:
        lines = aligned(MATRICES, list(map(_quantized, self.matrices)), {"bits", "size"})
        size = readable(sum(m.size for m in self.matrices))
        return "\n".join([*lines, "", f"{self.folder}: {len(self.matrices)} matrices, {size}"])


def inspect(folder: Path, *, every: bool = False) -> "Inspection | Quantized":
    """Reads the adapter in `folder` and measures each ΔW; of a quantized model its matrices."""
    is_model = format_of(folder, "DIR") == "huggingface" and "weights" in peft.holds(folder)
    with called(path=("DIR", folder)):
        if is_model and (found := peft.matrices(folder)):
            return Quantized(folder, found)
    adapter = open_adapter(folder, "DIR")
    rows = {name: x.v for name, x in adapter.leaves.items() if isinstance(x, Replaced)}
    full = {name: x for name, x in adapter.leaves.items() if not is_node(x)}
    low = {name: x for name, x in adapter.leaves.items() if name not in rows and name not in full}
    bar = tqdm(low.items(), "sites", disable=None, leave=False, file=sys.stderr)
    sites = [_site(name, x) for name, x in bar]
    in_full, with_rows = (list(map(_full, x.items())) for x in (full, rows))
    return Inspection(adapter, sites, in_full, with_rows, every)


def _full(item: tuple[str, Any]) -> Full:
    name, x = item
    return Full(name, tuple(x.shape), str(x.dtype), math.prod(x.shape))


def wide(x: Any) -> LowRank:
    """A and B of a site in float64."""
    if not isinstance(x, LowRank | Decomposed):
        raise TypeError(f"only a LowRank or Decomposed is measured; got {x!r}.")
    a, b = (np.asarray(y, np.float64) for y in (x.a, x.b))
    return LowRank(a, b, x.scale, x.layout)  # pyright: ignore[reportArgumentType]


@jax.jit
def _measure(x: LowRank) -> tuple[jax.Array, ...]:
    spectrum = analysis.delta_spectrum(x)
    ranks = analysis.stable_rank(spectrum), analysis.effective_rank(spectrum)
    return analysis.norm(x), spectrum, *ranks


def _site(name: str, x: LowRank | Decomposed) -> Site:
    shape, layout = weight_shape(x), x.layout
    norm, spectrum, stable, effective = map(np.asarray, _measure(wide(x)))
    indices = itertools.product(*map(range, norm.shape))
    matrices = [
        Matrix(i, float(norm[i]), spectrum[i].tolist(), float(stable[i]), float(effective[i]))
        for i in indices
    ]
    inputs, outputs = (math.prod(shape[d] for d in axes) for axes in layout[1:3])
    rank, dtype = spectrum.shape[-1], str(x.a.dtype)
    method, dropout = ("LoRA", x.dropout) if isinstance(x, LowRank) else ("DoRA", 0.0)
    about = inputs, outputs, rank, x.scale, dropout, dtype, count(state(x))
    return Site(name, method, shape, *about, matrices)


# ------------------------------------------------------------------------------------- printing


def _rows(site: Site, every: bool) -> list[tuple[str, ...]]:
    start = (f"{site.inputs} × {site.outputs}", str(site.rank), f"{site.scale:.4g}")
    if every or len(site.matrices) == 1:
        return [
            (
                site.name + "".join(f"[{i}]" for i in m.indices),
                *start,
                *(f"{x:.4g}" for x in (m.norm, m.stable_rank, m.effective_rank)),
                _values(m.spectrum),
            )
            for m in site.matrices
        ]
    columns = ([getattr(m, f) for m in site.matrices] for f in ("norm", *Matrix._fields[3:]))
    top = _range([m.spectrum[0] for m in site.matrices])
    return [(f"{site.name} ({len(site.matrices)}×)", *start, *map(_range, columns), f"σ₁ {top}")]


def _range(values: Sequence[float]) -> str:
    """The median, the smallest and the largest."""
    return f"{np.median(values):.4g} ({min(values):.4g}…{max(values):.4g})"


def _values(spectrum: Sequence[float]) -> str:
    more = " …" if len(spectrum) > SHOWN else ""
    return " ".join(f"{x:.3g}" for x in spectrum[:SHOWN]) + more


def _plain(about: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in about.items() if v is not None and not isinstance(v, dict)]


def _site_json(site: Site) -> dict[str, Any]:
    return site._asdict() | {"matrices": [_matrix_json(m) for m in site.matrices]}


def _matrix_json(matrix: Matrix) -> dict[str, Any]:
    numbers = {k: finite(v) for k, v in matrix._asdict().items() if isinstance(v, float)}
    return matrix._asdict() | numbers | {"spectrum": [finite(x) for x in matrix.spectrum]}


def finite(x: float) -> float | None:
    """`x`, or None, which JSON has, for what it has not."""
    return x if math.isfinite(x) else None


def _quantized(m: peft.Matrix) -> tuple[str, ...]:
    return (
        m.name,
        "×".join(map(str, m.shape)),
        m.scheme,
        f"{8 * m.size / math.prod(m.shape):.3f}",
        readable(m.size),
    )
