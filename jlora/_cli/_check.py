"""`jlora check`: which parts of an adapter an engine refuses or drops."""

from typing import Any

import click

import jlora

from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import IGNORE, format_of_adapter


@click.command(cls=Command)
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    required=True,
    help="vllm, or tpu-inference (vLLM on TPUs).",
)
@click.option(
    "--base",
    type=FOLDER,
    help="The served model, a Hugging Face checkpoint, to compare names and shapes. Only its "
    "configuration and headers are read.",
)
@click.option("--max-lora-rank", type=int, help="The server's option, if you set it there.")
@IGNORE
def check(folder: Arg, engine: str, **options: Any) -> Answer:
    """Check whether an engine supports an adapter.

    Shows what ENGINE refuses of the PEFT adapter in DIR, and what it drops silently, with a remedy
    for each, and exit code 1. If there is nothing, shows a command that starts the engine, with
    exit code 0.
    """
    if format_of_adapter(folder, "PEFT") == "orbax":
        raise ValueError(f"DIR: {folder} is an Orbax adapter; write it as PEFT with jlora convert.")
    found = call(jlora.peft.check, folder, engine, **options)
    findings = [finding._asdict() for finding in found.findings]
    return Answer(str(found), found._asdict() | {"findings": findings}, int(bool(findings)))
