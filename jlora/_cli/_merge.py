"""`jlora merge`: a model with an adapter added to its weights."""

from pathlib import Path

import jlora

from .. import checkpoint, peft
from .._types import PyTree
from . import _base
from ._command import Done
from ._names import table
from ._read import format_of
from ._stage import staged


def merge(
    base: Path, adapter: Path, out: Path, *, names: str | None = None, requantize: bool = False
) -> Done:
    """Writes the model in `base` with `adapter` merged to `out`, in the format of `base`.

    Args:
        base: a checkpoint of Hugging Face, or the parameters in Orbax.
        adapter: an adapter of PEFT or of Orbax.
        out: a folder that is not there yet.
        names: the name table, as the user types it, where formats of PyTorch and JAX meet.
        requantize: whether to quantize again what is quantized in `base`.
    """
    formats = format_of(base, "BASE", model=True), format_of(adapter, "ADAPTER")
    if formats[0] == "peft" or formats[1] == "huggingface":
        raise ValueError(
            f"BASE must be a model and ADAPTER an adapter; got {base} ({formats[0]}) and "
            f"{adapter} ({formats[1]})."
        )
    left_out: list[str] = []
    match formats:
        case "huggingface", "peft":
            left_out = staged(
                out, lambda p: peft.export_merged(base, adapter, p, requantize=requantize)
            )
        case "huggingface", _:
            tree = checkpoint.restore(adapter)
            rows = table(names)
            left_out = staged(
                out,
                lambda p: peft.export_merged(base, tree, p, names=rows, requantize=requantize),
            )
        case _:
            _merge_orbax(base, adapter, out, names)
    fields = {"base": str(base), "adapter": str(adapter), "out": str(out), "format": formats[0]}
    text = f"{out}: {base} with {adapter} merged, as {formats[0]}"
    text += f"; not copied: {', '.join(left_out)}" if left_out else ""
    return Done(text, fields | {"left_out": left_out})


def _merge_orbax(base: Path, adapter: Path, out: Path, names: str | None) -> None:
    params = _base.values(base, "BASE")
    merged = _base.plain(jlora.merge(params, _adapter(adapter, params, names)))
    staged(out, lambda path: checkpoint.export(path, merged))


def _adapter(folder: Path, params: PyTree, names: str | None) -> PyTree:
    if format_of(folder, "ADAPTER") == "peft":
        return peft.load(folder, params, table(names))
    known = checkpoint.read(folder).base is not None
    return checkpoint.restore(folder, base=params if known else None)
