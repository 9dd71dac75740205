"""`examples/regret.py` and `regret_figures.py`: what runs when, the best rate, what is written."""

import functools
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
import tables
import trials
from models import bert, llama, parts
from regret import PLANS, Setting
from scipy import stats
from small import some
from test_grpo import CONFIG, PARAMS, Tokenizer, once

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


def test_a_run_is_not_repeated_and_one_seed_of_all_settings_comes_first(tmp_path, asked):
    regret.main(["--experiments", "rates", "first", "--out", str(tmp_path)])
    assert len(asked) == len(set(asked))
    for name in ("rates", "first"):
        own = [(setting, seed) for setting, _, seed in asked if setting.experiment == name]
        settings, seeds = PLANS[name]
        assert list(dict.fromkeys(own)) == [(x, seed) for seed in range(seeds) for x in settings]
    # A process that was stopped in a run, and in writing of it.
    path, before = tmp_path / "regret_runs.csv", list(asked)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-2][:20])
    regret.main(["--experiments", "rates", "first", "--out", str(tmp_path)])
    last = [x for x in before if x[0].experiment == "rates"][-2:]
    assert asked[len(before) :] == last
    assert path.read_text() == "".join(lines)


@pytest.mark.parametrize(("experiment", "further"), [("rates", 3), ("reinforce", 2)])
def test_rates_from_the_middle_outward_and_few_for_further_seeds(
    tmp_path, asked, experiment, further
):
    setting = next(iter(PLANS[experiment][0]))
    for seed in (0, 1):
        regret.run(tmp_path / "runs.csv", setting, -8, seed)
    rates = [[rate for _, rate, at in asked if at == seed] for seed in (0, 1)]
    assert rates[0] == [1e-4, 3e-5, 3e-4, 1e-3, 3e-3]  # one worse than the best, and no further
    assert rates[1] == [1e-3, 3e-3, 3e-4][:further]


def test_a_setting_that_another_process_runs_is_left_alone(tmp_path, asked):
    taken = list(PLANS["rates"][0])[1]
    with regret.claim(tmp_path / "regret_runs.csv", taken) as is_free:
        assert is_free
        regret.main(["--experiments", "rates", "--seeds", "1", "--out", str(tmp_path)])
    assert {x for x, _, _ in asked} == set(PLANS["rates"][0]) - {taken}


def test_half_a_line_is_none_and_makes_room_for_a_whole_one(tmp_path):
    path = tmp_path / "a.csv"
    tables.append(path, {"rate": 0.1, "name": "é"})
    with path.open("a") as file:
        file.write("0.2,hal")
    assert tables.read(path) == [{"rate": 0.1, "name": "é"}]
    tables.append(path, {"name": "b", "rate": 0.3})
    assert path.read_text() == "rate,name\n0.1,é\n0.3,b\n"
    with pytest.raises(
        ValueError, match=r"has the columns \['rate', 'name'\], and the row \['x'\]"
    ):
        tables.append(path, {"x": 1})


@pytest.mark.parametrize("name", some(["definitions", "order"], "definitions"))
def test_parts_of_the_layers_have_equally_many_parameters(name):
    if name == "order":
        model = bert.Bert(bert.Config(30522, 384, 6, 12, 1536, 512, 2, 1e-12), classes=2)
        inputs = 2 * [jax.ShapeDtypeStruct((1, 8), jnp.int32)]
    else:
        model = llama.Llama(llama.SIZES["smollm2-135m"])
        inputs = [jax.ShapeDtypeStruct((1, 8), jnp.int32)]
    found = {}
    for setting in PLANS["layers"][0]:
        if setting.task == name:
            head = [jlora.Full("classifier")] if name == "order" else []
            init = jlora.transform(model.apply, *head, regret.make_rule(setting)).init
            found[setting.layers] = init, setting
    counts = {
        layers: jlora.count(
            jax.eval_shape(init, jax.random.key(0), parts.shapes(model), *inputs)[1]
        )
        for layers, (init, _) in found.items()
    }
    assert list(counts) == ["all", "attention", "feed-forward"]
    assert max(counts.values()) < 1.025 * min(counts.values())
    assert all(x.rank * x.scale == pytest.approx(32, rel=1e-5) for _, x in found.values())


