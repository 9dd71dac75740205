"""`jlora merge`: merges an adapter into the weights of a model."""

from typing import Any

import click

import jlora

from .._folders import check_vacant
from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import IGNORE, NAMES, PREFIX, format_of, format_of_adapter, table


@click.command(cls=Command)
@click.argument("base", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--names", metavar="TABLE", help=NAMES)
@click.option("--follow-links", is_flag=True, help="Follow links out of BASE, and copy the files.")
@click.option(
    "--renamed",
    nargs=2,
    multiple=True,
    metavar="PATTERN NEW",
    help="Replace a regular expression in the names of BASE, which then are ADAPTER's.",
)
@PREFIX
@IGNORE
def merge(
    base: Arg,
    adapter: Arg,
    out: Arg,
    names: str | None,
    follow_links: bool,
    renamed: tuple[tuple[str, str], ...],
    **reading: Any,
) -> Answer:
    """Merge an adapter into a model.

    Adds ADAPTER to the weights of BASE, and writes the model to OUT. BASE is a Hugging Face
    checkpoint (safetensors), or an Orbax checkpoint of parameters. OUT has the same files, names
    and dtypes; a quantized BASE gives floats. New tokens and heads of ADAPTER are added. ADAPTER is
    in PEFT's format, a file of image LoRA, or Orbax. --names is needed to merge Orbax into Hugging
    Face, or PEFT into Orbax.
    """
    call(check_vacant, out)
    kind, adapter_kind = format_of(base, model=True), format_of(adapter)
    if kind == "peft":
        raise ValueError(
            f"BASE must be a model and ADAPTER an adapter; got {base} ({kind}) and "
            f"{adapter} ({adapter_kind})."
        )
    flags = {"--follow-links": follow_links, "--renamed": renamed}
    given = " and ".join(name for name in flags if flags[name])
    if given and kind == "orbax":
        raise ValueError(
            f"{given} can only be given for a Hugging Face checkpoint; {base} is {kind}. "
            f"Leave {given} out."
        )
    format_of_adapter(adapter)
    left_out: list[str] = []
    if kind == "orbax":
        params = base.with_value(call(jlora.checkpoint.base_values, base))
        if adapter_kind == "peft":
            tree = call(jlora.peft.load, adapter, params, table(names), **reading)
        else:  # it must fit if it was saved with its base
            is_known = call(jlora.checkpoint.read, adapter).base is not None
            tree = call(jlora.checkpoint.restore, adapter, base=params if is_known else None)
        call(jlora.checkpoint.export, out, call(jlora.merge, params, adapter.with_value(tree)))
    else:
        options = {"follow_links": follow_links, "renamed": renamed, **reading}
        if adapter_kind == "orbax":
            adapter = adapter.with_value(call(jlora.checkpoint.restore, adapter))
            options["names"] = table(names)
        left_out = call(jlora.peft.export_merged, base, adapter, out, **options)
    text = f"{out}: {base} with {adapter} merged, as {kind}"
    text += f"; not copied: {', '.join(left_out)}" if left_out else ""
    fields = {"base": str(base), "adapter": str(adapter), "out": str(out), "format": kind}
    return Answer(text, fields | {"left_out": left_out})
