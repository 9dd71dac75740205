"""Methods, a file each. Imports `_core`, `initializers`, `_compat`, `_rules`, `_types`.

To add one, see `_method`: a rule, a node, and a `register`.
"""

from . import _low_rank  # noqa: F401
from ._dora import Decomposed as Decomposed
from ._dora import DoRA as DoRA
from ._dora import decomposed_axes as decomposed_axes
from ._low_rank import LoRA as LoRA
from ._low_rank import LowRank as LowRank
from ._low_rank import clipped_rank as clipped_rank
from ._low_rank import factor_shapes as factor_shapes
from ._low_rank import low_rank_axes as low_rank_axes
from ._low_rank import still as still
from ._low_rank import without_slots as without_slots
from ._matrices import leading_axes as leading_axes
from ._matrices import matrices as matrices
from ._method import METHODS as METHODS
from ._method import SLOTS as SLOTS
from ._method import Method as Method
from ._method import PartialWeightError as PartialWeightError
from ._method import arrays as arrays
from ._method import change_of as change_of
from ._method import factor as factor
from ._method import is_node as is_node
from ._method import is_rule as is_rule
from ._method import labels_of as labels_of
from ._method import lengths as lengths
from ._method import lowered as lowered
from ._method import method_of as method_of
from ._method import misfit as misfit
from ._method import register as register
from ._method import state as state
from ._method import static as static
from ._method import trainable as trainable
from ._method import weight_shape as weight_shape
from ._probe import Probe as Probe
from ._routed import Routed as Routed
from ._rows import Replaced as Replaced
from ._rows import Rows as Rows
