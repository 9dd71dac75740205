"""How A and B start, a file each.

Imports `_core`, `_quantized`, `_compat`, `_linalg`, `_rules`, `_types`, `_whole`.

An initializer is a function `(key, w, site, rule) -> (w, a, b)`. `w` is W: an array, a
`jax.ShapeDtypeStruct` or a `jlora.Quantized`. `site` says what the model does with it, and
`rule` what the user asked for; `rule.factor_shapes(site)` gives the shapes of A and B. An
initializer may return another W of the same shape and dtype, or its codes as a
`jlora.Quantized`: the node then has `residual`. Otherwise it returns the same object. One
with an attribute `frozen`, as `("a",)`, has these factors frozen beside those of the rule.
"""

from ._eva import eva as eva
from ._gaussian import gaussian as gaussian
from ._initializer import Initializer as Initializer
from ._kaiming_uniform import kaiming_uniform as kaiming_uniform
from ._loftq import loftq as loftq
from ._lora_ga import lora_ga as lora_ga
from ._milora import milora as milora
from ._miss import miss as miss
from ._olora import olora as olora
from ._paca import paca as paca
from ._pissa import pissa as pissa
from ._pissa import pissa_niter as pissa_niter
