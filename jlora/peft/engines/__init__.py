"""Engines that serve adapters: what each refuses, and what it drops silently. A file each.

Imports `_errors`, `peft._checkpoint`, `peft._file` and `peft.adapter`.
"""

from . import _sglang, _tpu_inference, _vllm  # noqa: F401
from ._engine import ENGINES as ENGINES
from ._engine import Base as Base
from ._engine import Engine as Engine
from ._engine import Finding as Finding
from ._engine import Served as Served
from ._engine import Side as Side
from ._engine import register as register
