"""Name tables: the names of leaves in PyTorch, and how their axes correspond.

Imports `_adapters`, `_tree`, `_types`, `peft._file`.
"""

from . import tables as tables
