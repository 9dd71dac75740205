"""What the user names: folders and what they hold, name tables, functions in modules and files."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from .. import checkpoint, peft
from .._tree import adapter_leaves, name_of
from .._types import PyTree
from ._words import called

# Files of Orbax: the first is in every checkpoint, the second in those of one tree.
ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")


class Opened(NamedTuple):
    """An adapter: its leaves by PyTorch's names of modules (PEFT) or by paths (Orbax)."""

    folder: Path
    format: str
    leaves: dict[str, Any]
    about: dict[str, Any]


def open_adapter(folder: Path, what: str) -> Opened:
    """The adapter in `folder`, which the user gave as `what`."""
    kind = format_of(folder, what)
    with called(path=(what, folder)):
        if kind == "peft":
            base = peft.read_config(folder).get("base_model_name_or_path")
            return Opened(folder, "peft", peft.read(folder), {"base_model": base})
    if kind == "orbax":
        return _open_orbax(folder, what)
    raise ValueError(f"{what}: {folder} holds a model; expected an adapter of PEFT or of Orbax.")


def open_alike(a: Path, b: Path, names: str | None) -> tuple[Opened, Opened]:
    """Two adapters by the same names: one of PEFT beside one of Orbax is read onto its base."""
    formats = format_of(a, "A"), format_of(b, "B")
    if formats == ("peft", "orbax"):
        return _open_peft_as((a, "A"), (b, "B"), names), _open_orbax(b, "B")
    if formats == ("orbax", "peft"):
        return _open_orbax(a, "A"), _open_peft_as((b, "B"), (a, "A"), names)
    return open_adapter(a, "A"), open_adapter(b, "B")


def format_of(folder: Path, what: str, *, model: bool = False) -> str:
    """`peft`, `orbax` or `huggingface`; an adapter beside a model counts unless it is a `model`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {folder}.")
    held = peft.holds(folder)
    if model and "weights" in held:
        return "huggingface"
    if "adapter" in held:
        return "peft"
    names = {path.name for path in folder.iterdir()}
    if names & {*ORBAX, "jlora"}:
        return "orbax"
    if "model" in held:
        return "huggingface"
    # The steps of a CheckpointManager, about which Orbax's reader says what to do.
    if any(name.isdigit() for name in names):
        return "orbax"
    raise ValueError(
        f"{what}: {folder} holds neither adapter_config.json, as PEFT writes it, nor a checkpoint "
        "of Orbax, nor a model of Hugging Face."
    )


def _open_peft_as(given: tuple[Path, str], other: tuple[Path, str], names: str | None) -> Opened:
    (folder, what), (orbax, orbax_what) = given, other
    with called(path=(orbax_what, orbax)):
        shapes = checkpoint.base_shapes(orbax)
    rows, base = table(names), (f"the base of {orbax_what}", orbax)
    with called(path=(what, folder), base=base, names=("--names", None)):
        return Opened(folder, "peft", _by_name(peft.load(folder, shapes, rows)), {})


def _open_orbax(folder: Path, what: str) -> Opened:
    with called(path=(what, folder)):
        saved = checkpoint.read(folder)
        about = {"step": saved.step, "versions": saved.versions}
        return Opened(folder, "orbax", _by_name(checkpoint.restore(folder)), about)


def _by_name(adapter: PyTree) -> dict[str, Any]:
    return {name_of(path): x for path, x in adapter_leaves(adapter).items()}


# ------------------------------------------------------------------------- tables and functions


def table(text: str | None) -> tuple[peft.Name, ...]:
    """The table that `--names` means: one of jlora's, `module:ATTRIBUTE` or `file.py:ATTRIBUTE`."""
    if text is None:
        raise ValueError(f"--names is needed to match PyTorch's modules to paths: {_choice()}.")
    if text.lower() in peft.TABLES:
        return peft.TABLES[text.lower()]
    if ":" not in text:
        raise ValueError(f"--names: there is no table {text!r}; expected {_choice()}.")
    found = attribute(text, "--names")
    if not isinstance(found, list | tuple) or not all(isinstance(x, peft.Name) for x in found):
        raise ValueError(
            f"--names: {text} must be a list of jlora.peft.Name rows; got {type(found).__name__}."
        )
    return tuple(found)


def _choice() -> str:
    return f"one of {', '.join(peft.TABLES)}, module:ATTRIBUTE or file.py:ATTRIBUTE"


def attribute(text: str, what: str) -> Any:
    """The attribute that `module:NAME` or `file.py:NAME` means, which the user gave as `what`."""
    source, _, name = text.rpartition(":")
    if not source or not name:
        raise ValueError(f"{what}: expected module:NAME or file.py:NAME; got {text!r}.")
    found = _import(source, what)
    if not hasattr(found, name):
        raise ValueError(f"{what}: {source} has no {name}.")
    return getattr(found, name)


def _import(source: str, what: str) -> Any:
    """Imports a module by its name or its file."""
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        name = f"jlora_user_{Path(source).stem}"
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as e:
        raise ValueError(f"{what}: {source} cannot be imported ({type(e).__name__}: {e}).") from e
