"""Weights in 4 and 8 bits, a file for each scheme.

Imports `_arrays`, `_compat`, `_core`, `_errors`, `_linalg`, `_rules` and `_types`.

Read the modules in this order: `_scheme`, `_leaf`, `_encode`, `_nf4`.
"""

from ._dynamic import DYNAMIC as DYNAMIC
from ._encode import check_finite as check_finite
from ._encode import quantize_weight as quantize_weight
from ._entries import quantize_entries as quantize_entries
from ._fp4 import FP4 as FP4
from ._fp8 import FP8 as FP8
from ._int4 import Int4 as Int4
from ._int8 import Int8 as Int8
from ._leaf import BaseLeaf as BaseLeaf
from ._leaf import Nested as Nested
from ._leaf import Quantized as Quantized
from ._leaf import dequantize as dequantize
from ._leaf import is_quantized as is_quantized
from ._mxfp4 import MXFP4 as MXFP4
from ._nf4 import NF4 as NF4
from ._scheme import Coded as Coded
from ._scheme import Form as Form
from ._scheme import Scheme as Scheme
from ._scheme import form_of as form_of
from ._scheme import one_block as one_block
from ._scheme import spell as spell
