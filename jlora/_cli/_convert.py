"""`jlora convert`: converts adapters between PEFT and Orbax."""

from typing import Any

import click

import jlora

from .._folders import check_vacant
from .._tree import adapter_leaves, count
from .._types import PyTree
from ..peft._recognized import find_image
from ..peft.adapter._config import read_config
from ._command import FOLDER, Answer, Arg, Command, Json, call
from ._inputs import IGNORE, NAMES, PREFIX, format_of_adapter, table


@click.command(cls=Command)
@click.argument("source", type=FOLDER, metavar="IN")
@click.argument("out", type=FOLDER)
@click.option(
    "--profile", type=click.Choice(["vllm"]), help="Write PEFT's format in the form for vLLM."
)
@click.option(
    "--dialect",
    type=click.Choice(jlora.peft.DIALECTS),
    help="Write PEFT's folder, or one file of image LoRA: in a folder OUT, or a file with the name "
    "OUT.safetensors.",
)
@PREFIX
@click.option("--names", metavar="TABLE", help=NAMES)
@click.option(
    "--base",
    type=FOLDER,
    help="An Orbax checkpoint of the base's parameters, or of an adapter that was saved with its "
    "base. Needed to write Orbax; then only shapes are read.",
)
@click.option("--config", type=FOLDER, help="A PEFT adapter whose configuration to keep.")
@IGNORE
def convert(
    source: Arg,
    out: Arg,
    profile: str | None,
    dialect: str | None,
    prefix: str | None,
    ignore: tuple[str, ...],
    **options: Any,
) -> Answer:
    """Convert an adapter from Orbax to PEFT, from PEFT to Orbax, or between dialects.

    Writes the adapter IN to OUT in the other format. Without --profile, A and B are kept bit for
    bit. With --profile vllm, OUT has PEFT's format, one rank for all modules, and the scales
    multiplied into B. With --dialect, OUT is a file of diffusers or kohya, with keys that start
    with --prefix, or PEFT's folder; IN may be any of them.
    """
    call(check_vacant, out)
    kind = format_of_adapter(source)
    written = dialect or "peft"
    if profile is not None and written != "peft":
        raise ValueError(
            f"--profile is for PEFT's format; got --dialect {dialect}. Leave one of them out."
        )
    of_source = prefix if find_image(source.value) else None
    form = {"profile": profile, "dialect": written}
    form["prefix"] = prefix if written != "peft" or of_source is None else None
    if kind == "orbax":
        adapter = _to_peft(source, out, form, ignore, **options)
    elif profile is None and dialect is None:
        adapter = _to_orbax(source, out, {"ignore": ignore, "prefix": prefix}, **options)
        written = "orbax"
    else:
        adapter = _to_form(source, out, {"ignore": ignore, "prefix": of_source}, form, **options)
    fields: Json = {
        "in": str(source),
        "out": str(out),
        "from": kind,
        "to": written,
        "leaves": len(adapter_leaves(adapter)),
        "parameters": count(adapter),
    }
    text = f"{out}: {fields['leaves']} leaves of {fields['parameters']:,} parameters as {written}"
    if profile == "vllm":
        fields["rank"] = read_config(out.value)["r"]
        text += f", for vLLM with --max-lora-rank {fields['rank']} or more"
    return Answer(text, fields)


def _to_peft(
    source: Arg,
    out: Arg,
    form: Json,
    ignore: tuple[str, ...],
    names: str | None,
    base: Arg | None,
    config: Arg | None,
) -> PyTree:
    rows = table(names)
    fields = None if config is None else call(read_config, config, ignore=ignore)
    adapter = call(jlora.checkpoint.restore, source)
    if base is not None:
        params = base.with_value(call(jlora.checkpoint.base_values, base))
    elif call(jlora.checkpoint.read, source).base is None:
        raise ValueError(
            f"IN: {source} was saved without its base, so the base's shapes are not known. Give "
            "--base, an Orbax checkpoint of the base's parameters."
        )
    else:
        params = Arg("the base", None, call(jlora.checkpoint.base_shapes, source))
    given = source.with_value(adapter)
    call(jlora.peft.save, out, params, given, rows, config=fields, **form)
    return adapter


def _to_orbax(
    source: Arg, out: Arg, reading: Json, names: str | None, base: Arg | None, config: Arg | None
) -> PyTree:
    if config is not None:
        raise ValueError("--config is for writing PEFT, but OUT is an Orbax checkpoint.")
    rows = table(names)
    if base is None:
        raise ValueError(
            "--base is needed to read a PEFT adapter: an Orbax checkpoint of the base's parameters "
            "(only shapes are read), or of an adapter that was saved with its base."
        )
    shapes = call(jlora.checkpoint.base_shapes, base)
    adapter = call(jlora.peft.load, source, base.with_value(shapes), rows, **reading)
    call(jlora.checkpoint.save, out, adapter, (), base=shapes)
    return adapter


def _to_form(source: Arg, out: Arg, reading: Json, form: Json, **unused: Any) -> PyTree:
    for name, value in unused.items():
        if value is not None:
            raise ValueError(f"--{name} is not needed: IN and OUT are PEFT adapters. Leave it out.")
    found = call(jlora.peft.read, source, **reading)
    call(jlora.peft.write, out, source.with_value(found), **form)
    return dict(found.leaves)
