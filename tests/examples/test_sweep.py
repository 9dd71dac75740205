"""`examples/sweep.py`: each run is the one that it is alone, and what is written can be read."""

import csv
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep
from trials import Task

import jlora
from jlora import checkpoint


class Rows(NamedTuple):
    """Points, and what is to be learned of them."""

    x: np.ndarray
    labels: np.ndarray


def model(params: Any, x: jax.Array) -> jax.Array:
    """Two layers."""
    return jnp.tanh(x @ params["up"]) @ params["down"]


def score(logits: jax.Array, rows: Rows) -> Any:
    """The squared error, as if it were a likelihood."""
    return ((logits - rows.labels) ** 2).sum(), 0, rows.labels.size


def tiny(steps: int = 24, batch: int = 8) -> Task:
    """As small as can be."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 6)).astype(np.float32)
    params = {"up": jnp.asarray(rng.standard_normal((6, 8)), jnp.float32), "down": jnp.ones((8, 1))}
    parts = (Rows(x[rows], np.sin(x[rows, :1])) for rows in (slice(32, None), slice(32), slice(0)))
    inputs = lambda rows: (rows.x,)  # noqa: E731
    head = (jlora.Full("down"),)
    return Task(model, params, inputs, score, head, 1, 0, steps, batch, *parts)


GRID = sweep.Grid(tiny, "up", 8, 24, (1e-3, 1e-1), (1, 3), (0,))
RUNS = [sweep.Run(*x) for x in itertools.product(*GRID[4:])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Result and output of a sweep, one that was there before replaced."""
    out = tmp_path_factory.mktemp("sweep")
    (out / "best").mkdir()
    (out / "best" / "of_an_earlier_sweep").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep.MODELS, "minilm", GRID)
        return sweep.main(["--out", str(out)]), out


@pytest.mark.slow
def test_each_run_is_the_one_that_it_is_alone(run):
    result, _ = run
    single = sweep.sweep(GRID, tiny(), [RUNS[result.best]])
    curve = result.curves[:, result.best]
    np.testing.assert_allclose(curve, single.curves[:, 0], rtol=1e-5, atol=1e-6)
    for x, y in zip(jax.tree.leaves(result.adapter), jax.tree.leaves(single.adapter), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert result.scores[result.best] == pytest.approx(single.scores[0], rel=1e-5)


def test_the_worse_half_stops(run):
    result, _ = run
    assert sorted(result.stopped) == [6, 6, 12, 24]
    for steps, curve in zip(result.stopped, result.curves.T, strict=True):
        assert np.isfinite(curve[:steps]).all() and np.isnan(curve[steps:]).all()
    assert result.scores[result.best] == min(result.scores[result.stopped == 24])


def test_what_is_written(run):
    result, out = run
    names = sorted(path.name for path in out.iterdir())
    assert names == ["best", "curves.csv", "runs.csv"]
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in rows] == [run[0] for run in RUNS]
    assert [row["best"] for row in rows].index("True") == result.best
    curves = np.genfromtxt(out / "curves.csv", delimiter=",", names=True)
    assert len(curves) == GRID.steps and len(curves.dtype.names) == 4
    task, rank = tiny(), RUNS[result.best].rank
    lora = jlora.transform(model, *GRID.rules(task, rank))
    base, like = lora.init(jax.random.key(0), task.params, task.train.x)
    adapter = checkpoint.restore(out / "best", like=like, base=base)
    total, _, count = score(lora.apply(base, adapter, task.validation.x), task.validation)
    assert total / count == pytest.approx(result.scores[result.best], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_diverges_is_left_behind():
    """Among others, which are as they are without it."""
    runs = [sweep.Run(*x) for x in ((1e-2, 3, 0), (1e30, 3, 1), (3e-2, 1, 0))]
    result = sweep.sweep(GRID, tiny(8), runs)
    assert result.scores[1] == np.inf and np.isfinite(result.scores[[0, 2]]).all()
    assert result.stopped[1] == 2
    single = sweep.sweep(GRID, tiny(8), runs[:1])
    steps = result.stopped[0]
    np.testing.assert_allclose(result.curves[:steps, 0], single.curves[:steps, 0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep.MODELS)
def test_real_models(name, tmp_path):
    result = sweep.main(
        f"--model {name} --steps 4 --batch 2 --ranks 1 2 --seeds 0 --out {tmp_path}".split()
    )
    assert np.isfinite(result.scores).all()
    assert (tmp_path / "best").is_dir()
