"""`jlora check`: whether an engine takes an adapter."""

import click

import jlora

from ._command import FOLDER, Answer, Arg, Command, call
from ._inputs import format_of_adapter


@click.command(cls=Command)
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option(
    "--for",
    "engine",
    metavar="ENGINE",
    required=True,
    help="vllm, tpu-inference (vLLM on TPUs) or sglang.",
)
@click.option(
    "--base",
    type=FOLDER,
    help="The model that is served, a checkpoint of Hugging Face, with which names and shapes are "
    "compared. Only its configuration and headers are read.",
)
@click.option("--max-lora-rank", type=int, help="The server's option, if it is given one.")
def check(folder: Arg, engine: str, base: Arg | None, max_lora_rank: int | None) -> Answer:
    """Show what ENGINE refuses of the adapter of PEFT in DIR, and what it drops silently.

    Exit code 1 with a remedy for each, or 0 and how to start the engine.
    """
    if engine not in jlora.peft.ENGINES:
        known = ", ".join(jlora.peft.ENGINES)
        raise ValueError(f"--for: there is no engine {engine!r}; expected one of {known}.")
    if format_of_adapter(folder, "PEFT") == "orbax":
        raise ValueError(f"DIR: {folder} is of Orbax; write it as PEFT first, with jlora convert.")
    found = call(jlora.peft.check, folder, engine, base=base, max_lora_rank=max_lora_rank)
    findings = [finding._asdict() for finding in found.findings]
    return Answer(str(found), found._asdict() | {"findings": findings}, int(bool(findings)))
