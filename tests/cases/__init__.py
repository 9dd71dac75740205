"""The tables that the laws run over: one list of cases per module, one row of the issue each.

`plain` holds plain JAX, `control` higher-order primitives, `trees` containers of parameters,
`linen` and `nnx_models` Flax, `hf` whole models of `transformers`, `models` those of the examples.
`random_einsum` holds strategies for hypothesis.
"""

from . import control, hf, linen, models, nnx_models, plain, trees
from ._case import Case as Case
from ._case import Problem as Problem

CASES: list[Case] = [
    *plain.CASES,
    *control.CASES,
    *trees.CASES,
    *linen.CASES,
    *nnx_models.CASES,
    *hf.CASES,
    *models.CASES,
]


def all_cases(*rows: int) -> list[Case]:
    """The cases of the given rows; of all rows where none is given."""
    return [case for case in CASES if not rows or case.row in rows]
