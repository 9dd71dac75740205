"""`python examples/paper ablations`: a run from a table with a gap, and pictures of adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from cases._case import fill
from models import bert, parts
from paper import ablations
from small import some

import jlora
from jlora import checkpoint

# Whole runs for every day are those of quickstart, chat, paper and resume.
whole_run = pytest.mark.slow
SMALL = bert.Config(50, 64, 3, 4, 64, 16, 2, 1e-12)


def test_plan_has_the_pictures_first_and_each_run_once():
    runs = ablations.all_runs(["movies", "definitions"], (0, 1))
    assert len(runs) == len(set(runs)) == 2 * 2 * 15
    assert runs[:4] == ablations.pictured_runs("movies")
    assert runs[4:8] == ablations.pictured_runs("definitions")
    assert {run.seed for run in ablations.all_runs(["movies"], [1])} == {1}


@pytest.fixture(scope="module")
def small():
    """A task with a small model, to be neither trained nor measured."""
    ids = jnp.ones((1, 8), jnp.int32)
    model = bert.Bert(SMALL, scan=True)
    attention = lambda tree: tree["params"]["encoder"]["layer"]["attention"]  # noqa: E731
    variables = fill(parts.shapes(model), jnp.float32)
    return ablations.Task(model.apply, variables, (ids,), (), attention, print, print)


def start(task, run):
    """The rules of a run, its base, and an adapter whose B is not zero."""
    rules = ablations.rules(task, run)
    lora = jlora.transform(task.apply, *rules)
    base, adapter = lora.init(jax.random.key(run.seed), task.variables, *task.example)
    rng = np.random.default_rng(0)
    return rules, base, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), adapter)


@pytest.mark.parametrize("matrices", some(ablations.MATRICES, "q", "q,v", "q,k,v,o"))
def test_the_matrices_and_no_others_at_one_budget(small, matrices):
    run = ablations.Run("small", matrices, ablations.MATRICES[matrices], 0)
    adapter = small.attention(start(small, run)[2])
    assert sorted(adapter) == sorted(ablations.NAMES[letter] for letter in matrices.split(","))
    assert jlora.count(adapter) == 3 * (64 + 64) * 8


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was missing in the table, the tables before and after a call, and the picture."""
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("out")
    table, missing = results / "ablations.csv", ablations.Run("movies", "k", 8, 0)
    for run in ablations.all_runs(["movies"], [0]):
        if run != missing:
            row = {"steps": 2, "batch": 32, "parameters": 1, "score": 0.5, "standard_error": 0.1}
            tables.append(table, {**run._asdict(), **row, "seconds": 1})
    grids = {f"{part}/a/ranks": np.full((8, 64), 0.5) for part in ("query", "value")}
    for task in ablations.TASKS:
        np.savez(results / f"{task}.npz", **grids)
    before = ablations.read(table)
    argv = ["--tasks", "movies", "--seeds", "0", "--steps", "2"]
    ablations.main([*argv, "--results", str(results), "--out", str(out)])
    return missing, before, ablations.read(table), results / "ablations.png"


@whole_run
def test_only_what_is_missing_is_done(resumed):
    """And its row says what was measured."""
    missing, before, after, _ = resumed
    assert after.keys() - before.keys() == {missing}
    assert {run: row for run, row in after.items() if run != missing} == before
    row = after[missing]
    assert (int(row["steps"]), int(row["parameters"])) == (2, 6 * 2 * 384 * 8)
    value = float(row["score"])
    assert 0.4 < value < 0.9
    assert float(row["standard_error"]) == pytest.approx((value * (1 - value) / 947) ** 0.5, 1e-3)


def test_adapters_of_other_results_are_not_shown(tmp_path, monkeypatch):
    """Folders that lie there from before are trained again before they are looked at."""
    done, runs = [], ablations.pictured_runs("movies")
    for run in runs:
        run.folder(tmp_path / "out").mkdir(parents=True)
    row = {"steps": 2, "batch": 32, "score": 0.5, "standard_error": 0.1}

    def execute(task, run, *rest):
        done.append(run)
        return {**run._asdict(), **row}

    monkeypatch.setattr(ablations, "TASKS", {"movies": print, "definitions": print})
    monkeypatch.setattr(ablations, "execute", execute)
    monkeypatch.setattr(ablations, "subspaces", lambda *_: done.append("pictures") or [])
    argv = ["--tasks", "movies", "--steps", "2", "--results", str(tmp_path)]
    ablations.main([*argv, "--out", str(tmp_path / "out")])
    assert done[:4] == runs and done.index("pictures") > 3


@pytest.mark.slow
def test_subspaces(small, tmp_path):
    """Shapes as the notebook has them; the norms are those of dense matrices."""
    folders = [run.folder(tmp_path) for run in ablations.pictured_runs("small")]
    for run, folder in zip(ablations.pictured_runs("small"), folders, strict=True):
        rules, base, adapter = start(small, run)
        checkpoint.save(folder, adapter, rules, base=base)
    found = dict(ablations.subspaces(small, folders))
    for part in ("query", "value"):
        assert found[f"{part}/a/ranks"].shape == found[f"{part}/delta/ranks"].shape == (8, 64)
        assert found[f"{part}/a/seeds"].shape == found[f"{part}/delta/seeds"].shape == (64, 64)
        assert found[f"{part}/intruders"].shape == (3, 3)
        assert found[f"{part}/spectrum/8"].shape == (3, 8)
        w = small.attention(small.variables)[part]["kernel"][1]
        site = ablations.at(small.attention(checkpoint.restore(folders[0]))[part]["kernel"], 1)
        delta = site.scale * site.a @ site.b
        u, _, vt = np.linalg.svd(delta)
        size, within, own, _ = found[f"{part}/norms"][0]
        assert size == pytest.approx(np.linalg.norm(delta), 1e-4)
        assert within == pytest.approx(np.linalg.norm(u[:, :4].T @ w @ vt[:4].T), 1e-3)
        assert own == pytest.approx(np.linalg.norm(np.linalg.svd(w)[1][:4]), 1e-4)
