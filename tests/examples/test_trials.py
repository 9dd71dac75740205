"""`examples/trials.py` and `variants.py`: every variant trains; the table of runs."""

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
from small import raw, some

import jlora


def rows(n, seed):
    """Texts whose label is whether the first token is even."""
    ids = np.random.default_rng(seed).integers(3, 50, (n, 16)).astype(np.int32)
    return Batch(ids, np.ones_like(ids), ids[:, 0] % 2)


@pytest.fixture(scope="module")
def task():
    """A small encoder, on which every variant fits."""
    model = bert.Bert(bert.Config(50, 64, 2, 2, 64, 64, 2, 1e-12), classes=2, scan=True)
    fields = {"rank": 9, "rate": -5, "steps": 3, "batch": 8}
    return trials.Task(
        model.apply,
        fill(parts.shapes(model), jnp.float32, 0.3),
        lambda r: (r.ids, r.mask),
        trials.score_classes,
        (jlora.Full("classifier"),),
        **fields,
        **{x: rows(20, i) for i, x in enumerate(("train", "validation", "held_out"))},
    )


@pytest.mark.parametrize("name", some(variants.VARIANTS))
def test_every_variant_trains(task, name):
    """And is measured by the model's own loss."""
    runner, seen = variants.make_runner(task, variants.VARIANTS[name]), {}
    found = runner(1e-3, 0, lambda step, trained, _: seen.setdefault(step, raw(trained)))
    assert all(math.isfinite(x) for x in found.values())
    assert len(seen) == len({tuple(x) for x in seen.values()}) == 4  # each step changes something
    params = runner.task.params
    base, adapter = runner.init(jax.random.key(0), params, *task.inputs(task.train))
    assert found["trained"] == jlora.count(adapter)
    loss = runner.evaluate(adapter, base, task.validation)[0]
    logits = np.asarray(jax.jit(runner.apply)(base, adapter, *task.inputs(task.validation)))
    chosen = logits[np.arange(20), task.validation.labels]
    np.testing.assert_allclose(loss, (np.log(np.exp(logits).sum(-1)) - chosen).mean(), rtol=1e-5)


def test_runs_are_done_once_and_the_committed_table_and_the_guide_are_theirs(tmp_path):
    shutil.copy(variants.OUT / "variants_runs.csv", tmp_path)
    row = tables.read(tmp_path / "variants_runs.csv")[0]
    name, n = {x: row[x] for x in ("task", "variant")}, round(2 * np.log10(row["rate"]))
    path = tmp_path / "variants_runs.csv"
    assert trials.run_once(path, None, name, n, row["seed"]) == row["validation"]
    table = variants_table.write(tmp_path)
    made, kept = ((folder / "variants.csv").read_text() for folder in (tmp_path, variants.OUT))
    assert made == kept
    assert (tmp_path / "variants.png").stat().st_size > 5000
    guide = pathlib.Path(__file__).parents[2] / "notebooks/measurements/ranks.md"
    assert variants_table.markdown(table) in guide.read_text(encoding="utf-8")
