"""The parts of `examples/resume.py`; whole runs and their faults are in another file."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resume
from cases._case import fill
from test_checkpoint import assert_equal

import jlora

RULES = (jlora.LoRA("up", rank=2), jlora.Full("down"))
BATCH = resume.Batch(np.arange(20).reshape(10, 2), np.ones((10, 2)), np.arange(10))


def test_a_reader_goes_on_from_any_place():
    whole = resume.Reader(BATCH, size=4, seed=0)
    batches = []
    for _ in range(7):
        other = resume.Reader(BATCH, 4, 0, whole.epoch, whole.position)
        batches.append(whole.next())
        assert_equal(other.next(), batches[-1])
    rows = np.concatenate([batch.labels for batch in batches]).reshape(-1, 4)
    assert all(len(set(rows[i : i + 2].flat)) == 8 for i in (0, 2, 4))  # an epoch repeats nothing
    assert not np.array_equal(rows[:2], rows[2:4])


def test_the_log_is_cut_where_the_run_goes_on(tmp_path):
    log = tmp_path / "losses.txt"
    resume.rewind(log, 3)
    log.write_text("1 0x1p-1\n2 0x1p-2\n3 0x1")
    resume.rewind(log, 2)
    assert log.read_text() == "1 0x1p-1\n2 0x1p-2\n"


def test_everything_that_a_step_changes_comes_back(tmp_path):
    base = fill({"up": jnp.ones((6, 4)), "down": jnp.ones(4)}, jnp.float32)
    lora = jlora.transform(lambda p, x: x @ p["up"] * p["down"], *RULES)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), base, jnp.ones((1, 6)))[1]
    adapter = fill(shapes, jnp.float32)
    optimizer = {"adam": optax.adam(1e-3).init(adapter), "count": np.int32(3)}
    state = resume.State(adapter, optimizer, jax.random.key(5))
    reader = resume.Reader(BATCH, size=4, seed=0, epoch=2, position=4)
    zeros = jax.tree.map(jnp.zeros_like, (adapter, optimizer))
    with resume.open_manager(tmp_path, save_every=1, keep=2) as manager:
        checkpoints = resume.Checkpoints(manager, RULES, base, {"batch": 4, "seed": 0})
        first = resume.State(*zeros, jax.random.key(0))
        assert checkpoints.restore(first, reader) == (0, first)
        for step in (1, 2, 3):
            checkpoints.save(step, state, reader)
        manager.wait_until_finished()
        assert manager.all_steps() == [2, 3]
        other = resume.Reader(BATCH, size=4, seed=0)
        step, restored = checkpoints.restore(first, other)
        assert (step, other.epoch, other.position) == (3, 2, 4)
        assert_equal(restored.adapter, adapter)
        assert_equal(restored.optimizer, jax.tree.map(jnp.asarray, optimizer))
        assert_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
        changed = checkpoints._replace(settings={"batch": 8, "seed": 0})
        with pytest.raises(ValueError, match=r"cannot resume from .*: batch was 4, is 8"):
            changed.restore(first, other)
        with pytest.raises(ValueError, match=r"`base` is not the one that the adapter in .*/3 was"):
            checkpoints._replace(base={"up": base["up"]}).restore(first, other)
    assert sorted(x.name for x in tmp_path.iterdir() if x.is_dir()) == ["2", "3", "deleted"]
    assert list((tmp_path / "deleted").iterdir()) == []
