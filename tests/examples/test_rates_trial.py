"""`examples/rates_trial.py`: how the rule is judged, and that the guide has what was run."""

import math
import pathlib

import numpy as np
import pytest
import rates_trial
import tables
import trials
from rates_trial import DESIGN, GRID, SEEDS, SEEN, SETS, TRIAL

import jlora

RULES = pathlib.Path(__file__).parents[2] / "notebooks" / "variants.md"
GUIDE = RULES.with_name("measurements") / "rates.md"


def test_the_guide_has_the_table_of_the_committed_runs():
    """Of every set, rate and seed."""
    rows = tables.read(rates_trial.OUT)
    keys = {(row["set"], row["rate"], row["seed"]) for row in rows}
    rates = [trials.to_rate(n) for n in GRID]
    assert keys == {(name, rate, seed) for name in SETS for rate in rates for seed in SEEDS}
    assert len(rows) == len(keys)
    assert rates_trial.markdown(rows) in GUIDE.read_text(encoding="utf-8")


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]


def test_the_guides_say_how_often_the_rule_was_good():
    """And how many runs it takes."""
    rules, page = (" ".join(path.read_text(encoding="utf-8").split()) for path in (RULES, GUIDE))
    rows = tables.read(rates_trial.OUT)
    # Nothing is learned on one set.
    learned = {make: width for make, width in TRIAL.items() if make is not rates_trial.portrait}

    def results(sets, seeds):
        return [x for own in rates_trial.judge_all(rows, sets, seeds).values() for x in own]

    def good(sets, seeds):
        found = [x.is_as_good for x in results(sets, seeds)]
        return f"{sum(found)} of {len(found)}"

    assert np.mean([9 <= x.runs <= 15 for x in results(TRIAL, SEEN)]) > 0.9  # nine to fifteen runs
    first = [own[0].is_as_good for own in rates_trial.judge_all(rows, TRIAL, SEEN).values()]
    assert all(first) and f"on {WORDS[len(learned)]} [new data sets]" in rules
    one = [x.is_as_good for x in results(learned, 1) + results(DESIGN, 1)]
    assert f"in {sum(one)} of {len(one)} trials on twelve sets" in rules
    one, three = good(learned, 1), good(learned, SEEN).split()[0]
    assert f"one seed was as good in {one} results, and three seeds in {three}." in page


@pytest.mark.slow
def test_a_run_learns_and_the_losses_are_the_models(monkeypatch):
    """The lowest rate keeps what the model knew; a higher one learns more."""
    monkeypatch.setattr(rates_trial, "PRETRAINING", 4)
    x = np.random.default_rng(0).standard_normal((120, 6))
    problem = rates_trial.of_features(x, (x[:, 0] > 0).astype(int), 32)
    assert [len(rows[0]) for rows in problem.rows] == [60, 24, 36]
    before = [problem.loss(problem.model.apply(problem.params, x), y) for x, y in problem.rows[1:]]
    found = {n: scores for n, *scores in rates_trial.make_train(problem)(0)}
    assert list(found) == list(GRID)
    np.testing.assert_allclose(found[-10], before, rtol=0.02)
    assert found[-5][0] < 0.7 * before[0] and all(math.isfinite(x) for x in found[-5])
    assert isinstance(problem.head[0], jlora.Full)
