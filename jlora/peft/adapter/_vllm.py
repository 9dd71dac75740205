"""Writes adapters as vLLM takes them: one rank, no patterns, nothing but A and B."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._problems import Problems
from ._alone import read_alone, write_alone
from ._config import DEFAULTS
from ._contents import Part

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def to_vllm(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Rewrites one of PEFT's adapters for vLLM, as `save` writes it with `profile="vllm"`.

    Args:
        path: its folder.
        out: a folder that does not exist yet, or an empty one.

    Raises:
        FileExistsError: if `out` is there and not an empty folder.
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged, or hold what vLLM does not support.

    Examples:
        >>> from jlora import peft
        >>> peft.to_vllm("adapter", "for_vllm")  # doctest: +SKIP
    """
    alone = read_alone(path)
    fields, found = DEFAULTS | alone.adapter.fields, alone.contents
    fields, parts = flatten_for_vllm(fields, found.parts, list(found.full), list(alone.rows))
    title = f"`path`: the adapter in {path} has no form for vLLM that would be read as the same"
    write_alone(out, fields, parts, [alone], Problems(title), "path")


def flatten_for_vllm(
    fields: Mapping[str, Any], parts: Sequence[Part], full: Sequence[str], rows: Sequence[str]
) -> tuple[dict[str, Any], list[Part]]:
    """Gives all parts one rank, and folds their scales into B.

    Raises:
        ValueError: if vLLM has no such part, or if anything is in `full` or has `rows`.
    """
    wrong = [f"{key}: trained in full" for key in full]
    wrong += [f"{key}: with rows of its own" for key in rows]
    wrong += [f"{x.key}: of DoRA" for x in parts if x.m is not None]
    wrong += [f"{x.key}: of kind {x.kind}" for x in parts if x.kind not in ("linear", "embedding")]
    if wrong:
        raise ValueError(
            "`profile` 'vllm' takes LoRA of linear and embedding sites alone; got\n  "
            + "\n  ".join(wrong)
            + "\nLeave these out of the rules, or merge the adapter and serve the merged model."
        )
    largest = max(x.a.shape[0] for x in parts)
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        raise ValueError(f"`profile` 'vllm' takes ranks up to {RANKS[-1]}; got {largest}.")
    new = [
        x._replace(
            a=np.pad(x.a, ((0, rank - len(x.a)), (0, 0))),
            b=np.pad(x.b * np.asarray(x.scale, x.b.dtype), ((0, 0), (0, rank - x.b.shape[1]))),
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
