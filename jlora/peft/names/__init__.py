"""Name tables: the names of leaves in PyTorch, and how their axes correspond.

Imports `_adapters`, `_errors`, `_tree` and `_types`.
"""

from . import tables as tables
