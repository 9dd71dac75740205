"""What vLLM takes: one rank, no patterns, nothing but A and B."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._config import read_config
from ._file import Source, brief, read_header, shown
from ._read import PREFIX, Part

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def flattened(
    fields: Mapping[str, Any], parts: Sequence[Part], full: Sequence[str]
) -> tuple[dict[str, Any], list[Part]]:
    """The adapter with one rank, and its scales in B.

    Raises:
        ValueError: if parts of it, or what is in `full`, are nothing that vLLM has.
    """
    wrong = [f"{key}: trained in full" for key in full]
    wrong += [f"{x.key}: of kind {x.kind}" for x in parts if x.kind not in ("linear", "embedding")]
    if wrong:
        raise ValueError(
            "`profile` 'vllm' takes linear and embedding sites alone; got\n  "
            + "\n  ".join(wrong)
            + "\nLeave these out of the rules, or merge the adapter and serve the merged model."
        )
    largest = max(x.a.shape[0] for x in parts)
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        raise ValueError(f"`profile` 'vllm' takes ranks up to {RANKS[-1]}; got {largest}.")
    new = [
        x._replace(
            a=_padded(x.a, 0, rank),
            b=_padded(x.b * np.asarray(x.scale, x.b.dtype), 1, rank),
            scale=1.0,
        )
        for x in parts
    ]
    flat = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    return dict(fields) | flat, new


def _padded(x: np.ndarray, axis: int, length: int) -> np.ndarray:
    pads = [(0, 0), (0, 0)]
    pads[axis] = (0, length - x.shape[axis])
    return np.pad(x, pads)


def check_vllm(dir: str | os.PathLike[str], *, max_lora_rank: int = 16) -> list[str]:
    """What vLLM would refuse, or compute wrongly, about the adapter in `dir`; empty if nothing.

    Args:
        dir: the adapter's folder.
        max_lora_rank: the option of the server, one of 1, 8, 16, 32, 64, 128, 256, 320 and 512.

    Returns:
        A sentence for each reason.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if `max_lora_rank` is none that vLLM has, or the files are damaged.

    Source: vLLM, `vllm.lora.peft_helper` and `vllm.lora.lora_model`.

    Examples:
        >>> from jlora import peft
        >>> peft.check_vllm("adapter", max_lora_rank=64)  # doctest: +SKIP
        ["rank_pattern: ignored by vLLM; save with profile='vllm'"]
    """
    if max_lora_rank not in RANKS:
        raise ValueError(f"`max_lora_rank` must be one of {RANKS}; got {max_lora_rank!r}.")
    fields = read_config(dir)
    return [*_check_fields(fields, max_lora_rank), *_check_keys(Path(dir), fields)]


def _check_fields(fields: Mapping[str, Any], limit: int) -> list[str]:
    found = [
        f"{k}: missing" for k in ("r", "lora_alpha", "target_modules") if fields.get(k) is None
    ]
    if fields.get("modules_to_save"):
        found.append(f"modules_to_save: must be null, got {brief(fields['modules_to_save'])}")
    if fields.get("use_dora"):
        found.append("use_dora: DoRA is not supported")
    if fields.get("bias", "none") != "none":
        found.append(f"bias: must be 'none', got {brief(fields['bias'])}")
    if isinstance(r := fields.get("r"), int) and r > limit:
        found.append(f"r: {r} is above max_lora_rank {limit}")
    return found + [
        f"{key}: ignored by vLLM; save with profile='vllm'"
        for key in ("rank_pattern", "alpha_pattern")
        if fields.get(key)
    ]


def _check_keys(folder: Path, fields: Mapping[str, Any]) -> list[str]:
    found = []
    ends = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    for key, entry in read_header(Source(folder)).entries.items():
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue  # it skips them
        if not key.startswith(PREFIX) or not key.endswith(tuple("." + e for e in ends)):
            found.append(f"{shown(key)}: not a key that vLLM reads")
        elif len(entry.shape) != 2:
            found.append(f"{shown(key)}: expected a matrix, got shape {entry.shape}")
        elif entry.shape[key.endswith(("B", "B.weight"))] != fields.get("r"):
            rank = brief(fields.get("r"))
            found.append(f"{shown(key)}: expected rank {rank}, got shape {entry.shape}")
    return found
