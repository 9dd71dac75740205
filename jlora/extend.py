"""The one door for own methods, schemes, primitives and engines."""

from ._adapters import METHODS as METHODS
from ._adapters import Method as Method
from ._adapters import factor as factor
from ._adapters import register as register
from ._core import RANK as RANK
from ._core import Axis as Axis
from ._core import Change as Change
from ._core import Delta as Delta
from ._core import Factor as Factor
from ._quantized import Form as Form
from ._quantized import Scheme as Scheme
