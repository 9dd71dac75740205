"""The tables of cases are whole: what must be exact has cases, and each case has its own name."""

import pytest
from cases import CASES, EVERY_DAY, SUBJECTS


@pytest.mark.parametrize("subject", SUBJECTS)
def test_subject_has_cases(subject: str) -> None:
    """At least two."""
    assert sum(case.subject == subject for case in CASES) >= 2, SUBJECTS[subject]


def test_every_case_has_a_subject() -> None:
    """One that the table of subjects describes."""
    assert {case.subject for case in CASES} <= SUBJECTS.keys()


def test_names_are_unique() -> None:
    """A name is a pytest id."""
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_day_has_some_of_each_subject() -> None:
    """They are cases, and each subject has one."""
    assert {case.name for case in CASES} >= EVERY_DAY
    assert {case.subject for case in CASES if case.name in EVERY_DAY} == SUBJECTS.keys()
