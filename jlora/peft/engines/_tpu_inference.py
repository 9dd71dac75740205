"""vLLM on TPUs (tpu-inference), which reads adapters with vLLM's loader for PyTorch models."""

from ..adapter._one_rank import RANKS
from . import _findings as rules
from ._engine import Engine, Finding, Served, register
from ._vllm import RULES, notes
from ._vllm import START as VLLM


def _experts(x: Served) -> list[Finding]:
    found = (s.module for s in x.factors if ".experts." in f".{s.module}.")
    return rules.report(found, "experts have no adapters on TPUs", rules.LEAVE_OUT)


START = f"MODEL_IMPL_TYPE=vllm {VLLM}"
NAME = "tpu-inference"
register(Engine(NAME, NAME, "0.32.0", (*RULES, _experts), START, RANKS, 16, notes))
