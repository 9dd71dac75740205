"""`jlora convert`: an adapter from Orbax to PEFT, from PEFT to Orbax, or to what vLLM takes."""

import functools
from pathlib import Path
from typing import Any

from .. import checkpoint, peft
from .._tree import adapter_leaves, count
from .._types import PyTree
from . import _base
from ._command import Done
from ._names import table
from ._read import format_of
from ._stage import staged


def convert(
    source: Path,
    out: Path,
    *,
    names: str | None = None,
    base: Path | None = None,
    profile: str | None = None,
    config: Path | None = None,
) -> Done:
    """Writes the adapter in `source` to `out`: PEFT's as Orbax, Orbax's or with a profile as PEFT.

    Args:
        source: the folder of the adapter.
        out: a folder that is not there yet, or an empty one.
        names: the name table, as the user types it.
        base: the base's parameters in Orbax, or an adapter of Orbax that knows its base.
        profile: None or `"vllm"`.
        config: the folder of an adapter of PEFT whose configuration is to be kept.
    """
    kind = format_of(source, "IN")
    if kind == "huggingface":
        raise ValueError(f"IN: {source} holds a model; expected an adapter of PEFT or Orbax.")
    if kind == "orbax":
        adapter = _to_peft(source, out, names, base, profile, config)
    elif profile is None:
        adapter = _to_orbax(source, out, names, base, config)
    else:
        adapter = _to_profile(source, out, names, base, config)
    written = "orbax" if kind == "peft" and profile is None else "peft"
    fields: dict[str, Any] = {
        "in": str(source),
        "out": str(out),
        "from": kind,
        "to": written,
        "leaves": len(adapter_leaves(adapter)),
        "parameters": count(adapter),
    }
    text = f"{out}: {fields['leaves']} leaves of {fields['parameters']:,} parameters as {written}"
    if profile == "vllm":
        fields["rank"] = peft.read_config(out)["r"]
        text += f", for vLLM with --max-lora-rank {fields['rank']} or more"
    return Done(text, fields)


def _to_peft(
    source: Path,
    out: Path,
    names: str | None,
    base: Path | None,
    profile: str | None,
    config: Path | None,
) -> PyTree:
    rows = table(names)
    fields = None if config is None else peft.read_config(config)
    adapter = checkpoint.restore(source)
    if base is None:
        remedy = "Give --base, an Orbax checkpoint of the base's parameters."
        params = _base.fingerprinted(source, "IN", remedy)
    else:
        params = _base.values(base, "--base")
    write = functools.partial(peft.save, profile=profile, config=fields)
    staged(out, lambda path: write(path, params, adapter, rows))
    return adapter


def _to_orbax(
    source: Path, out: Path, names: str | None, base: Path | None, config: Path | None
) -> PyTree:
    if config is not None:
        raise ValueError("--config is for what is written as PEFT; OUT is an Orbax checkpoint.")
    rows = table(names)
    if base is None:
        raise ValueError(
            "--base is needed to read an adapter of PEFT: an Orbax checkpoint of the base's "
            "parameters, of which only the shapes are read, or of an adapter that knows its base."
        )
    params = _base.shapes(base, "--base")
    adapter = peft.load(source, params, rows)
    staged(out, lambda path: checkpoint.save(path, adapter, (), base=params))
    return adapter


def _to_profile(
    source: Path,
    out: Path,
    names: str | None,
    base: Path | None,
    config: Path | None,
) -> dict[str, Any]:
    for option, value in (("--names", names), ("--base", base), ("--config", config)):
        if value is not None:
            raise ValueError(f"{option} is not needed: IN is an adapter of PEFT, and so is OUT.")
    staged(out, lambda path: peft.convert(source, path))
    return peft.read(source)
