"""MiSS: LoRA with a frozen A that repeats the identity.

In PEFT's layout ΔW is Dᵀ·A with D, the `miss_block`, of shape (r, outputs), and A of (r, inputs).
Source: Kang and Yin, MiSS, arXiv 2409.15371; PEFT 0.21.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..._errors import InputError, Problem
from .._file import DTYPES, PREFIX, TENSORS, TensorInfo, shorten
from .._problems import Problems
from ._config import (
    COMMON,
    DEFAULTS,
    MISS,
    MISS_OWN,
    find_features,
    list_misformed,
    list_unsupported,
)
from ._contents import FACTOR, Part
from ._describe import set_scales
from ._files import MAGNITUDE, Files
from ._tree import AB

Fields = dict[str, Any]

BLOCK = ".miss_block"
# Fields that both have, with the same names and meanings.
CHOICE = ("exclude_modules", "layers_pattern", "layers_to_transform")  # and target_modules
_SELECTION = dict.fromkeys((*CHOICE, "modules_to_save"))
SHARED = (COMMON.keys() - {"inference_mode", "peft_version"}) | _SELECTION.keys()
MISS_DEFAULTS: Fields = (
    COMMON | _SELECTION | MISS_OWN | {"bias": "none", "peft_type": MISS, "r": 64}
)
# MiSS's names for LoRA's dropout, and for the bias "lora_only".
DROPOUT, BIAS = "miss_dropout", "MiSS_only"


def is_miss(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration asks for MiSS."""
    return fields.get("peft_type") == MISS


def list_miss_problems(fields: Fields, *, is_file: bool = True) -> list[Problem]:
    """Lists why a configuration of MiSS cannot be read as LoRA."""
    strange = {key: x for key, x in find_features(fields).items() if key not in MISS_OWN}
    wrong = list_unsupported(strange, is_file=is_file)
    if (start := fields.get("init_weights", True)) not in (True, False):
        why = f"{shorten(start)} is another method, whose change is not s·A·B"
        wrong.append(Problem("init_weights", why))
    return wrong + list_misformed({"r": fields.get("r")})


def translate_fields(fields: Fields) -> Fields:
    """Translates the fields of MiSS that LoRA has too."""
    found = {key: fields[key] for key in SHARED if key in fields}
    found |= {"lora_dropout": fields[DROPOUT]} if DROPOUT in fields else {}
    bias = fields.get("bias", "none")
    return found | {"bias": "lora_only" if bias == BIAS else bias}


def as_lora(files: Files, shapes: Mapping[str, tuple[int, ...]], problems: Problems) -> Files:
    """Presents a MiSS adapter as LoRA; `shapes` are the shapes of the base's parameters."""
    problems.stop(*list_miss_problems(files.fields))
    fields, rank = files.fields, files.fields["r"]
    blocks, others = dict[str, TensorInfo](), list[TensorInfo]()
    inputs: dict[str, int] = {}  # of the modules
    for x in files.tensors:
        if not (x.key.startswith(PREFIX) and x.key.endswith(BLOCK)):
            others.append(x)
            if FACTOR.fullmatch(x.key.removeprefix(PREFIX)) or x.key.endswith(MAGNITUDE):
                problems.add(x.key, "unexpected in a MiSS adapter")
            continue
        module = x.key.removeprefix(PREFIX).removesuffix(BLOCK)
        weight = shapes.get(f"{module}.weight", ())
        n = weight[1] if len(weight) == 2 else 0
        if x.dtype not in DTYPES:
            problems.add_not_floating(x)
        elif not n:
            problems.add(module, "is not a matrix of the base, whose shape MiSS needs")
        elif len(x.shape) != 2 or x.shape[0] != rank or rank > min(n, x.shape[1]):
            problems.add(module, f"miss_block {x.shape} does not fit {n} inputs and rank {rank}")
        else:
            blocks[module], inputs[module] = x, n
    if not (blocks or problems.found):
        problems.add(TENSORS, "no module has a miss_block")
    problems.stop()

    def read(wanted: Iterable[TensorInfo]) -> dict[str, np.ndarray]:
        """Reads all MiSS tensors, and returns the wanted LoRA tensors."""
        found = files.read(files.tensors)
        for module, x in blocks.items():
            a, b = (f"{PREFIX}{module}{end}" for end in AB)
            found[a] = repeat_identity(rank, inputs[module])
            found[b] = np.ascontiguousarray(found.pop(x.key).T, np.float32)
        return {x.key: found[x.key] for x in wanted}

    made = [
        TensorInfo(f"{PREFIX}{module}{end}", "F32", shape)
        for module, x in blocks.items()
        for end, shape in zip(AB, ((rank, inputs[module]), x.shape[::-1]), strict=True)
    ]
    scales = dict.fromkeys(blocks, (rank, 1.0))
    own = translate_fields(fields)
    if own.get("target_modules") is None:
        own |= dict.fromkeys(CHOICE) | {"target_modules": list(blocks)}
    lora = set_scales(DEFAULTS | own, scales)
    return files._replace(fields=lora, tensors=made + others, read=read)


def repeat_identity(rank: int, inputs: int) -> np.ndarray:
    """Makes the A of MiSS, (rank, inputs)."""
    return np.eye(rank, dtype=np.float32)[:, np.arange(inputs) % rank]


def from_lora(
    given: Fields, fields: Fields, parts: Sequence[Part], tensors: Mapping[str, np.ndarray]
) -> tuple[Fields, dict[str, np.ndarray]]:
    """Converts a LoRA adapter to MiSS.

    Args:
        given: the user's MiSS fields.
        fields: the LoRA configuration.
        parts: A and B of each module.
        tensors: all tensors of the adapter.

    Raises:
        ValueError: if the adapter cannot be written as MiSS.
    """
    odd = (x for x in parts if x.kind != "linear")
    wrong = [Problem(x.key, f"of kind {x.kind}, not linear") for x in odd]
    wrong += [Problem(x.key, "DoRA") for x in parts if x.m is not None]
    if fields["trainable_token_indices"] is not None:
        wrong.append(Problem("trainable_token_indices", "MiSS has no rows of embeddings"))
    if fields["fan_in_fan_out"]:
        why = "MiSS has no weights stored as (inputs, outputs)"
        wrong.append(Problem("fan_in_fan_out", why))
    wrong = wrong or [
        Problem(x.key, "its A does not repeat the identity, as the A of initializers.miss does")
        for x in parts
        if not np.array_equal(x.a, repeat_identity(*x.a.shape))
    ]
    ranks = sorted({len(x.a) for x in parts})
    if not wrong and len(ranks) != 1:
        wrong.append(Problem("r", f"its sites have the ranks {ranks}, but MiSS has one for all"))
    if wrong:
        raise InputError(
            f"`adapter` cannot be written as {MISS}, which `config` asks for:",
            problems=wrong,
            remedy="Leave peft_type out to write LoRA.",
        )
    kept = {key: fields[key] for key in SHARED} | {DROPOUT: fields["lora_dropout"], "r": ranks[0]}
    kept["bias"] = BIAS if fields["bias"] == "lora_only" else fields["bias"]
    rest = dict(tensors)
    starts = {PREFIX + x.key: x for x in parts}
    for start, x in starts.items():
        for end in AB:
            del rest[start + end]
        b = x.b * np.asarray(x.scale, x.b.dtype)
        rest[start + BLOCK] = np.ascontiguousarray(b.T)
    return MISS_DEFAULTS | given | kept, rest
