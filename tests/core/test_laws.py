"""Every law of `laws` over every case of the tables in `cases`, in each dtype that the case has."""

from typing import Any

import jax.numpy as jnp
import laws
import numpy as np
import pytest
from cases import CASES, EVERY_DAY, Case

# All laws every day.
DAILY = ("scan_layers",)


def entries() -> Any:
    """Every law in float32, and that adapted is merged in the widest dtype: every day one of them.

    Where float64 holds to 1e-10, float32 is the same program. Other cases are for the long run.
    """
    for case in CASES:
        for every_law in (True, False):
            dtype = jnp.float64 if case.float64 and not every_law else jnp.float32
            daily = every_law == (case.name in DAILY) and case.name in EVERY_DAY
            name = f"{case.name}-{dtype.__name__}" + "-every_law" * every_law
            marks = [] if daily else [pytest.mark.slow]
            yield pytest.param(case, dtype, every_law, id=name, marks=marks)


@pytest.mark.parametrize(("case", "dtype", "every_law"), [*entries()])
def test_laws(case: Case, dtype: Any, every_law: bool) -> None:
    """One problem and one `init` for all."""
    with laws.precision(case, dtype) as tolerance:
        made = laws.make(case, dtype, default_start=every_law)
        laws.sites_are_the_expected(made)
        laws.hold(made, tolerance, every_law)
        if every_law:
            laws.table_is_that_of_init(made)
            laws.frozen_is_left_out(made)
            laws.quantized_is_dequantized(made, max(tolerance, 1e-5))


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_not_finite_hides_nothing(odd: float) -> None:
    """The entries beside it must agree too."""
    laws.assert_close(np.array([1.0, odd]), np.array([1.0, odd]), 1e-5)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        laws.assert_close(np.array([2.0, odd]), np.array([1.0, odd]), 1e-5)


def test_the_tables_are_whole() -> None:
    """Names are unique, and every day cases of each subject run, but for whole models."""
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert names >= EVERY_DAY >= set(DAILY)
    daily = {c.subject for c in CASES if c.name in EVERY_DAY}
    assert daily == {c.subject for c in CASES} - {"model"}  # those of the examples' own tests
