"""Forces the order in which x·(W + A·B) is computed, so that a law can be checked under both.

The library asks one function of `(tokens, inputs, outputs, rank, dtype)` at every product that
allows both orders. It is replaced under the name by which the products look it up, `PLANNER`; it
answers `APART` for x·W + (x·A)·B and `SUMMED` for x·(W + A·B). If the name moves or the answers
change, this is the only place to follow.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax.numpy as jnp

PLANNER = "jlora.core._dot.plan"
APART, SUMMED = "apart", "summed"


@contextlib.contextmanager
def forced(order: Any) -> Iterator[mock.Mock]:
    """Every product in `order`, but apart in less than 32 bits, where the sum would round ΔW away.

    Gives the mock in the planner's place: `called` says whether any product allowed both orders.
    """

    def plan(tokens: int, inputs: int, outputs: int, rank: int, dtype: Any) -> Any:
        del tokens, inputs, outputs, rank
        return order if jnp.finfo(dtype).bits >= 32 else APART

    with mock.patch(PLANNER, side_effect=plan) as planner:
        yield planner
