"""Initializers of A and B, a file each.

Imports `_arrays`, `_compat`, `_core`, `_linalg`, `_quantized`, `_rules`, `_site`, `_types`.

An initializer is a function `(key, w, site, rule) -> (w, a, b)`. `w` is W: an array, a
`jax.ShapeDtypeStruct` or a `jlora.Quantized`. `site` says how the model uses W, `rule` is the
user's rule, and `rule.factor_shapes(site)` returns the shapes of A and B.

An initializer returns the object `w` itself, or changes the base: it returns another W of the same
shape and dtype, or a `jlora.Quantized` of it. The node is then `residual`. An initializer with the
attribute `frozen`, such as `("a",)`, freezes these factors in addition to those of the rule.
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
