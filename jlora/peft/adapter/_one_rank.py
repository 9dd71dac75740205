"""Gives adapters the form for vLLM: one rank, no patterns, only A and B."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..._errors import InputError, Problem
from ._sorted import Parameters

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def with_profile(
    profile: str | None, fields: Mapping[str, Any], own: Parameters
) -> tuple[dict[str, Any], Parameters]:
    """Pads all parts to one rank for the profile "vllm", and multiplies their scales into B.

    Raises:
        ValueError: if vLLM does not support a part, or if there are parameters in full or rows.
    """
    if profile is None:
        return dict(fields), own
    if profile != "vllm":
        raise InputError(f"`profile` must be None or 'vllm'; got {profile!r}.")
    wrong = [Problem(name, "trained in full") for name in own.full]
    wrong += [Problem(x.module, "rows of an embedding") for x in own.tokens.values()]
    wrong += [Problem(x.key, "DoRA") for x in own.parts if x.m is not None]
    odd = (x for x in own.parts if x.kind not in ("linear", "embedding"))
    wrong += [Problem(x.key, f"of kind {x.kind}") for x in odd]
    if wrong:
        raise InputError(
            "`profile` 'vllm' supports only LoRA of linear and embedding sites; got:",
            problems=wrong,
            remedy="Leave these out of the rules, or merge the adapter and serve the merged model.",
        )
    largest = max(x.a.shape[0] for x in own.parts)
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        raise InputError(
            f"`profile` 'vllm' supports ranks up to {RANKS[-1]}; got {largest}. Lower it with "
            "jlora.arithmetic.truncate.",
        )
    parts = [
        x._replace(
            a=np.pad(x.a, ((0, rank - len(x.a)), (0, 0))),
            b=np.pad(x.b * np.asarray(x.scale, x.b.dtype), ((0, 0), (0, rank - x.b.shape[1]))),
            scale=1.0,
        )
        for x in own.parts
    ]
    flat = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    return dict(fields) | flat, own._replace(parts=parts)
