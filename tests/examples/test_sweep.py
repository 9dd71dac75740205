"""`examples/sweep.py`: each run is the one that it is alone, and what is written can be read."""

import csv
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sweep

import jlora
from jlora import checkpoint


class Rows(NamedTuple):
    """Points, and what is to be learned of them."""

    x: np.ndarray
    labels: np.ndarray


def model(params: Any, x: jax.Array) -> jax.Array:
    """Two layers."""
    return jnp.tanh(x @ params["up"]) @ params["down"]


def nll(logits_fn: Any, rows: Rows) -> Any:
    """The squared error, as if it were one."""
    return ((logits_fn(rows.x) - rows.labels) ** 2).sum(), rows.labels.size


def tiny() -> sweep.Work:
    """As small as can be."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((96, 6)).astype(np.float32)
    params = {"up": jnp.asarray(rng.standard_normal((6, 8)), jnp.float32), "down": jnp.ones((8, 1))}
    rows = Rows(x, np.sin(x[:, :1]))
    return sweep.Work(
        model,
        params,
        lambda rank: (jlora.LoRA("up", rank=rank, alpha=2.0 * rank), jlora.Full("down")),
        nll,
        lambda rows: (rows.x,),
        sweep.take(rows, slice(32, None)),
        sweep.take(rows, slice(32)),
        batch=8,
        steps=24,
        learning_rates=(1e-3, 1e-1),
        ranks=(1, 3),
        seeds=(0, 1),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Result and output of a sweep, one that was there before replaced."""
    out = tmp_path_factory.mktemp("sweep")
    (out / "best").mkdir()
    (out / "best" / "of_an_earlier_sweep").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep.MODELS, "minilm", tiny)
        return sweep.main(["--out", str(out)]), out


def test_each_run_is_the_one_that_it_is_alone(run):
    result, _ = run
    work = tiny()
    assert sorted(result.stopped) == [6, 6, 6, 6, 12, 12, 24, 24]
    single = sweep.sweep(work, [sweep.Run(*grid(work)[result.best])])
    curve = result.curves[:, result.best]
    np.testing.assert_allclose(curve, single.curves[:, 0], rtol=1e-5, atol=1e-6)
    for steps, curve in zip(result.stopped, result.curves.T, strict=True):
        assert np.isfinite(curve[:steps]).all() and np.isnan(curve[steps:]).all()
    for x, y in zip(jax.tree.leaves(result.adapter), jax.tree.leaves(single.adapter), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert result.scores[result.best] == pytest.approx(single.scores[0], rel=1e-5)
    assert result.scores[result.best] == min(result.scores[result.stopped == 24])


def grid(work: sweep.Work) -> list[Any]:
    """The runs in the order in which `main` makes them."""
    return [(a, b, c) for a in work.learning_rates for b in work.ranks for c in work.seeds]


def test_what_is_written(run):
    result, out = run
    work = tiny()
    names = sorted(path.name for path in out.iterdir())
    assert names == ["best", "curves.csv", "curves.png", "runs.csv"]
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in rows] == [run[0] for run in grid(work)]
    assert [row["best"] for row in rows].index("True") == result.best
    curves = np.genfromtxt(out / "curves.csv", delimiter=",", names=True)
    assert len(curves) == work.steps and len(curves.dtype.names) == 8
    rank = grid(work)[result.best][1]
    lora = jlora.transform(model, *work.rules(rank))
    base, like = lora.init(jax.random.key(0), work.params, work.train.x)
    adapter = checkpoint.restore(out / "best", like=like, base=base)
    total, count = nll(lambda x: lora.apply(base, adapter, x), work.held_out)
    assert total / count == pytest.approx(result.scores[result.best], rel=1e-5)


def test_a_run_that_diverges_is_left_behind():
    """Among others, which are as they are without it."""
    work = tiny()._replace(steps=8)
    runs = [sweep.Run(*x) for x in ((1e-2, 3, 0), (1e30, 3, 1), (3e-2, 1, 0))]
    result = sweep.sweep(work, runs)
    assert result.scores[1] == np.inf and np.isfinite(result.scores[[0, 2]]).all()
    assert result.stopped[1] == 2
    single = sweep.sweep(work, runs[:1])
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
