"""`examples/regret.py` and `regret_figures.py`: what runs when, and what is written."""

import collections
import pathlib
import re
import shutil

import advice
import grpo
import numpy as np
import pytest
import regret
import regret_figures
import small_gpts
import trials
from regret import PLANS, Setting
from small import some

from tests.examples.test_grpo import CONFIG, PARAMS, Tokenizer

GUIDES = pathlib.Path(__file__).parents[2] / "notebooks"
RESULTS = [f"regret_{name}.csv" for name in ("runs", *regret.OWN)]
CURVES = {
    "first": [("loss", regret.FIRST)],
    "reinforce": [("reward", regret.REWARDED)],
}
TWO = dict.fromkeys(("long", "parts", "reinforce", "sentences"), 2)
FURTHER = TWO | {"first": 1, "forgetting": 4}  # rates of further seeds
RIGHT = [f"{x}_{when}" for x in ("sampled", "greedy") for when in ("before", "after")]

# ---- runs ---------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The runs that take place; their loss is least at 1e-3, for full fine-tuning at 1e-4."""
    found = []

    def make_train(setting):
        best = -3 if setting.rank else -4

        def train(rate, seed):
            found.append((setting, rate, seed))
            loss = (np.log10(rate) - best) ** 2 + 0.01 * seed
            scores = dict.fromkeys(("validation", "held_out", "loss"), loss)
            scores |= dict.fromkeys(("held_out_right", *RIGHT), 1 - loss) | {"trained": 10}
            if setting.experiment == "forgetting":
                old = {"old_before": 1.0, "old_after": 1 + 10 * rate, "intruders": 0}
                scores |= {"new_before": loss + 1, **old}
            for name, steps in CURVES.get(setting.experiment, ()):
                scores |= regret.numbered(name, [loss + 1 - i / steps for i in range(steps)])
            return scores

        return train

    monkeypatch.setattr(regret, "make_train", make_train)
    return found


@pytest.mark.parametrize("name", some(PLANS, "rates"))
def test_every_experiment(tmp_path, name, asked):
    """One seed of all settings comes first, and no run is repeated; a picture and a table."""
    command = ["--experiments", name, "--seeds", "2", "--out", str(tmp_path)]
    regret.main(command)
    own = list(dict.fromkeys((setting, seed) for setting, _, seed in asked))
    assert own == [(x, seed) for seed in (0, 1) for x in PLANS[name][0]]
    further = collections.Counter(setting for setting, _, seed in asked if seed == 1)
    assert set(further.values()) == {FURTHER.get(name, 3)}
    # A process that was stopped in a run, and in writing of it.
    path, before = tmp_path / f"regret_{name if name in regret.OWN else 'runs'}.csv", list(asked)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:20])
    regret.main(command)
    assert asked[len(before) :] == before[-2:]
    assert path.read_text() == "".join(lines)

    text = regret_figures.write(tmp_path)
    assert (tmp_path / f"regret_{name}.png").stat().st_size > 5000
    table = regret_figures.markdown(regret_figures.read(tmp_path), name)
    settings = {x.rank for x in PLANS[name][0]} if name in regret_figures.BITS else PLANS[name][0]
    assert table in text
    before = {"reinforce": 1, "forgetting": 2}.get(name, 0)
    assert len(table.splitlines()) == 2 + before + len(settings)


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


@pytest.mark.parametrize("given", [[], ["--batch=16"], ["--width=64"], ["--width=64", "--batch=0"]])
def test_no_advice_without_a_model(capsys, given):
    """It names what is absent."""
    with pytest.raises(SystemExit):
        regret.main(["--advise", *given])
    error = capsys.readouterr().err
    for name, what in advice.ADVISED.items():
        assert (f"--{name} ({what})" in error) == (f"--{name}" not in str(given))
    assert ("--batch=0: expected 1 or more" in error) == ("--batch=0" in given)


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


@pytest.mark.slow
def test_a_run_on_rewards(monkeypatch):
    """What the score is and what chooses the rate; all steps."""
    monkeypatch.setattr(grpo, "HELD_OUT", grpo.HELD_OUT[:8])
    monkeypatch.setattr(regret, "REWARDED", 3)
    before = dict.fromkeys(RIGHT[::2], 0.25)
    monkeypatch.setattr(regret, "untrained", lambda: ((CONFIG, PARAMS, Tokenizer()), before))
    row = regret.make_train(regret.scaled("reinforce", "sums", 8, 8))(1e-2, 2)
    assert set(RIGHT) < row.keys() and row["sampled_before"] == 0.25
    rewards = list(regret_figures.curve(row).values())
    assert len(rewards) == 3
    assert row["validation"] == pytest.approx(1 - np.mean(rewards), abs=1e-5)


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """Other texts for the GPTs, in few steps, and a cache of its own."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(50)]
    parts = [[" ".join(rng.choice(words, 30)) for _ in range(n)] for n in (1600, 100)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("glosses", "verses"):
        monkeypatch.setattr(small_gpts.data, name, lambda: parts)
    for name, value in {"STEPS": 8, "WARMUP": 1, "KEEP": 4, "BATCH": 4}.items():
        monkeypatch.setattr(small_gpts, name, value)
    cached = (small_gpts.tokenizer, small_gpts.glosses, small_gpts.bible, small_gpts.load)
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_a_run_that_looks_back(texts, monkeypatch, method):
    """What is new falls from look to look, beside what is old; the base counts no intruder."""
    bible = regret.bible
    monkeypatch.setattr(regret, "bible", lambda *args: bible(*args)._replace(steps=16))
    monkeypatch.setitem(regret.BEFORE, "gpt", 8)
    setting = regret.scaled("forgetting", "gpt-64x1", 8, 16)._replace(method=method)
    regret.make_task.cache_clear()
    row = regret.make_train(setting)(3e-3, 0)
    assert np.isfinite([row["old_before"], row["old_after"]]).all()
    assert row["held_out"] < row["new_before"]
    params = regret.make_task(setting._replace(rank=0, scale=1.0, method="lora")).params
    assert regret.count_intruders(params, params) == 0 <= row["intruders"] <= 10


# ---- what is written ----------------------------------------------------------------------------


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
