"""`examples/pod.py` in several processes: the same numbers however many, and what a fault costs.

The laws: losses are the same to 1e-6 and adapters bit for bit, whatever processes compute them;
where a process fails, all end within a minute, each with a cause; every checkpoint that is there
is whole; and any number of processes goes on from the last one to the same end.
"""

import pathlib
import re
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from peft_files import assert_equal

from jlora import checkpoint
from tests.examples import pods

STEPS, SAVE_EVERY, BATCH, LENGTH, ROWS = 16, 4, 8, 16, 96
FAULT = 10  # the step in which something happens; the checkpoint of step 8 is there
MINUTE = 60  # seconds in which all must have ended
# What gloo, or else JAX's coordination service, says of a process that is gone.
GONE = r"Connection (closed|reset) by peer|another task died"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """For all runs."""
    return tmp_path_factory.mktemp("pods")


@pytest.fixture(scope="module")
def data(folder) -> pathlib.Path:
    """A file of tokens."""
    rng = np.random.default_rng(0)
    np.save(folder / "ids.npy", rng.integers(0, 128, (ROWS, LENGTH + 1), np.int32))
    return folder / "ids.npy"


@pytest.fixture(scope="module")
def start(folder, data):
    """Starts runs of one job; of those with the same name each goes on where the last one was."""

    def start(name: str, processes: int, **more: object):
        arguments = {"out": folder / name, "data": data, "batch": BATCH, "length": LENGTH}
        arguments |= {"steps": STEPS, "save-every": SAVE_EVERY, "log-every": 1}
        given = [f"--{k}={v}" for k, v in (arguments | more).items()]
        return pods.run(folder / "cache", processes, *given)

    return start


@pytest.fixture(scope="module")
def whole(start) -> dict[int, float]:
    """The losses of a run of one process that nothing happened to."""
    losses = finish(start("whole", 1))
    assert list(losses) == list(range(1, STEPS + 1))
    assert len(set(losses.values())) == STEPS
    return losses


def finish(run) -> dict[int, float]:
    """The losses of a run that ends well."""
    with run as run:
        assert not any(run.ends()), run.report()
    others = range(1, len(run.workers))
    assert not any(re.search(r"(?m)^(from )?step \d", run.said(i)) for i in others), run.report()
    return run.losses()


def steps_of(out: pathlib.Path) -> list[int]:
    """The steps whose checkpoints are there."""
    return sorted(int(x.name) for x in (out / "checkpoints").iterdir() if x.name.isdigit())


def check_losses(losses: dict[int, float], whole: dict[int, float]) -> None:
    """They are those of the whole run."""
    np.testing.assert_allclose(list(losses.values()), [whole[n] for n in losses], 0, 1e-6)


def check_end(out: pathlib.Path) -> None:
    """The adapter and the merged model are, bit for bit, those of the whole run."""
    outs = out, out.parent / "whole"
    assert_equal(*(checkpoint.restore(x / "checkpoints" / str(STEPS)) for x in outs))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    args = ocp.args.StandardRestore(fallback_sharding=here)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        assert_equal(*(orbax.restore(x / "merged" / str(STEPS), args=args) for x in outs))


def check_fault(run: pods.Run, out: pathlib.Path, whole: dict[int, float]) -> None:
    """All was right before the fault, and every checkpoint is whole."""
    check_losses(run.losses(), whole)
    assert steps_of(out)[-1] >= 8
    for step in steps_of(out):
        assert checkpoint.read(out / "checkpoints" / str(step)).step == step
        checkpoint.restore(out / "checkpoints" / str(step))  # checks the hash of every array


def check_restart(start, out: pathlib.Path, processes: int, whole: dict[int, float]) -> None:
    """Some processes go on from the last checkpoint, to the same end."""
    last = steps_of(out)[-1]
    losses = finish(start(out.name, processes))
    assert list(losses) == list(range(last + 1, STEPS + 1))
    check_losses(losses, whole)
    check_end(out)


# ------------------------------------------------------------------------------------ the same run


@slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (2, 1), (4, 2)])
def test_saved_by_some_restored_by_others(before, after, folder, start, whole):
    name = f"from{before}to{after}"
    check_losses(finish(start(name, before, steps=FAULT)), whole)
    check_restart(start, folder / name, after, whole)


@slow
def test_a_merged_model_is_a_base(folder, start, whole):
    base = folder / "whole" / "merged" / str(STEPS)
    assert finish(start("onward", 2, base=base))[1] != whole[1]
    with start("onward", 1, base=base, rank=4) as run:
        assert any(run.ends())
    assert re.search(r"ValueError: cannot resume from .*: rank was 8, is 4", run.said())


# ------------------------------------------------------------------------------------------ faults


@slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_where_one_fails_or_hangs_all_end(fault, victim, folder, start, whole):
    """Each with a cause, every checkpoint whole; one process goes on from the last."""
    name = f"{fault}{victim}"
    with start(name, 2) as run:
        worker, other = run.workers[victim], run.workers[1 - victim]
        run.reach(FAULT)
        worker.send_signal(signal.Signals[fault])
        assert other.wait(MINUTE), run.report()
        worker.kill()
        run.ends()
    assert re.search(GONE, run.said(1 - victim)), run.report()
    check_fault(run, folder / name, whole)
    check_restart(start, folder / name, 1, whole)


@slow
@pytest.mark.parametrize("after", [1, 4])
def test_a_preempted_run_saves_and_stops(after, folder, start, whole):
    name = f"taken{after}"
    with start(name, 2) as run:
        run.reach(FAULT - 1)
        run.workers[1].terminate()
        assert not any(run.ends(MINUTE)), run.report()
    (last,) = re.findall(r"stopped at step (\d+)", run.said())
    assert steps_of(folder / name)[-1] == int(last)
    check_restart(start, folder / name, after, whole)
