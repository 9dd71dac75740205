"""MiSS, which is LoRA with an A that repeats the identity and is not trained.

In PEFT's layout ΔW is Dᵀ·A with D, the `miss_block`, of shape (r, outputs), and A of (r, inputs).
Source: Kang and Yin, MiSS, arXiv 2409.15371; PEFT 0.21.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._file import DTYPES, PREFIX, brief, shown
from ._config import DEFAULTS, MISS, MISS_DEFAULTS, features, misformed
from ._parts import AB
from ._read import Part, Stored
from ._saved import Saved
from ._select import with_scales

Fields = dict[str, Any]

BLOCK = ".miss_block"
OWN = ("init_weights", "mini_r", "miss_dropout")  # fields that LoRA has not
# What both methods have by the same name.
SHARED = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "revision",
    "target_modules",
    "task_type",
)
# The names of what both have by other names, and of one value of it.
DROPOUT, BIAS = "miss_dropout", "MiSS_only"


def is_miss(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of MiSS."""
    return fields.get("peft_type") == MISS


def problems_of_miss(fields: Fields) -> list[str]:
    """Why a configuration cannot be read as LoRA."""
    wrong = [
        f"{shown(key)}: {brief(value)} is a feature that jlora does not support"
        for key, value in features(fields).items()
        if key not in OWN
    ]
    if (start := fields.get("init_weights", True)) not in (True, False):
        wrong.append(f"init_weights: {brief(start)} is another method, whose change is no s·A·B")
    return wrong + misformed({"r": fields.get("r")})


def fields_of_lora(fields: Fields) -> Fields:
    """The fields of MiSS that LoRA has too, by its names."""
    found = {key: fields[key] for key in SHARED if key in fields}
    found |= {"lora_dropout": fields[DROPOUT]} if DROPOUT in fields else {}
    bias = fields.get("bias", "none")
    return found | {"bias": "lora_only" if bias == BIAS else bias}


def as_lora(saved: Saved, shapes: Mapping[str, tuple[int, ...]], wrong: list[str]) -> Saved:
    """An adapter of MiSS as one of LoRA.

    Args:
        saved: its files, whose configuration is checked.
        shapes: those of the base's parameters, by PyTorch's names.
        wrong: gets what has no such form.
    """
    fields, rank = saved.fields, saved.fields["r"]
    made, blocks = list[Stored](), dict[str, tuple[Stored, int]]()  # and the inputs of each module
    for x in saved.tensors:
        if not (x.key.startswith(PREFIX) and x.key.endswith(BLOCK)):
            made.append(x)
            continue
        module = x.key.removeprefix(PREFIX).removesuffix(BLOCK)
        weight = shapes.get(f"{module}.weight", ())
        inputs = weight[1] if len(weight) == 2 else 0
        if x.dtype not in DTYPES:
            wrong.append(f"{shown(x.key)}: expected a floating-point dtype, got {x.dtype}")
        elif not inputs:
            wrong.append(f"{shown(module)}: is no matrix of the base, which MiSS needs to know")
        elif len(x.shape) != 2 or x.shape[0] != rank or rank > min(inputs, x.shape[1]):
            wrong.append(
                f"{shown(module)}: miss_block {x.shape} does not fit {inputs} inputs at the rank "
                f"{rank}"
            )
        else:
            blocks[f"{PREFIX}{module}"] = x, inputs
            pair = (rank, inputs), (x.shape[1], rank)
            each = zip(AB, pair, strict=True)
            made += [Stored(f"{PREFIX}{module}{end}", "F32", shape) for end, shape in each]

    def read(wanted: Iterable[Stored]) -> dict[str, np.ndarray]:
        wanted = list(wanted)
        keys = {x.key for x in wanted}
        own = {k: x for k, x in blocks.items() if not keys.isdisjoint(k + end for end in AB)}
        found = saved.read([*(x for x, _ in own.values()), *(x for x in wanted if x in others)])
        for start, (x, inputs) in own.items():
            b = np.ascontiguousarray(found.pop(x.key).T, np.float32)
            found |= {start + AB[0]: repeated_identity(rank, inputs), start + AB[1]: b}
        return {key: found[key] for key in keys}

    others = {x for x in saved.tensors if x in made}
    modules = [key.removeprefix(PREFIX) for key in blocks]
    lora = with_scales(DEFAULTS | fields_of_lora(fields), dict.fromkeys(modules, (rank, 1.0)))
    return saved._replace(fields=lora, tensors=made, read=read)


def repeated_identity(rank: int, inputs: int) -> np.ndarray:
    """The A of MiSS, (rank, inputs)."""
    return np.eye(rank, dtype=np.float32)[:, np.arange(inputs) % rank]


def from_lora(
    given: Fields, fields: Fields, parts: Sequence[Part], tensors: Mapping[str, np.ndarray]
) -> tuple[Fields, dict[str, np.ndarray]]:
    """An adapter of LoRA as one of MiSS.

    Args:
        given: the fields of MiSS that the user gave.
        fields: the configuration of LoRA.
        parts: A and B of each module.
        tensors: all tensors of the adapter.

    Raises:
        ValueError: if it has no such form.
    """
    wrong = [f"{x.key}: of kind {x.kind}, not linear" for x in parts if x.kind != "linear"]
    wrong += [f"{x.key}: is of DoRA" for x in parts if x.m is not None]
    if fields["trainable_token_indices"] is not None:
        wrong.append("trainable_token_indices: rows of an embedding, which only LoRA has beside it")
    if fields["fan_in_fan_out"]:
        wrong.append("fan_in_fan_out: true, of weights that are stored as (inputs, outputs)")
    wrong = wrong or [
        f"{x.key}: its A does not repeat the identity, as that of initializers.miss does"
        for x in parts
        if not np.array_equal(x.a, repeated_identity(*x.a.shape))
    ]
    ranks = sorted({len(x.a) for x in parts})
    if not wrong and len(ranks) != 1:
        wrong.append(f"its sites have the ranks {ranks}, where MiSS has one for all")
    if wrong:
        raise ValueError(
            f"`adapter` cannot be written as {MISS}, which `config` asks for:\n  "
            + "\n  ".join(wrong)
            + "\nWithout that peft_type it is written as LoRA."
        )
    kept = {key: fields[key] for key in SHARED} | {DROPOUT: fields["lora_dropout"], "r": ranks[0]}
    kept["bias"] = BIAS if fields["bias"] == "lora_only" else fields["bias"]
    rest, starts = dict(tensors), {PREFIX + x.key: x for x in parts}
    for start, x in starts.items():
        for end in AB:
            del rest[start + end]
        b = x.b * np.asarray(x.scale, x.b.dtype)
        rest[start + BLOCK] = np.ascontiguousarray(b.T)
    return MISS_DEFAULTS | given | kept, rest
