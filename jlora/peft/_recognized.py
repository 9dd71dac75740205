"""Recognizes folders, files and keys that are not as PEFT saves them, and says what to do."""

import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from .._errors import show
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
_HEAD = 2**20  # bytes of a file that are searched
_MOST = 1000  # entries of a folder that are looked at
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
_ENDS, _FOREIGN = (
    "|".join(re.escape(end) for ends in FORMS.values() for end in ends if end not in left_out)
    for left_out in ((), FORMS["diffusers"])
)
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


class Kind(NamedTuple):
    """What a folder or file is, and what to do with it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"It is {self.what}. {self.remedy}."


_MLX = Kind("an adapter of MLX", "Merge it into its model with mlx_lm.fuse")
# What is in the headers of other files than PEFT's; kohya's scripts write how they were run first.
_IMAGE_HEADER = re.compile(rf'"ss_[a-z_]+"|"(?!base_model\.)[^"]+\.(?:{_ENDS})"'.encode())
_MLX_HEADER = re.compile(rb'\.lora_[ab]"')


def recognize(path: Path, marks: Collection[str] = (CONFIG,)) -> Kind | None:
    """Finds out what a folder or file is that is not what the user should give.

    Args:
        path: a folder without some of the files that it should have; or a file.
        marks: names of files, of which the right folder has one.
    """
    if path.is_file():
        remedy = f"Give the folder that it is in, {path.parent}"
        return _recognize_file(path, "Read it with jlora.peft.read") or Kind("a file", remedy)
    names = _list_names(path)
    is_adapter = CONFIG in marks
    files = (path / name for name in names if is_adapter and name not in (TENSORS, *WEIGHTS))
    if found := next(filter(None, map(_recognize_file, files)), None):
        return found
    if below := [show(x) for x in itertools.islice(_find_below(path, marks), _SHOWN + 1)]:
        what = f"a folder with {'adapters' if is_adapter else 'models'} in it"
        listed = ", ".join(below[:_SHOWN]) + ", …" * (len(below) > _SHOWN)
        return Kind(what, f"Give one of them: {listed}")
    if not {*ORBAX}.isdisjoint(names):
        remedy = "Use jlora.checkpoint, or write an adapter in it as PEFT's with jlora convert"
        return Kind("a checkpoint of Orbax", remedy)
    if is_adapter and not {"config.json", *WEIGHTS}.isdisjoint(names):
        return Kind("a model", "Give the folder of an adapter")
    if not is_adapter and CONFIG in names:
        return Kind("an adapter", "Give the folder of its base model")
    return None


def _recognize_file(path: Path, of_image: str = "") -> Kind | None:
    """Recognizes an adapter of another library by its name or the start of its header.

    `of_image` is the remedy for image LoRA; without it, to give the file itself.
    """
    if path.suffix == ".gguf":
        return Kind(f"a file of llama.cpp, {show(path.name)}", "Give what it was made from")
    if path.name == "adapters.npz":
        return _MLX
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if _MLX_HEADER.search(head):
        return _MLX
    if _IMAGE_HEADER.search(head):
        remedy = of_image or f"Give the file itself, {show(str(path))}"
        return Kind(f"image LoRA, {show(path.name)}", remedy)
    return None


def _find_below(folder: Path, marks: Collection[str]) -> Iterator[str]:
    """Finds the folders within `folder`, up to two levels down, that have one of the `marks`."""
    for name in _list_names(folder):
        for inner in (name, *(f"{name}/{x}" for x in _list_names(folder / name))):
            if any((folder / inner / mark).is_file() for mark in marks):
                yield inner


def _list_names(folder: Path) -> list[str]:
    """Lists the first entries of a folder; none of what is no folder, or is a link."""
    try:
        if folder.is_symlink():
            return []
        with os.scandir(folder) as entries:
            return sorted(x.name for x in itertools.islice(entries, _MOST))
    except OSError:
        return []


# ---------------------------------------------------------------------------------------- keys

_SAVE = "Save it with save_pretrained of PEFT's model"
# Parts of keys that come from other ways to save an adapter.
_KEYS = (
    (
        re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.(?!weight$|bias$)\w+"),
        "has the name of an adapter in it, as in model.state_dict()",
        f"{_SAVE}, or without that name",
    ),
    *(
        (
            re.compile(rf"(?:^|\.){mark}\."),
            f"contains {mark!r}, as {library} wraps the modules of a model in others",
            f"{_SAVE} as it is without {library}",
        )
        for mark, library in {
            "_fsdp_wrapped_module": "FSDP",
            "_orig_mod": "torch.compile",
            "_checkpoint_wrapped_module": "checkpoint_wrapper",
        }.items()
    ),
    (
        re.compile(r"^module\."),
        "starts with 'module.', as DistributedDataParallel wraps a model",
        f"{_SAVE}, model.module",
    ),
    (
        re.compile(rf"^{MANGLED.pattern}\.|\.(?:{_FOREIGN})$"),
        "is of image LoRA",
        f"Give the file itself, under another name than {TENSORS}",
    ),
    (re.compile(r"\.lora_[ab]$"), "is MLX's", _MLX.remedy),
)


def find_cause(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Says in which other way the tensors of an adapter were saved; empty if none is known."""
    for key, shape in shapes.items():
        for pattern, why, remedy in _KEYS:
            if pattern.search(key):
                return f"The key {show(key)} {why}. {remedy}."
        if 0 in shape:
            return (
                f"{show(key)} has no values, as DeepSpeed's ZeRO-3 saves what is not gathered. Set "
                "stage3_gather_16bit_weights_on_model_save, and save the adapter again."
            )
    return ""
