"""The types that jlora's functions return, for annotations and `isinstance`."""

from ._adapters import Decomposed as Decomposed
from ._adapters import LowRank as LowRank
from ._adapters import Replaced as Replaced
from ._errors import InputError as InputError
from ._errors import Problem as Problem
from ._node import BoundLeaf as BoundLeaf
from ._planning import Plan as Plan
from ._quantized import BaseLeaf as BaseLeaf
from ._report import QuantizedLeaf as QuantizedLeaf
from ._report import Summary as Summary
from ._site import Site as Site
from ._sites import Sites as Sites
from ._sketching import Sketch as Sketch
from ._sketching import Spectrum as Spectrum
from ._transform import Transformed as Transformed
from ._types import Layout as Layout
from .initializers._initializer import RankRule as RankRule
