"""`python examples/paper compare` and what it calls: a short run from sweep to picture."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tables
import trials
from flax import linen as nn
from models import bert
from paper import compare, compare_costs, compare_table
from paper.methods import METHODS
from quickstart import take

# Whole runs for every day are those of quickstart, chat, paper and resume.
whole_run = pytest.mark.slow
LAYERS, DIM, VOCAB = 1, 32, 30522


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of two methods, each run twice in a few steps."""
    out, task = tmp_path_factory.mktemp("compare"), compare.movies()
    parts = (task.train, 64), (task.validation, 16), (task.held_out, 16)
    short = [take(take(x, trials.widths(task, x) == 24), slice(n)) for x, n in parts]
    model = bert.Bert(bert.Config(VOCAB, DIM, LAYERS, 2, 64, 64, 2, 1e-12), classes=2)
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    names = dict(zip(("train", "validation", "held_out"), short, strict=True))
    task = task._replace(apply=model.apply, params=params, steps=2, **names)
    runners = {name: compare.make_runner(model, task, name) for name in ("full", "lora")}
    for name, runner in runners.items():
        run = functools.partial(
            trials.run_once, out / "methods_runs.csv", compare.columns(runner), {"method": name}
        )
        for seed in (0, 1):
            run(compare.SETTINGS[name].rate, seed)
    compare_costs.measure(out, model, params, runners, {(1, 8): 3, (2, 4): 2})
    compare_table.write(out)
    before = (out / "methods_costs.csv").read_text()
    compare_costs.measure(out, model, params, runners, {(1, 8): 1})  # is there
    assert before == (out / "methods_costs.csv").read_text()
    return out


@whole_run
def test_runs_costs_and_latencies(out):
    """The table has them all; merged weights are timed too."""
    runs = tables.read(out / "methods_runs.csv")
    assert [(row["method"], row["rate"], row["seed"], row["steps"]) for row in runs] == [
        *(("full", 1e-4, seed, 2) for seed in (0, 1)),
        *(("lora", 3e-3, seed, 2) for seed in (0, 1)),
    ]
    assert all(0 <= row["held_out"] <= 1 and row["loss"] < 1 for row in runs)
    full, lora = tables.read(out / "methods.csv")
    assert (full["method"], lora["method"], lora["seeds"]) == ("full", "lora", 2)
    assert lora["trained"] == 4 * LAYERS * DIM * 8
    assert lora["trained_with_head"] == lora["trained"] + DIM * 2 + 2
    assert lora["gradient_bytes"] == 4 * lora["trained_with_head"]
    assert lora["optimizer_bytes"] == pytest.approx(8 * lora["trained_with_head"], abs=64)
    assert 0 <= lora["file_bytes"] - 4 * lora["trained_with_head"] < 4000  # the names
    assert full["memory_bytes"] > full["optimizer_bytes"] + 2 * full["gradient_bytes"]
    assert lora["memory_bytes"] < full["memory_bytes"]
    assert full["latency_1x8"] == full["latency_2x4"] == full["step_ratio"] == 1
    first, second = (row["held_out"] for row in runs[2:])
    assert lora["accuracy"] == pytest.approx((first + second) / 2, abs=1e-4)
    assert lora["standard_error"] == pytest.approx(abs(first - second) / 2, abs=1e-4)
    rows = tables.read(out / "methods_latency.csv")
    assert [row["method"] for row in rows[:3]] == ["full", "lora_merged", "lora"]
    shapes = [(row["batch"], row["tokens"], row["rounds"]) for row in rows[::3]]
    assert shapes == [(1, 8, 3), (2, 4, 2)]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
    assert 10_000 < (out / "methods.png").stat().st_size < 300_000


# ---- parts --------------------------------------------------------------------------------------


def test_the_committed_table_is_that_of_the_committed_runs():
    made = compare_table.summary(compare.OUT)
    for row, kept in zip(made, tables.read(compare.OUT / "methods.csv"), strict=True):
        assert {k: float(v) for k, v in row.items() if k != "method"} == {
            k: pytest.approx(v) for k, v in kept.items() if k != "method"
        }


def test_settings_are_of_every_method():
    assert compare.SETTINGS.keys() == METHODS.keys()
    assert compare_table.LABELS.keys() == METHODS.keys() | {"lora_merged"}


def test_rounds_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or sum(range(1000)) for name in "abc"}
    seconds = compare_costs.rounds(calls, 4)
    assert all(set(order[i : i + 3]) == set("abc") for i in range(0, 12, 3))
    assert all(times.shape == (4,) and (times > 0).all() for times in seconds.values())
