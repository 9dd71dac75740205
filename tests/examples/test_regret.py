"""`examples/regret.py` and `regret_figures.py`: the advice, some runs, and what is written."""

import pathlib
import re
import shutil

import advice
import numpy as np
import pytest
import regret
import regret_figures
import trials
from regret import PLANS, Setting

GUIDES = pathlib.Path(__file__).parents[2] / "notebooks"
RESULTS = [f"regret_{name}.csv" for name in ("runs", *regret.OWN)]

# ---- runs ---------------------------------------------------------------------------------------


def advised(capsys, *options):
    """Rank, scale and rates that the calculator prints."""
    regret.main(["--advise", *options])
    found = re.findall(r"(?m)^(rank|scale|rates) (.*)$", capsys.readouterr().out)
    return {name: [float(x) for x in re.findall(r"[\d.e-]+\d|\d", text)] for name, text in found}


@pytest.mark.parametrize("model", ["MiniLM", "SmolLM2"])
def test_the_advice_is_near_what_was_measured(capsys, model):
    """The rule finds the half decade next to the best rate of a model among at most five."""
    [width] = {width for name, width in advice.MODELS.values() if name == model}
    rows = [x for x in regret.tables.read(regret.OUT / "regret.csv") if advice.is_default(x)]
    rows = [row for row in rows if advice.MODELS.get(row["task"], "")[:1] == (model,)]
    rows = [row for row in rows if row["best_rate"] > 0]
    assert rows
    for batch in {row["batch"] for row in rows}:
        found = advised(capsys, f"--width={width}", f"--batch={batch}")
        assert (found["rank"], found["scale"]) == ([8, 64], [4])
        start, more, less = found["rates"]
        assert more / start == pytest.approx(10**0.5, rel=0.1)
        assert start / less == pytest.approx(10**0.5, rel=0.1)
        for row in rows:
            if row["batch"] == batch:
                best, asked = 2 * np.log10(row["best_rate"]), []
                loss = lambda n, seed, best=best, asked=asked: asked.append(n) or abs(n - best)  # noqa: E731
                n = trials.best_rate(loss, round(2 * np.log10(start)), most=9)
                assert abs(n - best) <= 0.5 and len(asked) <= 5


@pytest.mark.slow
def test_strings_are_learned(monkeypatch):
    """By full fine-tuning, more than by rank 1."""
    strings = regret.strings
    monkeypatch.setattr(regret, "strings", lambda *args: strings(*args)._replace(steps=300))
    learned = {}
    for rank in (0, 1):
        train = regret.make_train(regret.scaled("capacity", "strings-16", rank, 16, "blocks"))
        learned[rank] = regret_figures.learned(train(3e-3, 0) | {"task": "strings-16"})
    assert 100 < learned[1] < learned[0] < 16 * 16 * 6


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_committed_table_is_that_of_the_committed_runs(tmp_path):
    for name in RESULTS:
        if (regret.OUT / name).exists():
            shutil.copy(regret.OUT / name, tmp_path)
    rows = regret_figures.read(tmp_path)
    keys = [tuple(row[name] for name in (*Setting._fields, "rate", "seed")) for row in rows]
    assert len(keys) == len(set(keys))
    settings = {Setting(*key[:-2]) for key in keys}
    settings = {x for x in settings if x.method != "muon"}  # LoRA-Muon, which jlora has no more
    assert settings <= {x for plan, _ in PLANS.values() for x in plan}
    regret_figures.write(tmp_path)
    made, kept = ((folder / "regret.csv").read_text() for folder in (tmp_path, regret.OUT))
    assert made == kept


def test_the_guides_have_the_tables():
    """Where a page shows the picture of an experiment, one has its table, as the runs say."""
    text = "".join(path.read_text(encoding="utf-8") for path in GUIDES.rglob("*.md"))
    rows = regret_figures.read(regret.OUT)
    pictures = set(re.findall(r"results/regret_(\w+)\.png", text))
    assert pictures and pictures <= {row["experiment"] for row in rows}
    for name in pictures:
        assert regret_figures.markdown(rows, name) in text, name
    for sentence in re.findall(r"On \w+, .* takes .* times the learning rate\.\n", text):
        assert sentence in regret_figures.trends(rows)
