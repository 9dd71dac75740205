"""The tables that the laws run over: one list of cases per module.

`plain` holds plain JAX, `control` higher-order primitives, `trees` containers of parameters,
`linen` and `nnx_models` Flax, `models` whole models: those of the examples.
`random_einsum` holds strategies for hypothesis.
"""

from . import control, linen, models, nnx_models, plain, trees
from ._case import SUBJECTS as SUBJECTS
from ._case import Case as Case
from ._case import Problem as Problem
from ._daily import EVERY_DAY as EVERY_DAY

CASES: list[Case] = [
    *plain.CASES,
    *control.CASES,
    *trees.CASES,
    *linen.CASES,
    *nnx_models.CASES,
    *models.CASES,
]
