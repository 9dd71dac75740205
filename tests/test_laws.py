"""Every law of `laws` over every case of the tables in `cases`, in each dtype that the case has."""

from typing import Any

import jax.numpy as jnp
import laws
import pytest
from cases import CASES, EVERY_DAY, Case

# All laws every day.
DAILY = ("matmul", "conv_nchw", "experts_einsum", "scan_layers")


def entry(case: Case, dtype: Any, every_law: bool, slow: bool) -> Any:
    """A parameter of the test."""
    name = f"{case.name}-{dtype.__name__}" + "-every_law" * every_law
    return pytest.param(case, dtype, every_law, id=name, marks=[pytest.mark.slow] if slow else [])


def entries(case: Case) -> list[Any]:
    """Every law in float32, and that adapted is merged in the widest dtype: every day one of them.

    Where float64 holds to 1e-10, float32 is the same program. Other cases are for the long run.
    """
    daily = case.name in DAILY
    all_laws = entry(case, jnp.float32, True, slow=not daily)
    if daily and not case.float64:
        return [all_laws]
    widest = jnp.float64 if case.float64 else jnp.float32
    long = case.slow or daily or case.name not in EVERY_DAY
    return [all_laws, entry(case, widest, False, slow=long)]


@pytest.mark.parametrize(("case", "dtype", "every_law"), [e for c in CASES for e in entries(c)])
def test_laws(case: Case, dtype: Any, every_law: bool) -> None:
    """One problem and one `init` for all."""
    with laws.precision(case, dtype) as tolerance:
        made = laws.make(case, dtype, default_start=every_law)
        laws.sites_are_the_expected(made)
        laws.hold(made, tolerance, every_law)
        if every_law:
            laws.table_is_that_of_init(made)
            laws.quantized_is_dequantized(made, max(tolerance, 1e-5))
