"""How A and B start, a file each. Imports `core`.

An initializer is a function `(key, w, site, rule) -> (w, a, b)`. `w` is W, an array or a
`jax.ShapeDtypeStruct`; `site` and `rule` say what it is and what is asked for;
`rule.factor_shapes(site)` gives the shapes of A and B. An initializer may change W.
"""

from ._eva import eva as eva
from ._gaussian import gaussian as gaussian
from ._kaiming_uniform import kaiming_uniform as kaiming_uniform
from ._lora_ga import lora_ga as lora_ga
