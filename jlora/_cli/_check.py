"""`jlora check`: whether an engine takes an adapter."""

from pathlib import Path
from typing import Any

from .. import peft
from ._command import Answer
from ._inputs import format_of
from ._words import called


def check(
    folder: Path, engine: str, *, base: Path | None = None, max_lora_rank: int | None = None
) -> Answer:
    """Checks the adapter in `folder`."""
    if engine not in peft.ENGINES:
        known = ", ".join(peft.ENGINES)
        raise ValueError(f"--for: there is no engine {engine!r}; expected one of {known}.")
    match format_of(folder, "DIR"):
        case "huggingface":
            raise ValueError(f"DIR: {folder} holds a model; expected an adapter of PEFT.")
        case "orbax":
            raise ValueError(
                f"DIR: {folder} is of Orbax; write it as PEFT first, with jlora convert."
            )
    words: Any = {"base": ("--base", base), "max_lora_rank": ("--max-lora-rank", None)}
    with called(path=("DIR", folder), **words):
        checked = peft.check(folder, engine, base=base, max_lora_rank=max_lora_rank)
    findings = [finding._asdict() for finding in checked.findings]
    return Answer(str(checked), checked._asdict() | {"findings": findings}, int(bool(findings)))
