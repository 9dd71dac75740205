"""What leaves and weights are called in PyTorch, and how their axes correspond.

Imports `_adapters`, `_tree`, `_types`, `peft._file`.
"""

from . import tables as tables
