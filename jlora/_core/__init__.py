"""The interpreter and its product. Imports `_arrays`, `_compat`, `_grouped`, `_registry`.

It evaluates a traced function in which some parameters are a `Weight`: W with its `Change`, which
is all that the interpreter knows of a method. Read the modules in this order: `_axes`, `_change`,
`_weight`, `_interpret`, `_moves`, `_product`, `_contractions`, `_ragged`, `_factored`,
`_control`.
"""

from . import _contractions, _control, _joins, _lookup, _moves, _ragged  # noqa: F401
from ._axes import RANK as RANK
from ._axes import REPEATED as REPEATED
from ._axes import Axis as Axis
from ._axes import Factor as Factor
from ._axes import ProductAxes as ProductAxes
from ._axes import Unfactorable as Unfactorable
from ._change import Change as Change
from ._change import Delta as Delta
from ._interpret import Equation as Equation
from ._interpret import as_array as as_array
from ._interpret import evaluate as evaluate
from ._interpret import primitive as primitive
from ._packed import Packed as Packed
from ._packed import place_of_part as place_of_part
from ._weight import Operand as Operand
from ._weight import Weight as Weight
from ._weight import leaf_weight as leaf_weight
