"""Recognizes folders, files and keys that are not as PEFT saves them, and says what to do."""

import itertools
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from .._errors import list_few, show
from .._folders import to_path

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
IMAGE = "pytorch_lora_weights.safetensors"  # of diffusers
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_STEMS = ("model", "diffusion_pytorch_model")  # of transformers and diffusers
# The one file of a model's weights, or the index of several.
MODELS = tuple((f"{stem}.safetensors", f"{stem}.safetensors.index.json") for stem in _STEMS)
WEIGHTS = tuple(itertools.chain(*MODELS))
# Of Orbax: the first is in every checkpoint, the second in checkpoints of one tree.
ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "jlora")
MLX = ("adapters.safetensors", "adapters.npz")
_SHOWN = 9  # folders in a message

# The tensors of a module as PEFT's keys end, and as those of image LoRA do, by who wrote them.
A, B = "lora_A.weight", "lora_B.weight"
BIAS, MAGNITUDES, ALPHA = "lora_B.bias", "lora_magnitude_vector", "alpha"
FORMS = {
    "diffusers": {A: A, B: B, BIAS: BIAS, MAGNITUDES: MAGNITUDES, ALPHA: ALPHA},
    "kohya": {"lora_down.weight": A, "lora_up.weight": B, "dora_scale": MAGNITUDES, ALPHA: ALPHA},
    "DiffSynth-Studio": {"lora_A.default.weight": A, "lora_B.default.weight": B, ALPHA: ALPHA},
    "diffusers before 0.24": {"lora.down.weight": A, "lora.up.weight": B, ALPHA: ALPHA},
    "diffusers before 0.24, of a text encoder": {
        "lora_linear_layer.down.weight": A,
        "lora_linear_layer.up.weight": B,
    },
}
_ENDS = "|".join(re.escape(end) for ends in FORMS.values() for end in ends)
KEY = re.compile(rf"(?P<module>.+)\.(?P<end>{_ENDS})")
# A module with _ for dots, after the word of kohya's scripts for its model, or that of LyCORIS.
MANGLED = re.compile(r"(?:lora_)?(?P<prefix>(?<=lora_)[A-Za-z]+\d*|lycoris)_[^.]+")


def find_image(path: str | os.PathLike[str]) -> Path | None:
    """Finds the file of image LoRA that a path is, or that is in it."""
    path = to_path(path)
    if path.is_dir():
        return path / IMAGE if (path / IMAGE).exists() else None
    is_other = path.suffix != ".safetensors" or path.name in (TENSORS, *WEIGHTS)
    return None if is_other else path


_FUSE = "Merge it into its model with mlx_lm.fuse."


def recognize(folder: Path, marks: Collection[str] = (CONFIG,)) -> str:
    """Says what a folder is that the user should not give, and what to do; empty if not known.

    Args:
        folder: a folder without some of the files that it should have.
        marks: names of files, of which the right folder has one.
    """
    is_adapter = CONFIG in marks
    if below := _find_below(folder, marks):
        what = f"a folder with {'adapters' if is_adapter else 'models'} in it"
        listed = list_few(below, _SHOWN)
        return f"It is {what}. Give one of them: {listed}."
    if _has(folder, ORBAX):
        use = "Use jlora.checkpoint, or write an adapter in it as PEFT's with jlora convert."
        return f"It is a checkpoint of Orbax. {use}"
    if not is_adapter:
        return "It is an adapter. Give the folder of its base model." * _has(folder, (CONFIG,))
    if _has(folder, MLX):
        return f"It is an adapter of MLX. {_FUSE}"
    if _has(folder, ("config.json", *WEIGHTS)):
        return "It is a model. Give the folder of an adapter."
    is_file = any(folder.glob("*.safetensors")) and not _has(folder, (TENSORS,))
    return "If it has a file of image LoRA, give that file itself." * is_file


def _has(folder: Path, names: Collection[str]) -> bool:
    return any((folder / name).exists() for name in names)


def _find_below(folder: Path, marks: Collection[str]) -> list[str]:
    """Finds the folders within `folder`, up to two levels down, that have one of the `marks`."""
    each = (folder.glob(f"{depth}/{mark}") for depth in ("*", "*/*") for mark in marks)
    found = {path.parent.relative_to(folder).as_posix() for path in itertools.chain(*each)}
    return [show(name) for name in sorted(found)]


# ---------------------------------------------------------------------------------------- keys

_SAVE = "Save it with save_pretrained of PEFT's model"
# Parts of keys that come from other ways to save an adapter.
_KEYS = {
    r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.(?!weight$|bias$)\w+": (
        "has the name of an adapter in it, as in model.state_dict(). "
        f"{_SAVE}, or without that name."
    ),
    r"(?:^|\.)_(?:fsdp_wrapped_module|orig_mod|checkpoint_wrapped_module)\.|^module\.": (
        "is of a model in a wrapper: of FSDP, torch.compile, checkpoint_wrapper or "
        f"DistributedDataParallel. {_SAVE} without it."
    ),
    rf"^{MANGLED.pattern}\.|\.lora[._](?:down|up)\.weight$": (
        f"is of image LoRA. Give the file itself, under another name than {TENSORS}."
    ),
    r"\.lora_[ab]$": f"is MLX's. {_FUSE}",
}


def find_cause(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Says in which other way the tensors of an adapter were saved; empty if none is known."""
    for key, shape in shapes.items():
        for pattern, why in _KEYS.items():
            if re.search(pattern, key):
                return f"The key {show(key)} {why}"
        if 0 in shape:
            return (
                f"{show(key)} has no values, as DeepSpeed's ZeRO-3 saves what is not gathered. Set "
                "stage3_gather_16bit_weights_on_model_save, and save the adapter again."
            )
    return ""
