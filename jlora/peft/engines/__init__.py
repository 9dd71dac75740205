"""Engines that serve adapters: what each refuses, and what it drops silently.

Imports `_errors`, `peft._checkpoint`, `peft._file`, `peft._recognized`, `peft._submodels` and
`peft.adapter`.
"""

from ._engine import Engine as Engine
from ._engine import Finding as Finding
from ._vllm import TPU_INFERENCE, VLLM

ENGINES = {"vllm": VLLM, "tpu-inference": TPU_INFERENCE}
