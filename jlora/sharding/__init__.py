"""Shardings of adapters, of their optimizer state, and of quantized bases.

Imports `_adapters`, `_arrays`, `_compat`, `_errors`, `_quantized`, `_rules`, `_tree` and `_types`.
"""

from ._places import gathered as gathered
from ._specs import moments as moments
from ._specs import replicated as replicated
from ._specs import specs as specs
