"""Every law of `laws` over every case of the tables in `cases`, in each dtype that the case has."""

from typing import Any

import jax.numpy as jnp
import laws
import orders
import pytest
from cases import CASES, SUBJECTS, Case

# For every day, where another dtype has all cases: a third of a subject, of whole models a twelfth.
DAILY = {
    case.name
    for subject in SUBJECTS
    for case in [c for c in CASES if c.subject == subject and not c.slow][
        :: 12 if subject == "model" else 3
    ]
}


def is_slow(case: Case, dtype: Any) -> bool:
    """Where float64 holds to 1e-10, float32 is the same program."""
    again = dtype is jnp.float32 and case.float64
    return case.slow or (again and case.name not in DAILY)


TABLE = [
    pytest.param(
        case,
        dtype,
        id=f"{case.name}-{dtype.__name__}",
        marks=[pytest.mark.slow] if is_slow(case, dtype) else [],
    )
    for case in CASES
    for dtype in (jnp.float32, jnp.float64)
    if case.float64 or dtype is jnp.float32
]


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_laws(case: Case, dtype: Any) -> None:
    """All in float32; in float64 those that hold to more digits there. Each in both orders."""
    with laws.precision(case, dtype) as tolerance:
        made = laws.make(case, dtype)
        laws.sites_are_the_expected(made)
        expected = made.merged()
        for order in (orders.APART, orders.SUMMED):
            with orders.forced(order) as planner:
                adapted = made.adapted()
                laws.adapted_is_merged(made, adapted, expected, tolerance)
                if dtype is jnp.float32:
                    laws.transforms_agree(made, adapted, tolerance)
                    laws.zero_is_the_base(made, tolerance)
            if not planner.called:
                break  # no product allows both orders: the second would be the same program
