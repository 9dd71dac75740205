"""Models written in PyTorch, as functions of JAX.

Nothing else in jlora imports PyTorch or torchax. Imports `_errors`, `_rules`, `_sites`, `_tree`,
`_types`, `peft`.
"""

from ._extract import extract as extract
from ._names import names as names
