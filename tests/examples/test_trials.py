"""`examples/trials.py` and `variants.py`: batches, rates, a table of runs; every variant trains."""

import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
import trials
import variants
import variants_table
from cases._case import fill
from models import bert, parts
from quickstart import Batch
from small import some

import jlora


def rows(n, seed):
    """Texts whose label is whether the first token is even."""
    ids = np.random.default_rng(seed).integers(3, 50, (n, 16)).astype(np.int32)
    ones = np.ones_like(ids)
    return Batch(ids, ones, ids[:, 0] % 2)


@pytest.fixture(scope="module")
def task():
    """A small encoder, on which every variant fits."""
    model = bert.Bert(bert.Config(50, 64, 2, 2, 64, 64, 2, 1e-12), classes=2, scan=True)
    params = fill(parts.shapes(model), jnp.float32, 0.3)
    return trials.Task(
        model.apply,
        params,
        lambda r: (r.ids, r.mask),
        trials.score_classes,
        (jlora.Full("classifier"),),
        rank=9,
        rate=-5,
        steps=3,
        batch=8,
        train=rows(64, 0),
        validation=rows(20, 1),
        held_out=rows(20, 2),
    )


@pytest.mark.parametrize("name", some(variants.VARIANTS, "lora_all"))
def test_every_variant_trains(task, name):
    runner = variants.make_runner(task, variants.VARIANTS[name])
    found = runner(1e-3, 0)
    assert 0 <= found["held_out_right"] <= 1
    assert all(math.isfinite(x) for x in found.values())
    params = runner.task.params
    base, adapter = runner.init(jax.random.key(0), params, *task.inputs(task.train))
    assert found["trained"] == jlora.count(adapter)
    # The losses are the model's own before anything is learnt.
    loss = runner.evaluate(adapter, base, task.validation)[0]
    logits = np.asarray(jax.jit(runner.apply)(base, adapter, *task.inputs(task.validation)))
    chosen = logits[np.arange(20), task.validation.labels]
    each = chosen - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(loss, -each.mean(), rtol=1e-5)


def test_tokens_are_scored_by_the_one_before():
    """The logits at a place are for the next token, and count where that is marked."""
    ids = np.array([[1, 2, 0]], np.int32)
    logits = np.log(np.array([[[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [1.0, 1.0, 1.0]]]))
    marked = Batch(ids, ids, np.array([[0, 1, 1]], np.float32))
    nll, right, count = jax.jit(trials.score_tokens)(logits, marked)
    np.testing.assert_allclose(nll, -np.log(0.5) - np.log(0.6), rtol=1e-6)
    assert (int(right), int(count)) == (2, 2)


@pytest.mark.parametrize(
    ("best", "found", "tried"), [(-5, -5, 3), (-4, -4, 4), (-3, -3, 5), (-6, -6, 4), (-9, -8, 5)]
)
def test_the_rate_is_searched_until_it_is_not_the_outermost(best, found, tried):
    """At most five of them; one that diverges is the worst."""
    asked = []

    def loss(rate, seed):
        assert seed == 0
        asked.append(rate)
        return abs(rate - best) if rate < -2 else float("nan")

    assert trials.best_rate(loss, -5) == found
    assert len(asked) == len(set(asked)) == tried
    assert trials.best_rate(lambda rate, seed: 0.0, 0) == -3  # of equals the smallest


def test_to_rate():
    assert [trials.to_rate(n) for n in (-7, -6, -5, -4)] == [3e-4, 1e-3, 3e-3, 1e-2]


def test_draw_gives_batches_of_one_width_and_every_row_at_most_once_an_epoch():
    width = np.repeat([24, 32, 48], [20, 13, 7])
    batches = trials.draw(width, steps=9, size=4, seed=0)
    assert [len(rows) for rows in batches] == [4] * 9
    assert all(len(set(width[rows])) == 1 for rows in batches)
    assert len(set(np.concatenate(batches))) == 36  # 5, 3 and 1 batches: an epoch
    again = trials.draw(width, steps=12, size=4, seed=0)
    np.testing.assert_array_equal(batches, again[:9])
    assert not np.array_equal(batches, trials.draw(width, steps=9, size=4, seed=1))


def test_runs_are_done_once_and_become_a_table(tmp_path):
    path, calls = tmp_path / "variants_runs.csv", []

    def runner(rate, seed):
        calls.append((rate, seed))
        right = 0.8 + 0.01 * seed + rate
        return {
            "trained": 10, "loss": 1.0, "validation": rate, "validation_right": right,
            "held_out": 0.5, "held_out_right": right, "seconds": 1.0,
        }  # fmt: skip

    each = [(name, *x) for name in ("dora", "lora_all") for x in ((-4, 0), (-2, 0), (-4, 1))]
    for name, half_decades, seed in 2 * each:
        columns = {"task": "movies", "variant": name}
        loss = trials.run_once(path, runner, columns, half_decades, seed)
        assert loss == 10 ** (half_decades / 2)
    assert len(calls) == len(each)
    variants_table.write(tmp_path)
    first, second = tables.read(tmp_path / "variants.csv")
    assert (first["variant"], second["variant"]) == ("lora_all", "dora")  # in the order of VARIANTS
    assert (first["rate"], first["rates"], first["seeds"]) == (0.01, 2, 2)
    assert first["score"] == pytest.approx(81.5)
    assert first["standard_error"] == pytest.approx(0.5)
    assert (tmp_path / "variants.png").stat().st_size > 5000


def test_without_runs_there_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"has no variants_runs\.csv\. Run variants\.py first"):
        variants_table.write(tmp_path)


def test_the_committed_table_is_that_of_the_committed_runs(tmp_path):
    shutil.copy(variants.OUT / "variants_runs.csv", tmp_path)
    variants_table.write(tmp_path)
    made, kept = ((folder / "variants.csv").read_text() for folder in (tmp_path, variants.OUT))
    assert made == kept


def test_the_guide_has_the_table():
    guide = pathlib.Path(__file__).parents[2] / "notebooks" / "variants.md"
    table = tables.read(variants.OUT / "variants.csv")
    assert variants_table.markdown(table) in guide.read_text(encoding="utf-8")
