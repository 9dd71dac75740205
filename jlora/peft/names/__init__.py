"""Name tables: the names of leaves in PyTorch, and how their axes correspond.

Imports `_adapters`, `_arrays`, `_errors`, `_progress`, `_quantized`, `_site`, `_tree`, `_types`,
`peft._checkpoint`, `peft._file` and `peft.places`.
"""

from . import tables as tables
