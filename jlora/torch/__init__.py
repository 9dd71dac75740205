"""Models written in PyTorch, as functions of JAX.

Nothing else in jlora imports PyTorch or torchax. Imports `_compat`, `_errors`, `_progress`,
`_rules`, `_site`, `_sites`, `_text`, `_transform`, `_tree`, `_types`, `peft`.
"""

from ._all_linear import all_linear as all_linear
from ._apply import Apply as Apply
from ._compare import compare as compare
from ._differences import Difference as Difference
from ._differences import Differences as Differences
from ._extract import extract as extract
from ._names import names as names
