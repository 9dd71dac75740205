"""`examples/regret.py` and `regret_figures.py`: what runs when, and what is written."""

import collections
import pathlib
import re
import shutil

import advice
import grpo
import jax
import numpy as np
import pytest
import regret
import regret_figures
import small_gpts
from regret import PLANS, Setting
from small import some
from test_grpo import CONFIG, PARAMS, Tokenizer

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


def test_what_is_forgotten_at_equal_loss():
    """Where each has learned as much as the worst at its best rate, on a line from rate to rate."""
    runs = {1: [(9, 9), (2, 5), (3, 4)], 8: [(9, 9), (1, 6), (3, 4)]}  # new and old, by rate
    rows = []
    for rank, each in runs.items():
        setting = regret.scaled("forgetting", "glosses", rank, 4)._asdict()
        for (new, old), rate in zip(each, (1e-2, 1e-3, 3e-4), strict=True):
            for seed in (0, 1):
                losses = {"validation": new, "held_out": new, "old_after": old + 0.2 * seed}
                before = {"new_before": 9, "old_before": 3, "intruders": rank}
                rows.append(setting | losses | before | {"rate": rate, "seed": seed})
    lines = regret_figures.forgotten_lines(rows)[2:]
    assert lines[0] == ["glosses, before", "9.000", "3.000", "at 2.000", ""]
    one = ["2.000 ± 0.000", "5.100 ± 0.100", "5.100 ± 0.100", "1.00"]
    eight = ["1.000 ± 0.000", "6.100 ± 0.100", "5.100 ± 0.100", "8.00"]
    assert [line[1:] for line in lines[1:]] == [one, eight]


