"""Saves and restores adapters as Orbax checkpoints.

Imports `_adapters`, `_arrays`, `_errors`, `_folders`, `_quantized`, `_rules`, `_site`,
`_tree`, `_types`, `initializers`.

A checkpoint contains the adapter, and the metadata to rebuild it without the training script. It
does not contain the base.

checkpoint.save("out/adapter", adapter, rules, base=base)
adapter = checkpoint.restore("out/adapter", base=base)
"""

from ._base import base_shapes as base_shapes
from ._base import base_values as base_values
from ._fingerprint import Leaf as Leaf
from ._fingerprint import fingerprint as fingerprint
from ._meta import Saved as Saved
from ._restore import read as read
from ._restore import restore as restore
from ._rules_in_files import Foreign as Foreign
from ._save import export as export
from ._save import items as items
from ._save import save as save
