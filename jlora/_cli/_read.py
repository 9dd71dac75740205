"""What a folder holds, and the adapter in it by names."""

from pathlib import Path
from typing import Any, NamedTuple

from .. import checkpoint, peft
from .._tree import adapter_leaves, name_of
from .._types import PyTree
from ..peft._checkpoint import INDEX, ONE
from ..peft._json import CONFIG, PICKLES, TENSORS
from ._base import fingerprinted
from ._names import table

# Of Orbax: the first is in every checkpoint, the second in those of one tree.
ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")


class Opened(NamedTuple):
    """An adapter: its leaves by PyTorch's names of modules (PEFT) or by paths (Orbax)."""

    folder: Path
    format: str
    leaves: dict[str, Any]
    about: dict[str, Any]


def open_adapter(folder: Path, what: str) -> Opened:
    """The adapter in `folder`, which the user gave as `what`."""
    match format_of(folder, what):
        case "peft":
            return _open_peft(folder)
        case "orbax":
            return _open_orbax(folder)
    raise ValueError(f"{what}: {folder} holds a model; expected an adapter of PEFT or of Orbax.")


def open_alike(a: Path, b: Path, names: str | None) -> tuple[Opened, Opened]:
    """Two adapters by the same names; one of PEFT beside one of Orbax is read onto its base."""
    formats = format_of(a, "A"), format_of(b, "B")
    if formats == ("peft", "orbax"):
        return _open_peft_as(a, b, "B", names), _open_orbax(b)
    if formats == ("orbax", "peft"):
        return _open_orbax(a), _open_peft_as(b, a, "A", names)
    return open_adapter(a, "A"), open_adapter(b, "B")


def format_of(folder: Path, what: str, *, model: bool = False) -> str:
    """`peft`, `orbax` or `huggingface`; an adapter beside a model counts unless it is a `model`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {folder}.")
    names = {path.name for path in folder.iterdir()}
    if model and names & {ONE, INDEX}:
        return "huggingface"
    if names & {CONFIG, TENSORS, *PICKLES[:2]}:
        return "peft"
    if names & {*ORBAX, "jlora"}:
        return "orbax"
    if "config.json" in names or any(name.endswith(".safetensors") for name in names):
        return "huggingface"
    # The steps of a CheckpointManager, about which Orbax's reader says what to do.
    if any(name.isdigit() for name in names):
        return "orbax"
    raise ValueError(
        f"{what}: {folder} holds neither {CONFIG}, as PEFT writes it, nor a checkpoint of Orbax, "
        "nor a model of Hugging Face."
    )


def has_tensors(folder: Path) -> bool:
    """Whether a model's safetensors are in `folder`."""
    return any((folder / name).exists() for name in (ONE, INDEX))


def _open_peft(folder: Path) -> Opened:
    base = peft.read_config(folder).get("base_model_name_or_path")
    return Opened(folder, "peft", peft.read(folder), {"base_model": base})


def _open_peft_as(folder: Path, other: Path, what: str, names: str | None) -> Opened:
    adapter = peft.load(folder, fingerprinted(other, what), table(names))
    return Opened(folder, "peft", _by_name(adapter), {})


def _open_orbax(folder: Path) -> Opened:
    saved = checkpoint.read(folder)
    about = {"step": saved.step, "versions": saved.versions}
    return Opened(folder, "orbax", _by_name(checkpoint.restore(folder)), about)


def _by_name(adapter: PyTree) -> dict[str, Any]:
    return {name_of(path): x for path, x in adapter_leaves(adapter).items()}
