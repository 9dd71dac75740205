"""What the user names: folders and what they hold, name tables, functions in modules and files."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jlora

from .._tree import adapter_leaves, name_of
from .._types import PyTree
from ._command import Arg, call

NAMES = """Name table between JAX's paths and PyTorch's modules: bert, roberta, gpt2, llama,
llama-scanned, vit, gpt-oss, llama4, tunix-llama3, tunix-qwen2, tunix-qwen3,
tunix-qwen3-experts, tunix-gemma, tunix-gemma4, gemma3, gemma4, gemma4-experts, gemma2-2b,
keras-hub-llama3, keras-hub-qwen3, keras-hub-gemma3, maxtext-llama, maxtext-qwen3,
maxtext-deepseek-v3, maxtext-gemma4, maxtext-gpt-oss, maxtext-llama4, easydel, module:ATTRIBUTE
or file.py:ATTRIBUTE."""
# Files of Orbax: the first is in every checkpoint, the second in those of one tree.
ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")


class OpenAdapter(NamedTuple):
    """An adapter: its leaves by PyTorch's names of modules (PEFT) or by paths (Orbax)."""

    format: str
    leaves: dict[str, Any]
    about: dict[str, Any]


def open_adapter(given: Arg) -> OpenAdapter:
    """Opens an adapter of PEFT or of Orbax."""
    if format_of_adapter(given) == "peft":
        base = call(jlora.peft.read_config, given).get("base_model_name_or_path")
        return OpenAdapter("peft", call(jlora.peft.read, given), {"base_model": base})
    saved = call(jlora.checkpoint.read, given)
    about = {"step": saved.step, "versions": saved.versions}
    return OpenAdapter("orbax", by_name(call(jlora.checkpoint.restore, given)), about)


def by_name(adapter: PyTree) -> dict[str, Any]:
    """Returns the leaves of an adapter by their paths."""
    return {name_of(path): x for path, x in adapter_leaves(adapter).items()}


def format_of_adapter(given: Arg, expected: str = "PEFT or Orbax") -> str:
    """Returns `peft` or `orbax`; raises for a model."""
    if (kind := format_of(given)) == "huggingface":
        raise ValueError(f"{given.what}: {given} holds a model; expected an adapter of {expected}.")
    return kind


def format_of(given: Arg, *, model: bool = False) -> str:
    """Returns `peft`, `orbax` or `huggingface`.

    A folder with an adapter and a model is an adapter, or with `model=True` a model.
    """
    folder = given.value
    if not folder.is_dir():
        raise FileNotFoundError(f"{given.what}: there is no folder {folder}.")
    held = jlora.peft.holds(folder)
    names = {path.name for path in folder.iterdir()}
    if model and "weights" in held:
        return "huggingface"
    if "adapter" in held:
        return "peft"
    if names & {*ORBAX, "jlora"}:
        return "orbax"
    if "model" in held:
        return "huggingface"
    # The steps of a CheckpointManager, about which Orbax's reader says what to do.
    if any(name.isdigit() for name in names):
        return "orbax"
    raise ValueError(
        f"{given.what}: {folder} holds neither adapter_config.json, as PEFT writes it, nor a "
        "checkpoint of Orbax, nor a model of Hugging Face."
    )


# ------------------------------------------------------------------------- tables and functions


def table(text: str | None) -> tuple[Any, ...]:
    """Finds the table of `--names`: one of jlora's, `module:ATTRIBUTE` or `file.py:ATTRIBUTE`."""
    tables = jlora.peft.TABLES
    choice = f"one of {', '.join(tables)}, module:ATTRIBUTE or file.py:ATTRIBUTE"
    if text is None:
        raise ValueError(f"--names is needed to match PyTorch's modules to paths: {choice}.")
    if text.lower() in tables:
        return tables[text.lower()]
    if ":" not in text:
        raise ValueError(f"--names: there is no table {text!r}; expected {choice}.")
    found, row = attribute(text, "--names"), jlora.peft.Name
    if not isinstance(found, list | tuple) or not all(isinstance(x, row) for x in found):
        raise ValueError(
            f"--names: {text} must be a list of jlora.peft.Name rows; got {type(found).__name__}."
        )
    return tuple(found)


def attribute(text: str, what: str) -> Any:
    """Imports what the user gave as `what`: `module:NAME` or `file.py:NAME`."""
    source, _, name = text.rpartition(":")
    if not source or not name:
        raise ValueError(f"{what}: expected module:NAME or file.py:NAME; got {text!r}.")
    try:
        module = _run(source) if source.endswith(".py") else importlib.import_module(source)
    except Exception as e:
        raise ValueError(f"{what}: {source} cannot be imported ({type(e).__name__}: {e}).") from e
    if not hasattr(module, name):
        raise ValueError(f"{what}: {source} has no {name}.")
    return getattr(module, name)


def _run(file: str) -> ModuleType:
    """Imports a file, as a module that its classes and annotations are found in."""
    name = f"jlora_user_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
