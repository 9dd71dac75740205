"""`jlora inspect`: what an adapter holds and how much it changes."""

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from .. import analysis, peft
from .._adapters import Decomposed, LowRank, Replaced, is_node, state, weight_shape
from .._report import aligned, readable
from .._tree import count, size_in_bytes
from ._command import Answer
from ._inputs import Opened, format_of, open_adapter
from ._words import called

SHOWN = 4  # singular values in the table
HEADER = ("site", "inputs × outputs", "r", "s", "‖ΔW‖", "stable", "effective", "singular values")
MATRICES = ("tensor", "shape", "scheme", "bits", "size")

Fields = dict[str, Any]  # of JSON


def inspect(folder: Path, *, every: bool) -> Answer:
    """Measures each ΔW of the adapter in `folder`, or lists the matrices of a quantized model.

    `every` asks for a row for each matrix of a stack.
    """
    is_model = format_of(folder, "DIR") == "huggingface" and "weights" in peft.holds(folder)
    with called(path=("DIR", folder)):
        if is_model and (found := peft.matrices(folder)):
            return list_quantized(folder, found)
    adapter = open_adapter(folder, "DIR")
    rows = {name: x.v for name, x in adapter.leaves.items() if isinstance(x, Replaced)}
    full = {name: x for name, x in adapter.leaves.items() if not is_node(x)}
    low = {name: x for name, x in adapter.leaves.items() if name not in rows and name not in full}
    bar = tqdm(low.items(), "sites", disable=None, leave=False, file=sys.stderr)
    fields = {
        "path": str(folder),
        "format": adapter.format,
        **adapter.about,
        "parameters": count(adapter.leaves),
        "bytes": size_in_bytes(adapter.leaves),
        "sites": [_site(name, x) for name, x in bar],
        "full": _leaves(full),
        "rows": _leaves(rows),
    }
    return Answer(_describe(adapter, fields, every), fields)


def list_quantized(folder: Path, found: Sequence[peft.Matrix]) -> Answer:
    """The matrices of a quantized model, and what they take."""
    rows = [
        (
            m.name,
            _times(m.shape),
            m.scheme,
            f"{8 * m.size / math.prod(m.shape):.3f}",
            readable(m.size),
        )
        for m in found
    ]
    lines = aligned(MATRICES, rows, {"bits", "size"})
    size = readable(sum(m.size for m in found))
    text = "\n".join([*lines, "", f"{folder}: {len(found)} matrices, {size}"])
    return Answer(text, {"path": str(folder), "tensors": [m._asdict() for m in found]})


# --------------------------------------------------------------------------------------- measuring


def _leaves(leaves: Mapping[str, Any]) -> list[Fields]:
    return [
        {"name": name, "shape": x.shape, "dtype": str(x.dtype), "parameters": math.prod(x.shape)}
        for name, x in leaves.items()
    ]


def wide(x: Any) -> LowRank:
    """A and B of a node in float64."""
    if not isinstance(x, LowRank | Decomposed):
        raise TypeError(f"only a LowRank or Decomposed is measured; got {x!r}.")
    a, b = (np.asarray(y, np.float64) for y in (x.a, x.b))
    return LowRank(a, b, x.scale, x.layout)  # pyright: ignore[reportArgumentType]


@jax.jit
def _measure(x: LowRank) -> dict[str, jax.Array]:
    spectrum = analysis.delta_spectrum(x)
    return {
        "norm": analysis.norm(x),
        "spectrum": spectrum,
        "stable_rank": analysis.stable_rank(spectrum),
        "effective_rank": analysis.effective_rank(spectrum),
    }


def _site(name: str, x: LowRank | Decomposed) -> Fields:
    """A node and each of its ΔW; for DoRA, whose norms are of W + ΔW, ΔW is s·A·B."""
    shape, measured = weight_shape(x), {k: np.asarray(v) for k, v in _measure(wide(x)).items()}
    inputs, outputs = (math.prod(shape[d] for d in axes) for axes in x.layout[1:3])
    return {
        "name": name,
        "method": "LoRA" if isinstance(x, LowRank) else "DoRA",
        "shape": shape,
        "inputs": inputs,
        "outputs": outputs,
        "rank": measured["spectrum"].shape[-1],
        "scale": x.scale,
        "dropout": x.dropout if isinstance(x, LowRank) else 0.0,
        "dtype": str(x.a.dtype),
        "parameters": count(state(x)),
        "matrices": [
            {"indices": i} | {k: v[i].tolist() for k, v in measured.items()}
            for i in itertools.product(*map(range, measured["norm"].shape))
        ],
    }


# ---------------------------------------------------------------------------------------- printing


def _describe(adapter: Opened, fields: Fields, every: bool) -> str:
    sites, full, rows = fields["sites"], fields["full"], fields["rows"]
    measured = [row for site in sites for row in _rows(site, every)]
    lines = aligned(HEADER, measured, HEADER[1:-1]) if measured else []
    if any(site["method"] == "DoRA" for site in sites):
        lines.append("DoRA: ΔW is s·A·B, and W + ΔW is given norms")
    for what, leaves in (("in full", full), ("rows of", rows)):
        own = [(x["name"], _times(x["shape"]), x["dtype"]) for x in leaves]
        lines += [""] * bool(lines and own)
        lines += aligned((what, "shape", "dtype"), own, {"shape"}) if own else []
    matrices = sum(len(site["matrices"]) for site in sites)
    found = f"{len(sites)} sites of {matrices} matrices, {len(full)} leaves in full"
    found += f", rows of {len(rows)}" if rows else ""
    found += f"; {fields['parameters']:,} parameters, {readable(fields['bytes'])}"
    for name, value in adapter.about.items():
        if value is not None and not isinstance(value, dict):
            found += f"; {name.replace('_', ' ')} {value}"
    return "\n".join([*lines, "", f"{adapter.format} adapter: {found}"])


def _rows(site: Fields, every: bool) -> list[tuple[str, ...]]:
    """The rows of a site: one for each matrix, or one for all of a stack."""
    matrices = site["matrices"]
    start = (f"{site['inputs']} × {site['outputs']}", str(site["rank"]), f"{site['scale']:.4g}")
    numbers = ("norm", "stable_rank", "effective_rank")
    if every or len(matrices) == 1:
        return [
            (
                site["name"] + "".join(f"[{i}]" for i in m["indices"]),
                *start,
                *(f"{m[name]:.4g}" for name in numbers),
                " ".join(f"{x:.3g}" for x in m["spectrum"][:SHOWN])
                + " …" * (len(m["spectrum"]) > SHOWN),
            )
            for m in matrices
        ]
    columns = [_range([m[name] for m in matrices]) for name in numbers]
    top = _range([m["spectrum"][0] for m in matrices])
    return [(f"{site['name']} ({len(matrices)}×)", *start, *columns, f"σ₁ {top}")]


def _range(values: Sequence[float]) -> str:
    """The median, the smallest and the largest."""
    return f"{np.median(values):.4g} ({min(values):.4g}…{max(values):.4g})"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
