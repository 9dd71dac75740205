"""`jlora merge` and `convert`: the commands that write a folder."""

from pathlib import Path
from typing import Any

import jlora

from .. import checkpoint, peft
from .._folders import check_vacant
from .._tree import adapter_leaves, count
from .._types import PyTree
from ._command import Answer
from ._inputs import format_of, table
from ._words import Given, called

# What functions call by the names of options.
OPTIONS: dict[str, Given] = {
    name: (f"--{name.replace('_', '-')}", None)
    for name in ("names", "follow_links", "profile", "config")
}


# -------------------------------------------------------------------------------------- merge


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    names: str | None = None,
    follow_links: bool = False,
) -> Answer:
    """Writes the model in `base` with `adapter` merged to `out`, in the format of `base`.

    Args:
        base: a checkpoint of Hugging Face, or the parameters in Orbax.
        adapter: an adapter of PEFT or of Orbax.
        out: a folder that is not there yet.
        names: the name table, as the user types it, where formats of PyTorch and JAX meet.
        follow_links: whether files of `base` may be links out of it.
    """
    check_vacant(out, "OUT")
    formats = format_of(base, "BASE", model=True), format_of(adapter, "ADAPTER")
    if formats[0] == "peft" or formats[1] == "huggingface":
        raise ValueError(
            f"BASE must be a model and ADAPTER an adapter; got {base} ({formats[0]}) and "
            f"{adapter} ({formats[1]})."
        )
    left_out: list[str] = []
    options: Any = {"follow_links": follow_links}
    if formats[0] == "orbax":
        _merge_orbax(base, adapter, out, names)
    else:
        given: Any = adapter
        if formats[1] == "orbax":
            with called(path=("ADAPTER", adapter)):
                given = checkpoint.restore(adapter)
            options["names"] = table(names)
        words: Any = {"path": ("ADAPTER", adapter), "out": ("OUT", out)} | OPTIONS
        with called(adapter=("ADAPTER", adapter), src_dir=("BASE", base), **words):
            left_out = peft.export_merged(base, given, out, **options)
    fields = {"base": str(base), "adapter": str(adapter), "out": str(out), "format": formats[0]}
    text = f"{out}: {base} with {adapter} merged, as {formats[0]}"
    text += f"; not copied: {', '.join(left_out)}" if left_out else ""
    return Answer(text, fields | {"left_out": left_out})


def _merge_orbax(base: Path, adapter: Path, out: Path, names: str | None) -> None:
    with called(path=("BASE", base)):
        params = checkpoint.base_values(base)
    with called(adapter=("ADAPTER", adapter), base=("BASE", base)):
        merged = jlora.merge(params, _adapter(adapter, params, names))
    with called(path=("OUT", out)):
        checkpoint.export(out, merged)


def _adapter(folder: Path, params: PyTree, names: str | None) -> PyTree:
    if format_of(folder, "ADAPTER") == "peft":
        rows = table(names)
        with called(path=("ADAPTER", folder), **OPTIONS):
            return peft.load(folder, params, rows)
    with called(path=("ADAPTER", folder)):
        known = checkpoint.read(folder).base is not None
        return checkpoint.restore(folder, base=params if known else None)


# ------------------------------------------------------------------------------------ convert


def convert(
    source: Path,
    out: Path,
    *,
    names: str | None = None,
    base: Path | None = None,
    profile: str | None = None,
    config: Path | None = None,
) -> Answer:
    """Writes the adapter in `source` to `out`: PEFT's as Orbax, Orbax's or with a profile as PEFT.

    Args:
        source: the folder of the adapter.
        out: a folder that is not there yet, or an empty one.
        names: the name table, as the user types it.
        base: the base's parameters in Orbax, or an adapter of Orbax that knows its base.
        profile: None or `"vllm"`.
        config: the folder of an adapter of PEFT whose configuration is to be kept.
    """
    check_vacant(out, "OUT")
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
    return Answer(text, fields)


def _to_peft(
    source: Path,
    out: Path,
    names: str | None,
    base: Path | None,
    profile: str | None,
    config: Path | None,
) -> PyTree:
    rows = table(names)
    with called(path=("--config", config)):
        fields = None if config is None else peft.read_config(config)
    with called(path=("IN", source)):
        adapter = checkpoint.restore(source)
        if base is None and checkpoint.read(source).base is None:
            raise ValueError(
                f"IN: {source} was saved without its base, so that the base's shapes are not "
                "known. Give --base, an Orbax checkpoint of the base's parameters."
            )
        params = checkpoint.base_shapes(source) if base is None else None
    with called(path=("--base", base)):
        params = checkpoint.base_values(base) if base is not None else params
    words: Any = {"base": ("the base", None) if base is None else ("--base", base)} | OPTIONS
    with called(adapter=("IN", source), path=("OUT", out), **words):
        peft.save(out, params, adapter, rows, profile=profile, config=fields)
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
    with called(path=("--base", base)):
        params = checkpoint.base_shapes(base)
    with called(path=("IN", source), base=("--base", base), **OPTIONS):
        adapter = peft.load(source, params, rows)
    with called(path=("OUT", out)):
        checkpoint.save(out, adapter, (), base=params)
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
    with called(path=("IN", source), out=("OUT", out), **OPTIONS):
        peft.to_vllm(source, out)
        return peft.read(source)
