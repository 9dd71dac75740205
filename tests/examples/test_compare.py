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

LAYERS, DIM = 1, 32


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of two methods, each run twice in a few steps."""
    out, task = tmp_path_factory.mktemp("compare"), compare.movies()
    parts = {"train": 64, "validation": 16, "held_out": 16}
    for name, n in parts.items():
        rows = getattr(task, name)
        parts[name] = take(take(rows, trials.widths(task, rows) == 24), slice(n))
    model = bert.Bert(bert.Config(30522, DIM, LAYERS, 2, 64, 64, 2, 1e-12), classes=2)
    params = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    task = task._replace(apply=model.apply, params=params, steps=2, **parts)
    runners = {name: compare.make_runner(model, task, name) for name in ("full", "lora")}
    for name, runner in runners.items():
        run = functools.partial(
            trials.run_once, out / "methods_runs.csv", compare.columns(runner), {"method": name}
        )
        for seed in (0, 1):
            run(compare.SETTINGS[name].rate, seed)
    compare_costs.measure(out, model, params, runners, {(1, 8): 3, (2, 4): 2})
    compare_table.write(out)
    return out


@pytest.mark.slow  # whole runs for every day are those of quickstart, chat and resume
def test_runs_costs_and_latencies(out):
    """The table has them all; merged weights are timed too."""
    runs = tables.read(out / "methods_runs.csv")
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
    first, second = (row["held_out"] for row in runs if row["method"] == "lora")
    assert lora["accuracy"] == pytest.approx((first + second) / 2, abs=1e-4)
    assert lora["standard_error"] == pytest.approx(abs(first - second) / 2, abs=1e-4)
    rows = tables.read(out / "methods_latency.csv")
    assert [row["method"] for row in rows] == 2 * ["full", "lora_merged", "lora"]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
    assert 10_000 < (out / "methods.png").stat().st_size < 300_000


def test_the_committed_table_is_that_of_the_committed_runs():
    made = compare_table.summary(compare.OUT)
    for row, kept in zip(made, tables.read(compare.OUT / "methods.csv"), strict=True):
        assert row.pop("method") == kept.pop("method")
        assert row.keys() == kept.keys()
        assert {k: float(x) for k, x in row.items()} == {
            k: pytest.approx(x) for k, x in kept.items()
        }
    assert compare.SETTINGS.keys() == METHODS.keys()
