"""`jlora merge`: merges an adapter into the weights of a model."""

from typing import Any

import click

import jlora

from .._folders import check_vacant
from .._types import PyTree
from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import IGNORE, NAMES, PREFIX, format_of, format_of_adapter, table


@click.command(cls=Command)
@click.argument("base", type=FOLDER)
@click.argument("adapter", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--names", metavar="TABLE", help=NAMES)
@click.option("--follow-links", is_flag=True, help="Follow links out of BASE, and copy the files.")
@click.option("--untie", is_flag=True, help="Give a tied output head its own weight.")
@PREFIX
@IGNORE
def merge(
    base: Arg,
    adapter: Arg,
    out: Arg,
    names: str | None,
    ignore: tuple[str, ...],
    prefix: str | None,
    **options: Any,
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
    if options["untie"] and kind == "orbax":
        raise ValueError(
            f"--untie is for a Hugging Face checkpoint; {base} is {kind}. Leave it out."
        )
    format_of_adapter(adapter)
    left_out: list[str] = []
    if kind == "orbax":
        params = base.with_value(call(jlora.checkpoint.base_values, base))
        tree = _load(adapter, adapter_kind, params, names, ignore, prefix)
        call(jlora.checkpoint.export, out, call(jlora.merge, params, adapter.with_value(tree)))
    else:
        options |= {"ignore": ignore, "prefix": prefix}
        tree = adapter
        if adapter_kind == "orbax":
            tree = adapter.with_value(call(jlora.checkpoint.restore, adapter))
            options["names"] = table(names)
        left_out = call(jlora.peft.export_merged, base, tree, out, **options)
    text = f"{out}: {base} with {adapter} merged, as {kind}"
    text += f"; not copied: {', '.join(left_out)}" if left_out else ""
    fields = {"base": str(base), "adapter": str(adapter), "out": str(out), "format": kind}
    return Answer(text, fields | {"left_out": left_out})


def _load(
    adapter: Arg,
    kind: str,
    params: Arg,
    names: str | None,
    ignore: tuple[str, ...],
    prefix: str | None,
) -> PyTree:
    """Reads an adapter onto the parameters. It must fit them if it was saved with its base."""
    if kind == "peft":
        return call(jlora.peft.load, adapter, params, table(names), ignore=ignore, prefix=prefix)
    known = call(jlora.checkpoint.read, adapter).base is not None
    return call(jlora.checkpoint.restore, adapter, base=params if known else None)