@pytest.mark.parametrize("name", some(PLANS, "sentences"))
def test_some_of_the_runs_are_shown(tmp_path, name, asked):
    """While others are still to come."""
    regret.main(["--experiments", name, "--seeds", "1", "--out", str(tmp_path)])
    rows = regret_figures.read(tmp_path)
    for n in (1, 2, 3, 5, len(rows) // 2, len(rows) - 1):
        panels = regret_figures.collect(name, rows[:n])
        if panels:
            regret_figures.draw(tmp_path / "some.png", name, panels)
        shown = regret_figures.group(rows[:n])
        assert len(regret_figures.summary(rows[:n])) == len(shown)
        assert len(regret_figures.markdown(rows[:n], name).splitlines()) > 2
        regret_figures.trends(rows[:n])


def advised(capsys, *options):
    """Rank, scale, rates and steps that the calculator prints."""
    regret.main(["--advise", *options])
    found = re.findall(r"(?m)^(rank|scale|rates|steps) (.*)$", capsys.readouterr().out)
    return {name: [float(x) for x in re.findall(r"[\d.e-]+\d|\d", text)] for name, text in found}


@pytest.mark.parametrize("model", ["MiniLM", "SmolLM2"])
def test_the_advice_is_near_what_was_measured(capsys, model):
    """The best rate of a model, with its batch, is one to try or a neighbor of one."""
    [width] = {width for name, width in advice.MODELS.values() if name == model}
    rows = [x for x in regret.tables.read(regret.OUT / "regret.csv") if advice.is_default(x)]
    rows = [row for row in rows if advice.MODELS.get(row["task"], "")[:1] == (model,)]
    rows = [row for row in rows if row["best_rate"] > 0]
    assert rows
    for batch in {row["batch"] for row in rows}:
        found = advised(capsys, f"--width={width}", f"--batch={batch}", "--rows=4096")
        expected = [8, 64], [4], [4096 // batch]
        assert (found["rank"], found["scale"], found["steps"]) == expected
        low, high = found["rates"]
        assert high / low == pytest.approx(10**0.5, rel=0.1)
        for row in rows:
            if row["batch"] == batch:
                assert low / 3.4 < row["best_rate"] < high * 3.4


def test_the_advice_follows_the_runs():
    """Powers of width and batch from within models; more rows to learn take a higher rank."""
    row = dict(zip(Setting._fields, regret.scaled("widths", "", 8, 16), strict=True))
    sizes = [("gpt-64x4", 64), ("gpt-256x4", 256), ("movies", 384), ("definitions", 576)]
    table = [
        row
        | {"task": task, "batch": batch, "best_rate": rate, "best_rate_low": rate / 2}
        | {"rank": rank, "scale": 32 / rank, "score": 1.0, "rates": 3, "standard_error": 0.1}
        for task, width in sizes
        for batch in (4, 16)
        for rank in (8, 64)
        for rate in [{"definitions": 0.2, "movies": 0.05}.get(task, 1) * batch**0.5 / width]
    ]
    once = row | {"task": "gpt-512x4", "best_rate": 1.0, "best_rate_low": float("nan")}
    sums = row | {"task": "sums", "best_rate": 1.0, "best_rate_low": 1.0}
    levels, powers = advice.fit([*table, sums, once])  # neither of them counts
    np.testing.assert_allclose(powers, (-1, 0.5), atol=1e-9)
    expected = {"GPT": 0, "MiniLM": np.log10(0.05), "SmolLM2": np.log10(0.2)}
    assert levels == pytest.approx(expected, abs=1e-9)
    text = advice.advise(table, 1000, 100, 10**6, 12, 100)  # (1 · 0.05)^0.5 · 100^0.5 / 1000
    assert "rates 1e-3 and 3e-3," in text and "GPT 4.47, MiniLM 0.22, SmolLM2 0.89." in text
    sizes = [(10, 12, 100), (10**4, 12, 100), (10**5, 12, 100), (10**4, 4, 100), (10**9, 12, 1)]
    ranks = [advice.advise(table, 576, 16, *x).split("\n")[0] for x in sizes]
    then = ", and then 64 at the better rate"
    assert ranks == [f"rank {x}" for x in (f"8{then}", f"8{then}", 64, f"16{then}", 64)]


def test_what_a_higher_rank_gains():
    """Against the one next to 8, of the same task and batch, where both ran."""
    scores = {("a", 1): 9, ("a", 4): 3, ("a", 16): 9, ("a", 64): 1, ("b", 8): 1, ("b", 64): 2}
    table = [
        regret.scaled("widths", task, rank, 16)._asdict()
        | {"score": x, "rates": 3, "standard_error": 0.1, "best_rate_low": 1.0}
        for (task, rank), x in (scores | {("c", 8): 5, ("d", 64): 5, ("d", 256): 4}).items()
    ]
    table += [row | {"task": "e", "standard_error": np.nan} for row in table[:4]]
    table += [row | {"task": "f", "rates": 1} for row in table[:4]]
    assert advice.gains(table) == {("widths", "a", 16): 2, ("widths", "b", 16): -1}
    alone = [row | {"task": "movies", "best_rate": 1e-3} for row in table if row["task"] == "c"]
    assert "comparisons" not in advice.advise(alone, 384, 16, 10, 6, 1)


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
def test_pretraining_goes_on_where_it_ended(texts, monkeypatch):
    """To the same parameters as without a stop; a whole one is read."""
    _, whole = small_gpts.load(64, 1)
    folder = small_gpts.data.cache_folder()
    kept = {}

    def stop(steps, **_):
        for i in steps:
            if i == 5 and not kept:
                kept.update(stopped=True)
                raise KeyboardInterrupt
            yield i

    (folder / "gpt-64x1.msgpack").unlink()
    stop.write = print
    monkeypatch.setattr(small_gpts, "progress", stop)
    small_gpts.load.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        small_gpts.load(64, 1)
    _, resumed = small_gpts.load(64, 1)
    small_gpts.load.cache_clear()
    _, read = small_gpts.load(64, 1)
    for other in (resumed, read):
        assert jax.tree.all(jax.tree.map(np.array_equal, other, whole))


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


def test_the_best_rate_lies_among_the_three():
    """Where the parabola is lowest beyond them, or nowhere, it is not known."""
    each = [[2, 1, 2], [3, 2, 1.5], [1, 2, 1]]
    found = [regret_figures.vertices(np.array([losses, losses], float)) for losses in each]
    np.testing.assert_array_equal(found, [[0, 0], [np.nan] * 2, [np.nan] * 2])


def test_how_the_best_rate_grows():
    """A line for each rank; the two scatter by as much as their seeds differ."""
    at = {}
    for setting in regret.batches("batches", "movies"):
        best = 0.5 * np.log10(setting.batch) - (4 if setting.rank else 5)
        at[setting] = best + np.array([-0.01, 0.01])
    found = regret_figures._factor(at, "batch", 4)
    low, high = map(float, re.fullmatch(r"2\.00 \((.*) to (.*)\)", found).groups())
    assert 1.95 < low < 2 < high < 2.05 and low * high == pytest.approx(4, abs=0.03)


def test_a_panel_has_the_axes_of_its_experiment(tmp_path, monkeypatch):
    """Also that of a task which has the name of another experiment."""
    drawn = []
    monkeypatch.setattr(regret_figures.plt, "close", drawn.append)
    panels = {
        name: {"all": {1e-3: [1.0, 1.1], 3e-3: [1.2, 1.3]}} for name in ("sentences", "order")
    }
    regret_figures.draw(tmp_path / "parts.png", "parts", panels)
    [figure] = drawn
    labels = {(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes}
    assert labels == {("learning rate", "validation loss")}


def behind(rows, one, other):
    """By how much more loss one setting ends than another, seed for seed; mean and error.

    Both are dictionaries of those fields of a setting that tell it from others.
    """
    ends = []
    for fields in (one, other):
        own = (row for row in rows if fields.items() <= row.items())
        [own] = regret_figures.group(own).values()
        rate = regret_figures.tables.best(own, "score", 1)[0]["rate"]
        ends.append({row["seed"]: row["score"] for row in own if row["rate"] == rate})
    return regret_figures.tables.mean([x - ends[1][seed] for seed, x in ends[0].items()])


def say(loss, error):
    return f"{loss:.3f} ± {error:.3f}"


def batch_claims(rows):
    """What the guide says of batches in words."""
    lost = [
        [
            say(*behind(rows, {"rank": rank, "batch": batch}, {"rank": rank, "batch": 16}))
            for rank in (4, 64, 0)
        ]
        for batch in (64, 256)
    ]
    ahead = [
        [
            behind(rows, {"rank": x, "batch": n}, {"rank": 64, "batch": n})[0]
            for n in (4, 16, 64, 256)
        ]
        for x in (4, 0)
    ]
    few, full = (f"{min(each):.3f} to {max(each):.3f}" for each in ahead)
    return [
        "64 loses {} nats at r = 4, {} at r = 64, and {} in full fine-tuning".format(*lost[0]),
        "256 loses more: {}, {} and {}.".format(*lost[1]),
        f"ahead of r = 4, by {few} nats, and of full fine-tuning, by {full}.",
        f"with 64 steps it lost {lost[0][1]} nats, with 16 steps {lost[1][1]}.",
    ]


def claims(guide, rows):
    """What a guide says of the tables in words."""
    has_scale = regret_figures.SCALES["s = 32/r"]
    table = [x for x in regret_figures.summary(rows) if has_scale(regret_figures.setting_of(x))]
    table = [row for row in table if row["method"] == "lora"]
    names = "rates", "batches", "third", "sentences", "widths"
    by_name = {x: [row for row in table if row["experiment"] == x] for x in names}
    known = {x: [row for row in each if row["of_full"] > 0] for x, each in by_name.items()}
    ratios = {x: [row["of_full"] for row in each] for x, each in known.items()}
    losses = [row["score"] for row in by_name["rates"] if row["rank"] > 1]
    between = lambda each: f"{min(each):.2g} to {max(each):.2g} times"  # noqa: E731
    found = [between([x for each in ratios.values() for x in each])]
    if guide == "variants.md":
        found.append(between([round(x) for x in ratios["rates"]]))
        found.append(f"within {np.ceil(100 * (max(losses) - min(losses))) / 100} nats")
        told = regret_figures.trends(rows)
        factor = re.search(r"with s = 32/r, (ten times the rank takes .*\) times) the", told)
        found += [f"{factor[1]} the rate", re.search(r"movies, (four times .*\)) times", told)[1]]
        own = [row for row in rows if row["experiment"] == "parts"]
        tasks = {row["task"] for row in own}
        alone = {
            name: sorted(
                behind(own, {"task": task, "layers": name}, {"task": task, "layers": "all"})
                for task in tasks
            )
            for name in ("attention", "feed-forward")
        }
        least, *_, most = alone["attention"]
        found.append(f"{say(*least)} to {say(*most)} nats behind on each of four tasks")
        ends = alone["feed-forward"][:: len(tasks) - 1]
        found.append(" to ".join(f"{x:+.3f} ± {e:.3f}" for x, e in ends))
        found += batch_claims([row for row in rows if row["experiment"] == "sentences"])
        gains = advice.gains(table)
        gpts = [x for (_, task, _), x in gains.items() if task.startswith("gpt")]
        others = [abs(x) for (_, task, _), x in gains.items() if not task.startswith("gpt")]
        found.append(f"64 was {min(gpts):.2f} to {max(gpts):.2f} nats ahead")
        found.append(f"end within {np.ceil(100 * max(others)) / 100} nats of each other; on small")
        levels, (width, batch) = advice.fit(table)
        ends = np.array([min(levels.values()), max(levels.values())])
        found.append(
            f"{10 ** ends.mean():.2g} · width^{width:.2f} · batch^{batch:.2f}, for s = 32/r"
        )
        found.append(f"within a factor of {np.ceil(10 ** (1 + np.ptp(ends) / 2)) / 10} of each")
    return found


def whole(rows):
    """The experiments of which all settings have run."""
    run = {(regret_figures.setting_of(row), row["seed"]) for row in rows}
    asked = {name: {(x, 0) for x in settings} for name, (settings, _) in PLANS.items()}
    return {name for name, runs in asked.items() if runs <= run}


@pytest.mark.parametrize("guide", ["variants.md", "rules.md"])
def test_the_guides_have_the_tables_and_the_numbers(guide):
    """A guide that shows the picture of an experiment has its table, as the runs say."""
    text, rows = (GUIDES / guide).read_text(encoding="utf-8"), regret_figures.read(regret.OUT)
    pictures = set(re.findall(r"results/regret_(\w+)\.png", text))
    assert pictures <= {row["experiment"] for row in rows}
    if guide == "variants.md":
        assert whole(rows) <= pictures
    for name in pictures:
        assert regret_figures.markdown(rows, name) in text, name
    for sentence in re.findall(r"On \w+, .* takes .* times the learning rate\.\n", text):
        assert sentence in regret_figures.trends(rows)
    for claim in claims(guide, rows):
        assert claim in " ".join(text.split()), claim