def test_random_strings_have_six_bits_a_letter():
    """The model before training knows next to none of them, and one with a loss of 0 knows all."""
    task = regret.strings(48, 16)
    assert len({tuple(row[:2]) for row in task.train.ids}) == 48
    letters = task.train.ids[:, 2:]
    assert letters.shape == (48, 16) and set(np.unique(letters)) <= set(range(64))
    counts = np.bincount(letters.ravel(), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3
    np.testing.assert_array_equal(task.train.labels.sum(1), 16)

    uniform = jnp.zeros((48, 18, 64))
    total, _, count = jax.jit(task.score)(uniform, task.train)
    row = {"task": "strings-48", "held_out": float(total / count)}
    assert regret_figures.learned(row) == pytest.approx(0, abs=0.1)
    assert regret_figures.learned(row | {"held_out": 0.0}) == 48 * 16 * 6


@pytest.mark.slow
def test_strings_are_learned(monkeypatch):
    """By full fine-tuning, more than by rank 1; the columns are those of the table."""
    strings = regret.strings
    monkeypatch.setattr(regret, "strings", lambda *args: strings(*args)._replace(steps=300))
    learned = {}
    for rank in (0, 1):
        train = regret.make_train(regret.scaled("capacity", "strings-16", rank, 16, "blocks"))
        row = train(3e-3, 0) | {"task": "strings-16"}
        learned[rank] = regret_figures.learned(row)
        assert row["held_out"] == row["validation"] and row["processor"]
    assert 100 < learned[1] < learned[0] < 16 * 16 * 6


def test_the_first_steps_are_in_the_table(monkeypatch):
    """All of them, in order, at a rate that stays; the loss before any is the model's own."""
    few = lambda: regret.strings(16, 16)._replace(steps=9)  # noqa: E731
    monkeypatch.setitem(trials.TASKS, "definitions", few)
    setting = next(iter(PLANS["first"][0]))
    train, task = regret.make_train(setting), regret.make_task(setting)
    np.testing.assert_array_equal([task.schedule(20)(i) for i in range(20)], 1)
    row = train(1e-3, 0)
    losses = [row[f"loss_{i}"] for i in range(1, 21)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    total, _, count = task.score(jax.jit(task.apply)(task.params, task.train.ids), task.train)
    assert losses[0] == pytest.approx(float(total / count), rel=1e-5)
    assert row["steps"] == 20 and "loss_21" not in row


@pytest.mark.parametrize("rank", some([8, 0], 8))
def test_a_run_on_rewards_is_in_the_table(monkeypatch, tmp_path, rank):
    """As `grpo.py` makes it; the model is loaded, and measured before training, once."""
    loads = []
    monkeypatch.setattr(grpo, "HELD_OUT", grpo.HELD_OUT[:8])
    monkeypatch.setattr(grpo, "reward", lambda _, answer: float("7" in answer))
    load = lambda _: loads.append(1) or (CONFIG, PARAMS, Tokenizer())  # noqa: E731
    monkeypatch.setattr(regret.smollm2, "load", load)
    monkeypatch.setattr(regret.data, "smollm2", lambda: None)
    monkeypatch.setattr(regret, "untrained", functools.cache(regret.untrained.__wrapped__))
    monkeypatch.setattr(regret, "REWARDED", 3)
    if rank:  # that of the run before training
        monkeypatch.setattr(grpo, "make_programs", once(grpo.make_programs))
    setting = regret.scaled("reinforce", "sums", rank, 8)
    row, _ = (regret.make_train(setting)(1e-2, seed) for seed in (2, 3))
    assert len(loads) == 1
    options = f"--groups=1 --rate=0.01 --seed=2 --steps=3 --out={tmp_path}".split()
    state = grpo.main([*options, f"--rank={rank}" if rank else "--full"])
    [result], steps = (tables.read(tmp_path / f"{x}.csv") for x in ("result", "steps"))
    assert {name: row[name] for name in RIGHT} == {name: result[name] for name in RIGHT}
    assert list(regret_figures.curve(row).values()) == [step["reward"] for step in steps]
    assert row["validation"] == pytest.approx(1 - np.mean([x["reward"] for x in steps]), abs=1e-6)
    assert row["kl"] == pytest.approx(max(step["kl"] for step in steps), abs=1e-6)
    assert row["trained"] == jlora.count(state.adapter) and row["steps"] == 3


# ---- the best rate ------------------------------------------------------------------------------


def test_vertices_of_parabolas():
    """Each at its own place, all with one curvature; none where a line or a hill is."""
    at, x = np.array([-0.3, 0.0, 0.45]), np.array([-1, 0, 1])
    losses = 0.2 * (x - at[:, None]) ** 2 + np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_allclose(regret_figures.vertices(losses), at, atol=1e-12)
    assert np.isnan(regret_figures.vertices(np.array([[1.0, 2.0, 3.0]]))).all()
    assert np.isnan(regret_figures.vertices(-losses)).all()


def test_the_mean_of_the_seeds_chooses_among_rates_that_have_all():
    rows = [(0.1, 0, 1.0), (0.1, 1, 3.0), (0.2, 0, 1.5), (0.2, 1, 1.5), (0.3, 0, 0.5)]
    rows = [dict(zip(("rate", "seed", "validation"), row, strict=True)) for row in rows]
    about, mean, error = tables.best(rows, "validation", 1)
    assert (about, mean, error) == ({"rate": 0.2, "rates": 3, "seeds": 2}, 1.5, 0)
    assert tables.best(rows, "validation", -1)[0]["rate"] == 0.1


def runs(rng, best, seeds, noise, **fields):
    """Runs at five rates, whose loss is a parabola around `best`, and whose seeds differ."""
    shift = noise * rng.standard_normal(seeds)
    return [
        fields | {"rate": trials.to_rate(n), "seed": seed, "validation": loss, "held_out": loss}
        for seed in range(seeds)
        for n in range(round(2 * best) - 2, round(2 * best) + 3)
        for loss in [(n / 2 - best - shift[seed]) ** 2 + 0.1 * seed]
    ]


def test_vertices_where_further_seeds_are_best_at_the_last_of_their_rates():
    """The three rates are those around the first seed's best."""
    rows = runs(np.random.default_rng(0), -2.7, 2, 0)
    rows = [row for row in rows if row["seed"] == 0 or 2e-4 < row["rate"] < 4e-3]
    np.testing.assert_allclose(regret_figures.find_vertices(rows), [-2.7, -2.7], atol=0.02)


def test_the_interval_has_the_best_rate_in_95_of_100_cases():
    """Of ten settings with two seeds each."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(60):
        bests = rng.uniform(-3.2, -2.8, 10)
        each = [regret_figures.find_vertices(runs(rng, best, 2, 0.05)) for best in bests]
        error = regret_figures.find_error(each) / 2**0.5
        hits += [abs(x.mean() - best) < error for x, best in zip(each, bests, strict=True)]
    assert 0.92 < np.mean(hits) < 0.98


def test_ratio_and_exponent(tmp_path):
    """LoRA's best rate is ten times full fine-tuning's, and with s = 2 falls with the rank."""
    rng, rows = np.random.default_rng(0), []
    for setting in PLANS["rates"][0]:
        best = -2.0 - np.log10(setting.rank * setting.scale / 32) if setting.rank else -3.0
        rows += runs(rng, best, 3, 0.02, **setting._asdict(), trained=1)
    table = regret_figures.summary(rows)
    for row in table:
        if row["scale"] * row["rank"] == 32:
            assert 8 < row["of_full_low"] < 10 < row["of_full_high"] < 12.5
        assert row["best_rate_low"] < row["best_rate"] < row["best_rate_high"]
        assert np.isnan(row["of_full"]) == (row["rank"] == 0)
    found = re.findall(r"r\^\((\S+) ± (\S+)\)", regret_figures.exponents(rows))
    (zero, error), (one, _) = [[float(x) for x in pair] for pair in found]
    assert abs(zero) < error < 0.1 and abs(one + 1) < 0.1


def test_in_pictures_seeds_are_on_one_level_and_the_same_for_all():
    """Of rates that the first seed alone has, too."""
    setting, other, *_ = PLANS["rates"][0]
    rows = runs(np.random.default_rng(0), -3, 3, 0, **setting._asdict())
    rows = [row for row in rows if row["seed"] == 0 or 2e-4 < row["rate"] < 4e-3]
    (line,) = regret_figures.collect("rates", rows)["s = 2"].values()
    for rate, losses in line.items():
        expected = (round(2 * np.log10(rate)) / 2 + 3) ** 2 + 0.1
        np.testing.assert_allclose(losses, expected)
    assert sorted(map(len, line.values())) == [1, 1, 3, 3, 3]
    losses = {f"loss_{i}": 1.0 for i in range(1, 21)}
    first = [
        rows[0] | losses | x._asdict() | {"experiment": "first", "seed": seed}
        for x, seed in ((setting, 0), (setting, 1), (other, 0))
    ]
    found = regret_figures.collect("first", first)["s = 2"]["r = 16"]
    assert found == {i: [1.0] for i in range(1, 21)}


def test_without_enough_runs_there_is_no_interval():
    setting = next(iter(PLANS["rates"][0]))
    rows = runs(np.random.default_rng(0), -3, 1, 0, **setting._asdict(), trained=1)
    for chosen in (rows, [row for row in rows if row["rate"] >= 1e-3]):
        (row,) = regret_figures.summary(chosen)
        assert np.isnan(row["of_full"]) and np.isnan(row["best_rate_low"]) and row["rate"] == 1e-3
        lines = regret_figures.markdown(chosen, "rates").splitlines()
        head, cells = ([x.strip() for x in lines[i].split("|")[1:-1]] for i in (0, -1))
        known = {"": "r = 16", "s": "2", "best rate": "1.0e-3", "held-out loss": "0.000"}
        if chosen is not rows:
            del known["best rate"]
        assert dict(zip(head, cells, strict=True)) == known
    assert np.isnan(row["best_rate"]) and row["rates"] == 3
    assert regret_figures.exponents(rows) == ""


# ---- what is written ----------------------------------------------------------------------------


def test_without_runs_there_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"has no regret_runs\.csv\. Run regret\.py first"):
        regret_figures.write(tmp_path)


@pytest.mark.parametrize("name", some(PLANS, "rates"))
def test_every_experiment_has_a_picture_and_a_table(tmp_path, name, asked, capsys):
    regret.main(["--experiments", name, "--seeds", "2", "--out", str(tmp_path)])
    assert re.match(rf"{name} +\d\.\d hours ", "".join(capsys.readouterr()))
    text = regret_figures.write(tmp_path)
    assert (tmp_path / f"regret_{name}.png").stat().st_size > 5000
    rows = regret_figures.read(tmp_path)
    table, before = regret_figures.markdown(rows, name), name == "reinforce"
    settings = {x.rank for x in PLANS[name][0]} if name == "capacity" else PLANS[name][0]
    assert table in text and len(table.splitlines()) == 2 + before + len(settings)
    panels = regret_figures.collect(name, rows)
    lines = {"r = 16", "r = 1", "r = 256", "r = 4", "r = 64", "full"}
    if name in ("rates", "first"):
        found = {title: set(each) for title, each in panels.items()}
        assert found == {"s = 32/r": lines, "s = 2": lines}


def test_rewards_at_the_best_rate_and_above():
    """The rate is chosen by training; a fall is that of the worst seed, from its height."""
    setting, rows = regret.scaled("reinforce", "sums", 1, 32), []
    for seed, rate, wrong, right, rewards in [
        (0, 3e-5, 0.5, 0.9, [0.5] * 32),
        (0, 1e-4, 0.3, 0.6, [0.0] * 8 + [0.75] * 24),
        (1, 1e-4, 0.3, 0.8, [0.25] * 8 + [0.5] * 24),
        (0, 3e-4, 0.9, 0.1, [0.25] * 16 + [0.0] * 16),
        (1, 3e-4, 0.9, 0.3, [0.5] * 16 + [0.125] * 16),
    ]:
        row = setting._asdict() | {"rate": rate, "seed": seed, "validation": wrong}
        rows.append(row | dict.fromkeys(RIGHT, right) | regret.numbered("reward", rewards))
    table = regret_figures.markdown(rows, "reinforce").splitlines()
    assert table[2:] == [
        "| before |  | 90% | 90% |  |  |",
        "| r = 1 | 1.0e-4 | 70% ± 10% | 70% ± 10% | 20% | 0.50 to 0.12 |",
    ]
    assert regret_figures.markdown(rows[:2], "reinforce").endswith("| 60% | 60% |  |  |\n")
    panels = regret_figures.collect("reinforce", rows)
    steps = panels["at the best rate"]["r = 1"]
    assert min(steps) == 4 and steps[4] == [0, 0.25]
    assert steps[12] == [0.375, 0.375] and steps[32] == [0.75, 0.5]
    assert list(panels) == ["at the best rate", "held-out sums"]
    assert panels["held-out sums"]["r = 1"] == {3e-5: [0.9], 1e-4: [0.6, 0.8], 3e-4: [0.1, 0.3]}


def test_the_committed_table_is_that_of_the_committed_runs(tmp_path):
    for name in filter(lambda name: (regret.OUT / name).exists(), RESULTS):
        shutil.copy(regret.OUT / name, tmp_path)
    rows = regret_figures.read(tmp_path)
    keys = [tuple(row[name] for name in (*Setting._fields, "rate", "seed")) for row in rows]
    assert len(keys) == len(set(keys))
    planned = {x for settings, _ in PLANS.values() for x in settings}
    assert {Setting(*key[:-2]) for key in keys} <= planned
    regret_figures.write(tmp_path)
    made, kept = ((folder / "regret.csv").read_text() for folder in (tmp_path, regret.OUT))
    assert made == kept


def check_guide(text: str, folder: pathlib.Path) -> None:
    """A guide that shows the picture of an experiment has its table, as the runs say."""
    rows = regret_figures.read(folder)
    for name in re.findall(r"results/regret_(\w+)\.png", text):
        assert regret_figures.markdown(rows, name) in text, name
    for sentence in re.findall(r"With s = \S+ the best rate goes .*\n", text):
        assert sentence in regret_figures.exponents(rows)


def claims(guide: str, folder: pathlib.Path) -> list[str]:
    """What a guide says of the tables in words."""
    table = regret_figures.summary(regret_figures.read(folder))
    has_scale = regret_figures.SCALES["s = 32/r"]
    table = [row for row in table if has_scale(regret_figures.setting_of(row))]
    by_name = {x: [row for row in table if row["experiment"] == x] for x in ("rates", "batches")}
    ratios = {x: [round(row["of_full"]) for row in each] for x, each in by_name.items()}
    losses = [row["score"] for row in by_name["rates"] if row["rank"] > 1]
    found = [f"{min(each)} to {max(each)} times" for each in ratios.values()]
    if guide == "variants.md":
        every = [*ratios["rates"], *ratios["batches"]]
        found[1] = f"{min(every)} to {max(every)} times"
        found.append(f"within {np.ceil(100 * (max(losses) - min(losses))) / 100} nats")
    return found


@pytest.mark.parametrize("guide", ["variants.md", "rules.md"])
def test_the_guides_have_the_tables_and_the_numbers(guide):
    text = (GUIDES / guide).read_text(encoding="utf-8")
    check_guide(text, regret.OUT)
    for claim in claims(guide, regret.OUT):
        assert claim in " ".join(text.split()), claim


def test_the_guide_shows_every_experiment():
    text = (GUIDES / "variants.md").read_text(encoding="utf-8")
    assert set(re.findall(r"examples/results/regret_(\w+)\.png", text)) == set(PLANS)


def test_a_wrong_figure_in_a_guide_is_found(tmp_path, asked):
    regret.main(["--experiments", "rates", "--seeds", "2", "--out", str(tmp_path)])
    rows = regret_figures.read(tmp_path)
    found = regret_figures.markdown(rows, "rates"), regret_figures.exponents(rows)
    text = "\n".join(["![rates](../examples/results/regret_rates.png)", *found])
    check_guide(text, tmp_path)
    for old, new in (("1.0e-3 (", "2.0e-3 ("), ("r^(0.00", "r^(0.10")):
        assert old in text
        with pytest.raises(AssertionError):
            check_guide(text.replace(old, new, 1), tmp_path)
