"""What a folder holds, and the adapter in it by names."""

from pathlib import Path
from typing import Any, NamedTuple

from .._tree import adapter_leaves, name_of

# Of Orbax; the first is in every checkpoint, the second in the older ones.
ORBAX = ("_CHECKPOINT_METADATA", "_METADATA")


class Opened(NamedTuple):
    """An adapter: its leaves by PyTorch's names of modules (PEFT) or by paths (Orbax)."""

    folder: Path
    format: str
    leaves: dict[str, Any]
    about: dict[str, Any]


def open_adapter(folder: Path, what: str) -> Opened:
    """The adapter in `folder`, which the user gave as `what`."""
    if format_of(folder, what) == "peft":
        return _open_peft(folder)
    return _open_orbax(folder, what)


def format_of(folder: Path, what: str) -> str:
    """`peft`, `orbax` or `huggingface`."""
    from ..peft._json import CONFIG, PICKLES, TENSORS

    if not folder.is_dir():
        raise FileNotFoundError(f"{what}: there is no folder {folder}.")
    if any((folder / name).exists() for name in (CONFIG, TENSORS, *PICKLES[:2])):
        return "peft"
    if any((folder / name).exists() for name in ORBAX):
        return "orbax"
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        return "huggingface"
    inside = sorted(
        p.parent.relative_to(folder).as_posix() for name in ORBAX for p in folder.glob(f"*/{name}")
    )
    hint = f" There are Orbax checkpoints in it: {', '.join(inside[:5])}." if inside else ""
    raise ValueError(
        f"{what}: {folder} holds no adapter_config.json, as PEFT writes it, no Orbax checkpoint "
        f"and no safetensors.{hint}"
    )


def _open_peft(folder: Path) -> Opened:
    from ..peft import read_config
    from ..peft._alone import load_alone

    leaves = load_alone(folder)
    base = read_config(folder).get("base_model_name_or_path")
    return Opened(folder, "peft", leaves, {"base_model": base})


def _open_orbax(folder: Path, what: str) -> Opened:
    from .. import checkpoint

    saved = checkpoint.read(folder)
    leaves = adapter_leaves(checkpoint.restore(folder))
    about = {"step": saved.step, "versions": dict(saved.versions)}
    return Opened(folder, "orbax", {name_of(p): x for p, x in leaves.items()}, about)
