"""Methods.

Imports `_arrays`, `_compat`, `_core`, `_errors`, `_node`, `_quantized`, `_registry`, `_rules`,
`_site`, `_types`, `initializers`.

A method is a file with two classes: a rule, which the user writes, and a node, which the rule puts
into the adapter. `../_node.py` and `../_site.py` have their base classes.
"""

from .._node import SLOTS as SLOTS
from .._node import AdapterLeaf as AdapterLeaf
from .._node import Node as Node
from .._node import arrays as arrays
from .._node import is_node as is_node
from .._node import is_table as is_table
from .._node import state as state
from .._node import static as static
from .._node import trained as trained
from .._node import weight_shape as weight_shape
from ._dora import Decomposed as Decomposed
from ._dora import DoRA as DoRA
from ._dora import join_slots as join_slots
from ._gated import Probe as Probe
from ._gated import Routed as Routed
from ._lora import LoRA as LoRA
from ._lora import clip_rank as clip_rank
from ._low_rank import LowRank as LowRank
from ._low_rank import factor_shapes as factor_shapes
from ._low_rank import from_matrices as from_matrices
from ._low_rank import leading_axes as leading_axes
from ._low_rank import matrices as matrices
from ._low_rank import matrix_lengths as matrix_lengths
from ._low_rank import stop_gradients as stop_gradients
from ._low_rank import without_slots as without_slots
from ._register import RULES as RULES
from ._register import check_registered as check_registered
from ._register import register as register
from ._register import to_tuples as to_tuples
from ._rows import Replaced as Replaced
from ._rows import Rows as Rows
