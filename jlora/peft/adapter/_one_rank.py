"""Gives adapters the form for vLLM: one rank, no patterns, only A and B, with the inputs in A."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..._errors import InputError, Problem, stop
from ..names._kinds import EXPERTS
from ..names._torch_layout import rescale, swap
from ._methods import LORA
from ._parts import Part, Values
from ._patterns import make_scales

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def with_profile(
    profile: str | None, fields: Mapping[str, Any], own: Values
) -> tuple[dict[str, Any], Values]:
    """Pads all parts to one rank for the profile "vllm", and multiplies their scales into B.

    A and B of experts are exchanged where A has the outputs.

    Raises:
        ValueError: if vLLM does not support a part, or if there are parameters in full or rows.
    """
    if profile is None:
        return dict(fields), own
    if profile != "vllm":
        raise InputError("profile", f"must be None or 'vllm'; got {profile!r}.")
    wrong = own.list_unheld(profile)
    wrong += [Problem(x.key, x.method.name) for x in own.parts if x.method is not LORA]
    experts = {x.name: x for x in own.parts if x.kind is EXPERTS}
    lone = (x for x in experts.values() if _other(x.name) not in experts)
    wrong += [Problem(x.key, f"experts without {_other(x.name)}") for x in lone]
    held = "LoRA of linear and embedding sites, and of experts' gate_up_proj and down_proj together"
    remedy = "Leave these out of the rules, or merge the adapter and serve the merged model."
    stop(wrong, "profile", f"'vllm' supports only {held}.", remedy)
    largest = max((x.rank for x in own.parts), default=1)
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        why = f"'vllm' supports ranks up to {RANKS[-1]}; got {largest}."
        raise InputError("profile", f"{why} Lower it with jlora.arithmetic.truncate.")
    turned = (_turn(x, experts) if x.kind is EXPERTS else x for x in own.parts)
    flat = make_scales({"": rank}, {"": rank}) | {"use_rslora": False}
    return dict(fields) | flat, own._replace(parts=[_pad(x, rank) for x in turned])


def _pad(x: Part[np.ndarray], rank: int) -> Part[np.ndarray]:
    """Pads A and B, those of each expert, and multiplies the scale into B."""
    more = ((0, 0), (0, rank - x.rank), (0, 0))
    a = np.pad(x.a.reshape(x.experts, x.rank, -1), more)
    b = np.pad(rescale(x.b, x.scale).reshape(-1, x.rank, x.experts), more)
    return x._replace(a=a.reshape(-1, a.shape[-1]), b=b.reshape(len(b), -1), scale=1.0)


def _turn(x: Part[np.ndarray], experts: Mapping[str, Part[np.ndarray]]) -> Part[np.ndarray]:
    """Returns experts with the inputs in A, where PEFT's A may have the outputs.

    Then A of gate_up_proj has the columns that B of down_proj has rows; otherwise these are twice
    as many as those.
    """
    one, two = (x, experts[_other(x.name)])[:: 1 if x.name.endswith("gate_up_proj") else -1]
    if one.a.shape[1] == two.b.shape[0]:
        return x
    a, b = swap(x.a, x.b, x.experts)
    return x._replace(a=a, b=b)


def _other(name: str) -> str:
    """Returns the parameter that vLLM reads together with one of experts."""
    module, _, last = name.rpartition(".")
    return f"{module}.{'down_proj' if last == 'gate_up_proj' else 'gate_up_proj'}"
