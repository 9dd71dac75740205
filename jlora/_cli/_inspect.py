"""`jlora inspect`: the contents of an adapter, and how much it changes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import click
import numpy as np

import jlora

from .._adapters import Decomposed, LowRank, Replaced, is_node, state, weight_shape
from .._progress import progress
from .._text import align_columns, format_bytes
from .._tree import count, size_in_bytes
from ..peft._checkpoint import holds
from ..peft.formats._dequantize import matrices
from ._command import FOLDER, Answer, Arg, Command, Json, call
from ._inputs import IGNORE, PREFIX, format_of, open_adapter

SHOWN = 4  # singular values in the table
HEADER = ("site", "inputs × outputs", "r", "s", "‖ΔW‖", "stable", "effective", "singular values")
NUMBERS = ("norm", "stable_rank", "effective_rank")
TENSORS = ("tensor", "shape", "scheme", "bits", "size")


@click.command(cls=Command)
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--all", "every", is_flag=True, help="Print a row for each matrix of a stack.")
@PREFIX
@IGNORE
def inspect(folder: Arg, every: bool, ignore: tuple[str, ...], prefix: str | None) -> Answer:
    """Show the sites of an adapter, and how much each changes its weight.

    The columns are inputs × outputs, rank r, scale s, the Frobenius norm of ΔW = s·A·B, its stable
    and effective rank, and its largest singular values, computed from A and B. For stacked layers
    and experts, a row has the median (least…largest).

    DIR may be a file of image LoRA, by diffusers or kohya; kohya writes _ for the dots of names.

    If DIR is a quantized model, show its quantized matrices and their sizes.
    """
    is_model = format_of(folder) == "huggingface" and "weights" in holds(folder.value)
    if is_model and (found := call(matrices, folder)):
        return _list_quantized(folder, found)
    adapter = open_adapter(folder, ignore, prefix)
    leaves = adapter.leaves
    rows = {name: x.v for name, x in leaves.items() if isinstance(x, Replaced)}
    full = {name: x for name, x in leaves.items() if not is_node(x)}
    low = [name for name in leaves if name not in rows and name not in full]
    fields = {
        "path": str(folder),
        "format": adapter.format,
        **adapter.about,
        "parameters": count(leaves),
        "bytes": size_in_bytes(leaves),
        "sites": [_site(name, leaves[name]) for name in progress(low, "sites", leave=False)],
        "full": _list_leaves(full),
        "rows": _list_leaves(rows),
    }
    about = {k: x for k, x in adapter.about.items() if x is not None and not isinstance(x, dict)}
    return Answer("\n".join(_lines(fields, about, every)), fields)


def _list_quantized(folder: Arg, found: Sequence[Any]) -> Answer:
    """Lists the quantized matrices of a model with their sizes."""
    rows = []
    for x in found:
        bits = f"{8 * x.size / math.prod(x.shape):.3f}"
        rows.append((x.name, _times(x.shape), x.scheme, bits, format_bytes(x.size)))
    lines = align_columns(TENSORS, rows, {"bits", "size"})
    lines += ["", f"{folder}: {len(found)} matrices, {format_bytes(sum(x.size for x in found))}"]
    fields = {"path": str(folder), "tensors": [x._asdict() for x in found]}
    return Answer("\n".join(lines), fields)


# --------------------------------------------------------------------------------------- measuring


def _list_leaves(leaves: Mapping[str, Any]) -> list[Json]:
    return [
        {"name": name, "shape": x.shape, "dtype": str(x.dtype), "parameters": math.prod(x.shape)}
        for name, x in leaves.items()
    ]


def _site(name: str, x: LowRank | Decomposed) -> Json:
    """Describes the ΔW of a node, a matrix each. For DoRA this is s·A·B, before normalization."""
    shape = weight_shape(x)
    measured = jlora.analysis.measure(x)._asdict()
    stack, inputs, outputs = (tuple(shape[d] for d in axes) for axes in x.layout[:3])
    return {
        "name": name,
        "method": "LoRA" if isinstance(x, LowRank) else "DoRA",
        "shape": shape,
        "inputs": math.prod(inputs),
        "outputs": math.prod(outputs),
        "rank": measured["spectrum"].shape[-1],
        "scale": x.scale,
        "dropout": x.dropout,
        "dtype": str(x.a.dtype),
        "parameters": count(state(x)),
        "matrices": [
            {"indices": i} | {k: v[i].tolist() for k, v in measured.items()}
            for i in np.ndindex(stack)
        ],
    }


# ---------------------------------------------------------------------------------------- printing


def _lines(fields: Json, about: Json, every: bool) -> list[str]:
    sites, full, rows = fields["sites"], fields["full"], fields["rows"]
    measured = [row for site in sites for row in _rows(site, every)]
    lines = align_columns(HEADER, measured, HEADER[1:-1]) if measured else []
    if any(site["method"] == "DoRA" for site in sites):
        lines.append("DoRA: ΔW is s·A·B, before normalization")
    for what, leaves in (("in full", full), ("rows of", rows)):
        own = [(x["name"], _times(x["shape"]), x["dtype"]) for x in leaves]
        lines += [""] * bool(lines and own)
        lines += align_columns((what, "shape", "dtype"), own, {"shape"}) if own else []
    matrices = sum(len(site["matrices"]) for site in sites)
    found = f"{len(sites)} sites of {matrices} matrices, {len(full)} leaves in full"
    found += f", rows of {len(rows)}" if rows else ""
    found += f"; {fields['parameters']:,} parameters, {format_bytes(fields['bytes'])}"
    found += "".join(f"; {name.replace('_', ' ')} {value}" for name, value in about.items())
    return [*lines, "", f"{fields['format']} adapter: {found}"]


def _rows(site: Json, every: bool) -> list[tuple[str, ...]]:
    """Makes the rows of a site: one for each matrix, or one for a stack."""
    name, matrices = site["name"], site["matrices"]
    start = (f"{site['inputs']} × {site['outputs']}", str(site["rank"]), f"{site['scale']:.4g}")
    if not every and len(matrices) > 1:
        columns = [_range([x[number] for x in matrices]) for number in NUMBERS]
        top = _range([x["spectrum"][0] for x in matrices])
        return [(f"{name} ({len(matrices)}×)", *start, *columns, f"σ₁ {top}")]
    return [
        (
            name + "".join(f"[{i}]" for i in x["indices"]),
            *start,
            *(f"{x[number]:.4g}" for number in NUMBERS),
            " ".join([f"{s:.3g}" for s in x["spectrum"][:SHOWN]] + ["…"] * (site["rank"] > SHOWN)),
        )
        for x in matrices
    ]


def _range(values: Sequence[float]) -> str:
    """Formats the median, the smallest and the largest value."""
    return f"{np.median(values):.4g} ({min(values):.4g}…{max(values):.4g})"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
