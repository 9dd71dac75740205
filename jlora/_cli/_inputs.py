"""Opens the user's folders, name tables, and functions in modules and files."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click

import jlora

from .._tree import adapter_leaves, name_of
from .._types import PyTree
from ..peft._checkpoint import holds
from ..peft._recognized import find_image, recognize
from ._command import Arg, call

TABLES = f"{', '.join(jlora.peft.TABLES)}, module:ATTRIBUTE or file.py:ATTRIBUTE"
NAMES = f"Name table between JAX's paths and PyTorch's modules: {TABLES}."
IGNORE = click.option(
    "--ignore",
    metavar="NAME",
    multiple=True,
    help="A field of PEFT's adapter_config.json that jlora does not know, and that does not change "
    "what the adapter computes. Can be given several times.",
)

PREFIX = click.option(
    "--prefix",
    metavar="NAME",
    help="For image LoRA: a model's name in the file, such as unet, transformer or (kohya) te1.",
)


class OpenAdapter(NamedTuple):
    """An adapter, with its leaves by PyTorch's names (PEFT) or by paths (Orbax)."""

    format: str
    leaves: dict[str, Any]
    about: dict[str, Any]


def open_adapter(given: Arg, ignore: tuple[str, ...], prefix: str | None = None) -> OpenAdapter:
    """Opens an adapter in PEFT's format, of image LoRA, or Orbax."""
    if format_of_adapter(given) == "peft":
        found = call(jlora.peft.read, given, ignore=ignore, prefix=prefix)
        about = {"base_model": found.config.get("base_model_name_or_path")}
        kind = "image" if find_image(given.value) else "peft"
        return OpenAdapter(kind, dict(found.leaves), about)
    saved = call(jlora.checkpoint.read, given)
    about = {"step": saved.step, "versions": saved.versions}
    return OpenAdapter("orbax", by_name(call(jlora.checkpoint.restore, given)), about)


def by_name(adapter: PyTree) -> dict[str, Any]:
    """Returns the leaves of an adapter by their paths."""
    return {name_of(path): x for path, x in adapter_leaves(adapter).items()}


def format_of_adapter(given: Arg, expected: str = "PEFT or Orbax") -> str:
    """Returns `peft` or `orbax`; raises for a model."""
    if (kind := format_of(given)) == "huggingface":
        raise ValueError(
            f"{given.what}: {given} is not an adapter of {expected}. {recognize(given.value)}"
        )
    return kind


def format_of(given: Arg, *, model: bool = False) -> str:
    """Returns `peft` (also for image LoRA), `orbax` or `huggingface`.

    A folder with both is an adapter, or with `model=True` a model.
    """
    held = call(holds, given)
    kinds = {"weights": "huggingface"} if model else {}
    # Of steps, jlora.checkpoint.read says what to give.
    kinds |= {"adapter": "peft", "orbax": "orbax", "model": "huggingface", "steps": "orbax"}
    if kind := next((kind for what, kind in kinds.items() if what in held), None):
        return kind
    raise ValueError(
        f"{given.what}: {given} has neither PEFT's adapter_config.json, nor an Orbax checkpoint, "
        f"nor a Hugging Face model. {recognize(given.value)}".rstrip()
    )


# ------------------------------------------------------------------------- tables and functions


def table(text: str | None) -> tuple[Any, ...]:
    """Finds the table of `--names`: one of jlora's, `module:ATTRIBUTE` or `file.py:ATTRIBUTE`."""
    if text is None:
        raise ValueError(f"--names is needed to match paths to PyTorch's modules: one of {TABLES}.")
    if text.lower() in jlora.peft.TABLES:
        return jlora.peft.TABLES[text.lower()]
    if ":" not in text:
        raise ValueError(f"--names: there is no table {text!r}; expected one of {TABLES}.")
    found = attribute(text, "--names")
    row = jlora.peft.Name
    if not isinstance(found, list | tuple) or not all(isinstance(x, row) for x in found):
        raise ValueError(
            f"--names: {text} must be a list of jlora.peft.Name rows; got {type(found).__name__}."
        )
    return tuple(found)


def attribute(text: str, what: str) -> Any:
    """Imports `module:NAME` or `file.py:NAME`; errors call the argument `what`."""
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
    """Imports a file as a module, in which its classes and annotations are found."""
    name = f"jlora_user_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
