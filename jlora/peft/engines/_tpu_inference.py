"""vLLM on TPUs: tpu-inference, which reads adapters by vLLM's loader for models in PyTorch."""

from collections.abc import Iterator

from ..adapter._vllm import RANKS
from ._engine import Engine, Finding, Served, register
from ._rules import LEAVE_OUT, some
from ._vllm import RULES, START


def _experts(x: Served) -> Iterator[Finding]:
    if found := [s.module for s in x.factors if ".experts." in f".{s.module}."]:
        yield Finding(some(found), "experts get no adapters on TPUs", LEAVE_OUT, False)


register(
    Engine(
        "tpu-inference",
        "tpu-inference",
        "0.32.0",
        (*RULES, _experts),
        f"MODEL_IMPL_TYPE=vllm {START}",
        RANKS,
        16,
    )
)
