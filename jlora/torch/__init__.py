"""Models written in PyTorch, as functions of JAX.

Nothing else in jlora imports PyTorch or torchax. Imports `_compat`, `_errors`, `_progress`,
`_rules`, `_site`, `_sites`, `_text`, `_transform`, `_tree`, `_types`, `peft`.
"""

from typing import TYPE_CHECKING

from ._all_linear import all_linear as all_linear
from ._compare import compare as compare
from ._differences import Difference as Difference
from ._differences import Differences as Differences
from ._extract import extract as extract
from ._names import names as names

if TYPE_CHECKING:
    from ._apply import Apply as Apply


def __getattr__(name: str) -> object:
    """Imports PyTorch for the type of what `extract` returns, and only then."""
    if name != "Apply":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import _apply

    return _apply.Apply
