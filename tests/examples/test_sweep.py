"""`examples/sweep.py`: each run is the one that it is alone, and what is written can be read."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep
import tables
from trials import Task

import jlora
from jlora import checkpoint

Rows = collections.namedtuple("Rows", "x labels")  # points, and what is to be learned of them


def model(params, x):
    """Two layers."""
    return jnp.tanh(x @ params["up"]) @ params["down"]


def score(logits, rows):
    """The squared error, as if it were a likelihood."""
    return ((logits - rows.labels) ** 2).sum(), 0, rows.labels.size


def tiny(steps=24, batch=8):
    """As small as can be."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 6)).astype(np.float32)
    params = {"up": jnp.asarray(rng.standard_normal((6, 8)), jnp.float32), "down": jnp.ones((8, 1))}
    parts = (Rows(x[rows], np.sin(x[rows, :1])) for rows in (slice(32, None), slice(32), slice(0)))
    head = (jlora.Full("down"),)
    return Task(model, params, lambda rows: rows[:1], score, head, 1, 0, steps, batch, *parts)


GRID = sweep.Grid(tiny, "up", 8, 24, (1e-3, 1e-1), (1, 3), (0,))
RUNS = [sweep.Run(*x) for x in itertools.product(*GRID[4:])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Result and output of a sweep."""
    out = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep.MODELS, "minilm", GRID)
        return sweep.main(["--out", str(out)]), out


@pytest.mark.slow
def test_the_worse_half_stops_and_the_best_is_written(run):
    result, out = run
    assert sorted(result.stopped) == [6, 6, 12, 24]
    for steps, curve in zip(result.stopped, result.curves.T, strict=True):
        assert np.isfinite(curve[:steps]).all() and np.isnan(curve[steps:]).all()
    assert result.scores[result.best] == min(result.scores[result.stopped == 24])
    rows = tables.read(out / "runs.csv")
    assert [row["best"] for row in rows].index("True") == result.best
    curves = np.genfromtxt(out / "curves.csv", delimiter=",", names=True)
    assert len(curves) == GRID.steps and len(curves.dtype.names) == len(rows) == 4
    task = tiny()
    lora = jlora.transform(model, *GRID.rules(task, RUNS[result.best].rank))
    base, like = lora.init(jax.random.key(0), task.params, task.train.x)
    adapter = checkpoint.restore(out / "best", like=like, base=base)
    total, _, count = score(lora.apply(base, adapter, task.validation.x), task.validation)
    assert total / count == pytest.approx(result.scores[result.best], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep.MODELS)
def test_real_models(name, tmp_path):
    small = f"--model {name} --steps 4 --batch 2 --ranks 1 2 --seeds 0 --out {tmp_path}"
    assert np.isfinite(sweep.main(small.split()).scores).all()
    assert (tmp_path / "best").is_dir()
