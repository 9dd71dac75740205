"""`examples/compare.py` and what it calls: a short run from sweep to picture, and its parts."""

import pathlib
import shutil
from typing import Any, NamedTuple

import compare
import compare_costs
import compare_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from methods import METHODS
from models import bert
from quickstart import Batch, take

# Whole runs for every day are those of quickstart, finetune_lm, paper and resume.
whole_run = pytest.mark.slow
TINY = {(1, 8): 3, (2, 4): 2}


LAYERS, DIM, VOCAB = 1, 32, 30522


class Run(NamedTuple):
    """A run of two methods in a few steps.

    Attributes:
        out: the folder.
        once: the methods that were trained, each time, the first time.
        trained: and when all had been asked for again.
        parts: the model, its variables, and the runners.
    """

    out: pathlib.Path
    once: list[str]
    trained: list[str]
    parts: tuple[Any, ...]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run."""
    out, trained = tmp_path_factory.mktemp("compare"), []
    _, _, sentences = compare.load(held_out=100)
    short = [take(part, compare.widths(part) == 24) for part in sentences]
    few = slice(64), slice(16), slice(16)
    sentences = compare.Data(*map(take, short, few))
    model = bert.Bert(bert.Config(VOCAB, DIM, LAYERS, 2, 64, 64, 2, 1e-12), classes=2)
    variables = nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    runners = {name: compare.Runner(model, variables, sentences, name) for name in ("full", "lora")}

    def runner(name):
        def run(*args):
            trained.append(name)
            return runners[name](*args)

        return run

    def sweep():
        runs = compare.Runs(out / "methods_runs.csv", 2, runner)
        for name in runners:
            runs.get(name, compare.SETTINGS[name].rate, 0)
            runs.get(name, compare.SETTINGS[name].rate, 1)

    sweep()
    once = list(trained)
    sweep()
    compare_costs.measure(out, model, variables, runners, TINY)
    compare_table.write(out)
    return Run(out, once, trained, (model, variables, runners))


@whole_run
def test_a_run_is_done_once(run):
    assert run.once == run.trained == ["full", "full", "lora", "lora"]


@whole_run
def test_runs_have_what_they_measured(run):
    rows = compare_table.read(run.out / "methods_runs.csv")
    assert [(row["method"], row["seed"], row["steps"]) for row in rows] == [
        ("full", 0, 2),
        ("full", 1, 2),
        ("lora", 0, 2),
        ("lora", 1, 2),
    ]
    assert all(0 <= row["held_out"] <= 1 and row["loss"] < 1 for row in rows)
    assert [row["rate"] for row in rows] == [1e-4, 1e-4, 3e-3, 3e-3]


@whole_run
def test_table_has_the_parameters_bytes_and_latencies(run):
    full, lora = compare_table.read(run.out / "methods.csv")
    assert (full["method"], lora["method"]) == ("full", "lora")
    assert lora["trained"] == 4 * LAYERS * DIM * 8
    assert lora["trained_with_head"] == lora["trained"] + DIM * 2 + 2
    assert lora["gradient_bytes"] == 4 * lora["trained_with_head"]
    assert lora["optimizer_bytes"] == pytest.approx(8 * lora["trained_with_head"], abs=64)
    assert 0 <= lora["file_bytes"] - 4 * lora["trained_with_head"] < 4000  # the names
    assert full["memory_bytes"] > full["optimizer_bytes"] + 2 * full["gradient_bytes"]
    assert lora["memory_bytes"] < full["memory_bytes"]
    assert full["latency_1x8"] == full["latency_2x4"] == full["step_ratio"] == 1
    assert lora["seeds"] == 2
    runs = compare_table.read(run.out / "methods_runs.csv")[2:]
    assert lora["accuracy"] == pytest.approx(np.mean([r["held_out"] for r in runs]), abs=1e-4)
    gap = abs(runs[0]["held_out"] - runs[1]["held_out"])
    assert lora["standard_error"] == pytest.approx(gap / 2, abs=1e-4)


@whole_run
def test_costs_are_measured_once_and_anew_for_other_sizes(run, tmp_path):
    path = tmp_path / "methods_costs.csv"
    for name in (path.name, "methods_latency.csv"):
        shutil.copy(run.out / name, tmp_path)
    before = path.read_text(), (tmp_path / "methods_latency.csv").read_text()
    compare_costs.measure(tmp_path, *run.parts, {(1, 8): 1})
    assert before == (path.read_text(), (tmp_path / "methods_latency.csv").read_text())
    path.write_text(before[0].replace(f"lora,{4 * LAYERS * DIM * 8 + DIM * 2 + 2},", "lora,1,"))
    assert path.read_text() != before[0]
    compare_costs.measure(tmp_path, *run.parts, {(1, 8): 1})
    full, lora = (row["trained"] for row in compare_table.read(path))
    assert 1 < lora < full
    assert {r["rounds"] for r in compare_table.read(tmp_path / "methods_latency.csv")} == {1}


@whole_run
def test_latency_has_merged_weights_too(run):
    rows = compare_table.read(run.out / "methods_latency.csv")
    assert [row["method"] for row in rows[:3]] == ["full", "lora_merged", "lora"]
    assert [(row["batch"], row["tokens"], row["rounds"]) for row in rows[::3]] == [
        (1, 8, 3),
        (2, 4, 2),
    ]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)


@whole_run
def test_picture_is_small(run):
    assert 10_000 < (run.out / "methods.png").stat().st_size < 300_000


@whole_run
def test_table_of_what_is_there(run, tmp_path):
    """Methods whose costs are not measured yet are left out; of none there is no table."""
    for name in ("methods_runs.csv", "methods_latency.csv"):
        shutil.copy(run.out / name, tmp_path)
    with pytest.raises(ValueError, match=r"must have methods_runs\.csv, and methods_costs\.csv of"):
        compare_table.write(tmp_path)
    rows = compare_table.read(run.out / "methods_costs.csv")
    compare_table.write_rows(tmp_path / "methods_costs.csv", rows[1:])
    compare_table.write(tmp_path)
    assert [row["method"] for row in compare_table.read(tmp_path / "methods.csv")] == ["lora"]


@whole_run
def test_refuses_runs_of_other_steps(run):
    message = r"steps and BATCH must be those of the runs in .*, \{\(2, 32\)\}; got \(3, 32\)\."
    with pytest.raises(ValueError, match=message):
        compare.Runs(run.out / "methods_runs.csv", 3, None)


# ---- parts --------------------------------------------------------------------------------------


class Peak:
    """Runs whose validation accuracy falls off on both sides of a best rate."""

    def __init__(self, best):
        """`best` is in half decades."""
        self.best, self.seen = best, []

    def get(self, name, half_decades, seed):
        """As `compare.Runs.get`."""
        assert seed == 0
        self.seen.append(half_decades)
        return 0.9 - 0.01 * abs(half_decades - self.best)


@pytest.mark.parametrize(
    ("best", "found", "tried"),
    [(-5, -5, 3), (-4, -4, 4), (-3, -3, 5), (-6, -6, 4), (-9, -8, 5)],
)
def test_best_rate_goes_on_while_it_is_outermost(best, found, tried):
    runs = Peak(best)
    assert compare.best_rate(runs, "lora") == found
    assert len(runs.seen) == len(set(runs.seen)) == tried


def test_best_of_equals_is_the_smallest():
    rows = [{"validation": v, "rate": r, "seed": s} for v, r, s in [(0.8, 1, 0), (0.8, 2, 0)]]
    assert compare_table.best([*rows, {"validation": 0.9, "rate": 3, "seed": 1}]) == 1


def test_to_rate():
    assert [compare.to_rate(n) for n in (-7, -6, -5, -4)] == [3e-4, 1e-3, 3e-3, 1e-2]


def test_settings_are_of_every_method():
    assert compare.SETTINGS.keys() == METHODS.keys()
    assert compare_table.LABELS.keys() == METHODS.keys() | {"lora_merged"}


def test_draw_gives_batches_of_one_width_and_every_sentence_at_most_once_an_epoch():
    width = np.repeat([24, 32, 48], [20, 13, 7])
    batches = compare.draw(width, steps=9, size=4, seed=0)
    assert [len(rows) for rows in batches] == [4] * 9
    assert all(len(set(width[rows])) == 1 for rows in batches)
    assert len(set(np.concatenate(batches))) == 36  # 5, 3 and 1 batches: an epoch
    again = compare.draw(width, steps=12, size=4, seed=0)
    np.testing.assert_array_equal(batches, again[:9])
    assert not np.array_equal(batches, compare.draw(width, steps=9, size=4, seed=1))


def test_accuracy_counts_every_sentence_at_its_width():
    lengths = np.array([5, 24, 25, 33, 48, 10, 30])
    mask = (np.arange(48) < lengths[:, None]).astype(np.int32)
    batch = Batch(np.repeat(lengths[:, None], 48, 1), mask, (lengths > 24).astype(np.int32))
    seen = []

    def logits_fn(ids, mask):
        seen.append(ids.shape[1])
        assert (mask.sum(1) == ids[:, 0]).all()
        return np.stack([0 * ids[:, 0], ids[:, 0] - 28], 1)  # wrong for 25

    assert compare.accuracy(logits_fn, batch) == pytest.approx(6 / 7)
    assert seen == [24, 32, 48]


def test_rounds_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) or sum(range(1000)) for name in "abc"}
    seconds = compare_costs.rounds(calls, 4)
    assert all(set(order[i : i + 3]) == set("abc") for i in range(0, 12, 3))
    assert all(times.shape == (4,) and (times > 0).all() for times in seconds.values())


def test_stepping_takes_the_next_step_in_the_same_memory():
    step = jax.jit(lambda x, n, by: (x + by, n + 1, x), donate_argnums=(0, 1))
    call = compare_costs.stepping(step, jnp.zeros(3), jnp.zeros(()), jnp.ones(3))
    assert [float(call()[0]) for _ in range(3)] == [0, 1, 2]
