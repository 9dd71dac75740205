"""`examples/regret.py` and `regret_figures.py`: what runs when, the best rate, what is written."""

import pathlib
import re
import shutil

import grpo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regret
import regret_figures
import trials
from models import bert, llama, parts
from regret import PLANS, Setting
from scipy import stats
from small import some
from test_grpo import CONFIG, PARAMS, Tokenizer

import jlora

GUIDES = pathlib.Path(__file__).parents[2] / "notebooks"
RESULTS = [f"regret_{name}.csv" for name in ("runs", *regret.OWN)]
CURVES = {"first": ("loss", regret.FIRST), "reinforce": ("reward", regret.REWARDED)}
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
            name, steps = CURVES.get(setting.experiment, ("", 0))
            return scores | regret.numbered(name, steps * [loss])

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
    settings = {x.rank for x in PLANS[name][0]} if name == "capacity" else PLANS[name][0]
    assert table in text
    assert len(table.splitlines()) == 2 + (name == "reinforce") + len(settings)


@pytest.mark.parametrize("name", some(["definitions", "order"], "definitions"))
def test_parts_of_the_layers_have_equally_many_parameters(name):
    """With the same s·r."""
    model, inputs = llama.Llama(llama.SIZES["smollm2-135m"]), 1
    if name == "order":
        config = bert.Config(30522, 384, 6, 12, 1536, 512, 2, 1e-12)
        model, inputs = bert.Bert(config, classes=2), 2
    settings = [x for x in PLANS["layers"][0] if x.task == name]
    counts, ids = {}, inputs * [jax.ShapeDtypeStruct((1, 8), jnp.int32)]
    for setting in settings:
        head = [jlora.Full("classifier")] if name == "order" else []
        init = jlora.transform(model.apply, *head, regret.make_rule(setting)).init
        adapter = jax.eval_shape(init, jax.random.key(0), parts.shapes(model), *ids)[1]
        counts[setting.layers] = jlora.count(adapter)
    assert list(counts) == ["all", "attention", "feed-forward"]
    assert max(counts.values()) < 1.025 * min(counts.values())
    assert all(x.rank * x.scale == pytest.approx(32, rel=1e-5) for x in settings)


def test_random_strings_have_six_bits_a_letter():
    """The model before training knows next to none of them, and one with a loss of 0 knows all."""
    task = regret.strings(48, 16)
    assert len({tuple(row[:2]) for row in task.train.ids}) == 48
    counts = np.bincount(task.train.ids[:, 2:].ravel(), minlength=64)
    assert counts.shape == (64,) and stats.chisquare(counts).pvalue > 1e-3
    total, _, count = jax.jit(task.score)(jnp.zeros((48, 18, 64)), task.train)
    row = {"task": "strings-48", "held_out": float(total / count)}
    assert regret_figures.learned(row) == pytest.approx(0, abs=0.1)
    assert regret_figures.learned(row | {"held_out": 0.0}) == 48 * 16 * 6


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


# ---- the best rate ------------------------------------------------------------------------------


def runs(rng, best, seeds, noise, **fields):
    """Runs at five rates, whose loss is a parabola around `best`, and whose seeds differ."""
    shift = noise * rng.standard_normal(seeds)
    return [
        fields | {"rate": trials.to_rate(n), "seed": seed, "validation": loss, "held_out": loss}
        for seed in range(seeds)
        for n in range(round(2 * best) - 2, round(2 * best) + 3)
        for loss in [(n / 2 - best - shift[seed]) ** 2 + 0.1 * seed]
    ]


def test_the_interval_has_the_best_rate_in_95_of_100_cases():
    """Of ten settings with two seeds each."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(60):
        bests = rng.uniform(-3.2, -2.8, 10)
        each = [regret_figures.find_vertices(runs(rng, best, 2, 0.05)) for best in bests]
        error = regret_figures.find_error(each) / 2**0.5
        hits += [abs(x.mean() - best) < error for x, best in zip(each, bests, strict=True)]
    assert 0.92 < np.mean(hits) < 0.98


def test_ratio_and_exponent():
    """LoRA's best rate is ten times full fine-tuning's, and with s = 2 falls with the rank."""
    rng, rows = np.random.default_rng(0), []
    for setting in PLANS["rates"][0]:
        best = -2.0 - np.log10(setting.rank * setting.scale / 32) if setting.rank else -3.0
        rows += runs(rng, best, 3, 0.02, **setting._asdict(), trained=1)
    for row in regret_figures.summary(rows):
        if row["scale"] * row["rank"] == 32:
            assert 8 < row["of_full_low"] < 10 < row["of_full_high"] < 12.5
        assert row["best_rate_low"] < row["best_rate"] < row["best_rate_high"]
        assert np.isnan(row["of_full"]) == (row["rank"] == 0)
    found = re.findall(r"r\^\((\S+) ± (\S+)\)", regret_figures.exponents(rows))
    (zero, error), (one, _) = [[float(x) for x in pair] for pair in found]
    assert abs(zero) < error < 0.1 and abs(one + 1) < 0.1


# ---- what is written ----------------------------------------------------------------------------


def test_the_committed_table_is_that_of_the_committed_runs(tmp_path):
    for name in RESULTS:
        shutil.copy(regret.OUT / name, tmp_path)
    rows = regret_figures.read(tmp_path)
    keys = [tuple(row[name] for name in (*Setting._fields, "rate", "seed")) for row in rows]
    assert len(keys) == len(set(keys))
    assert {Setting(*key[:-2]) for key in keys} <= {x for plan, _ in PLANS.values() for x in plan}
    regret_figures.write(tmp_path)
    made, kept = ((folder / "regret.csv").read_text() for folder in (tmp_path, regret.OUT))
    assert made == kept


def claims(guide, rows):
    """What a guide says of the tables in words."""
    has_scale = regret_figures.SCALES["s = 32/r"]
    table = [x for x in regret_figures.summary(rows) if has_scale(regret_figures.setting_of(x))]
    by_name = {x: [row for row in table if row["experiment"] == x] for x in ("rates", "batches")}
    ratios = {x: [round(row["of_full"]) for row in each] for x, each in by_name.items()}
    losses = [row["score"] for row in by_name["rates"] if row["rank"] > 1]
    found = [f"{min(each)} to {max(each)} times" for each in ratios.values()]
    if guide == "variants.md":
        every = [*ratios["rates"], *ratios["batches"]]
        found[1] = f"{min(every)} to {max(every)} times"
        found.append(f"within {np.ceil(100 * (max(losses) - min(losses))) / 100} nats")
    return found


@pytest.mark.parametrize(("guide", "shown"), [("variants.md", set(PLANS)), ("rules.md", None)])
def test_the_guides_have_the_tables_and_the_numbers(guide, shown):
    """A guide that shows the picture of an experiment has its table, as the runs say."""
    text, rows = (GUIDES / guide).read_text(encoding="utf-8"), regret_figures.read(regret.OUT)
    pictures = set(re.findall(r"results/regret_(\w+)\.png", text))
    assert shown in (None, pictures)
    for name in pictures:
        assert regret_figures.markdown(rows, name) in text, name
    for sentence in re.findall(r"With s = \S+ the best rate goes .*\n", text):
        assert sentence in regret_figures.exponents(rows)
    for claim in claims(guide, rows):
        assert claim in " ".join(text.split()), claim
