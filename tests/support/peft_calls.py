"""Every function and command that reads an adapter or a base: what all of them do alike."""

from collections.abc import Callable
from typing import Any

import click.testing
import jax
import numpy as np
from peft_files import Folder, pair, write
from safetensors.numpy import save_file

from jlora import checkpoint, peft
from jlora._cli._app import cli

# Each gets the base, the adapter, the output, and the fields of the adapter to be ignored.
Call = Callable[..., Any]
NAMES = [peft.Name("q/kernel", "q", "io")]
LIKE = {"q": {"kernel": jax.ShapeDtypeStruct((8, 8), np.float32)}}


def folders(root: Folder) -> tuple[Folder, Folder]:
    """A base of one weight, and an adapter for it."""
    root.mkdir(exist_ok=True)
    base = root / "base"
    base.mkdir()
    save_file({"q.weight": np.ones((8, 8), np.float32)}, base / "model.safetensors")
    config = '{"model_type": "llama", "vocab_size": 9, "_name_or_path": "me/base"}'
    for name in ("config.json", "tokenizer.json"):
        (base / name).write_text(config)
    return base, write(root / "adapter", pair("q", 2, 8, 8), r=2)


def command(words: str) -> Call:
    """A command with the folders `base`, `adapter` and `out` for these words."""

    def call(base: Folder, adapter: Folder, out: Folder, *ignore: str) -> str:
        paths = {"base": base, "adapter": adapter, "out": out, "params": out.with_name("params")}
        if "params" in words.split() and not paths["params"].exists():
            checkpoint.export(paths["params"], {"q": {"kernel": np.ones((8, 8), np.float32)}})
        args = [str(paths.get(x, x)) for x in words.split()]
        args += [word for name in ignore for word in ("--ignore", name)]
        found = click.testing.CliRunner().invoke(cli, args)
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        assert "Usage: " not in found.output, found.output  # it would have read nothing
        if found.exit_code:
            raise ValueError(found.output.strip())
        return found.output

    return call


def save(base: Folder, adapter: Folder, out: Folder) -> None:
    """With the name of the base."""
    peft.save(out, LIKE, peft.load(adapter, LIKE, NAMES), NAMES, base_model=base)


# What reads the adapter: functions, and commands.
FUNCTIONS: dict[str, Call] = {
    "load": lambda base, a, out, *ignore: peft.load(a, LIKE, NAMES, ignore=ignore),
    "read": lambda base, a, out, *ignore: peft.read(a, ignore=ignore),
    "export_merged": lambda base, a, out, *ignore: peft.export_merged(base, a, out, ignore=ignore),
    "write": lambda base, a, out, *ignore: peft.write(out, peft.read(a, ignore=ignore), "vllm"),
    "check": lambda base, a, out, *ignore: peft.check(a, "vllm", ignore=ignore),
}
COMMANDS = {
    name: command(name.removeprefix("jlora "))
    for name in (
        "jlora merge base adapter out",
        "jlora merge params adapter out --names peft_calls:NAMES",
        "jlora inspect adapter",
        "jlora check adapter --for vllm",
        "jlora diff adapter adapter",
        "jlora convert adapter out --profile vllm",
        "jlora convert adapter out --base params --names peft_calls:NAMES",
    )
}
ADAPTERS = FUNCTIONS | COMMANDS
# What reads the base.
BASES: dict[str, Call] = {
    "export_merged": FUNCTIONS["export_merged"],
    "load_base": lambda base, a, out: peft.load_base(base, LIKE, NAMES),
    "save_base": lambda base, a, out: peft.save_base(
        out, peft.load_base(base, LIKE, NAMES), NAMES, config=base
    ),
    "save": save,
    "check of a base": lambda base, a, out: peft.check(a, "vllm", base=base),
    "jlora merge": COMMANDS["jlora merge base adapter out"],
    "jlora check --base": command("check adapter --for vllm --base base"),
}
