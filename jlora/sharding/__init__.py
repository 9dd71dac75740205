"""Shardings of adapters, of their optimizer state, and of quantized bases.

Imports `_adapters`, `_compat`, `_core`, `_quantized`, `_rules`, `_tree`, `_types`.
"""

from ._places import gathered as gathered
from ._specs import moments as moments
from ._specs import replicated as replicated
from ._specs import specs as specs
