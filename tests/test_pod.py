"""`examples/pod.py` in several processes: the same numbers however many, and what a fault costs."""

import pathlib
import signal
import time

import disks
import jax
import numpy as np
import orbax.checkpoint as ocp
import pod
import pods
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoint import assert_equal

from jlora import checkpoint

STEPS, SAVE_EVERY, BATCH, LENGTH, ROWS = 16, 4, 8, 16, 96
LAST = BATCH * (STEPS + 1)  # sequences that a run visits


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

    def start(name: str, processes: int, *more: str):
        arguments = {
            "--out": folder / name,
            "--data": data,
            "--batch": BATCH,
            "--length": LENGTH,
            "--steps": STEPS,
            "--save-every": SAVE_EVERY,
            "--log-every": 1,
        }
        given = [f"{k}={v}" for k, v in arguments.items()]
        return pods.run(folder / "cache", processes, *given, *more)

    return start


@pytest.fixture(scope="module")
def whole(folder, start) -> dict[int, float]:
    """The losses of a run of one process that nothing happened to."""
    with start("whole", 1) as run:
        assert run.ends() == [0], run.report()
        losses = run.losses()
    assert list(losses) == list(range(1, STEPS + 1))
    assert len(set(losses.values())) == STEPS
    return losses


def check_end(folder: pathlib.Path, name: str) -> None:
    """The run's adapter and merged model are, bit for bit, those of the whole run."""
    ends = [folder / x / "checkpoints" / str(STEPS) for x in (name, "whole")]
    assert_equal(*map(checkpoint.restore, ends))
    here = ocp.args.StandardRestore(
        fallback_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        assert_equal(
            *(orbax.restore(folder / x / "merged" / str(STEPS), args=here) for x in (name, "whole"))
        )


def check_fault(folder: pathlib.Path, name: str, losses: dict[int, float], whole) -> int:
    """Before the fault all was right, and every checkpoint is whole; gives the last one's step."""
    np.testing.assert_allclose(list(losses.values()), [whole[n] for n in losses], atol=1e-6)
    steps = [int(x.name) for x in (folder / name / "checkpoints").iterdir() if x.name.isdigit()]
    for step in steps:
        place = folder / name / "checkpoints" / str(step)
        assert checkpoint.read(place).step == step
        checkpoint.restore(place)  # checks the hash of every array
    return max(steps)


def check_restart(folder: pathlib.Path, start, name: str, processes: int, whole) -> None:
    """Other processes go on from the last checkpoint, to the same end."""
    steps = [int(x.name) for x in (folder / name / "checkpoints").iterdir() if x.name.isdigit()]
    with start(name, processes) as run:
        assert run.ends() == [0] * processes, run.report()
        losses = run.losses()
    assert f"from step {max(steps)} of {STEPS}" in run.said()
    assert list(losses) == list(range(max(steps) + 1, STEPS + 1))
    np.testing.assert_allclose(list(losses.values()), [whole[n] for n in losses], atol=1e-6)
    check_end(folder, name)


# ------------------------------------------------------------------------------------ the same run


@pytest.mark.parametrize("processes", [pytest.param(2), pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_no_number(processes, folder, start, whole):
    with start(f"by{processes}", processes) as run:
        assert run.ends() == [0] * processes, run.report()
    assert run.losses().keys() == whole.keys()
    np.testing.assert_allclose(list(run.losses().values()), list(whole.values()), atol=1e-6)
    assert all("step" not in run.said(i) for i in range(1, processes))
    check_end(folder, f"by{processes}")


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_saved_by_some_restored_by_others(before, after, folder, start, whole):
    name = f"from{before}to{after}"
    with start(name, before, "--steps=10") as run:
        assert run.ends() == [0] * before, run.report()
    check_restart(folder, start, name, after, whole)


# ---------------------------------------------------------------------------------------- failures


def bad_token(data: pathlib.Path, process: int, processes: int) -> tuple[int, int]:
    """Spoils a sequence that this process reads after some steps; gives its row, and the token."""
    share = BATCH // processes
    visit = 10 * BATCH + process * share  # of step 10, so that the checkpoint of 8 is there
    row = pod.order(0, visit // ROWS, ROWS)[visit % ROWS]
    ids = np.load(data, mmap_mode="r+")
    token = int(ids[row, 3])
    ids[row, 3] = 128
    ids.flush()
    return int(row), token


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1)])
def test_where_one_raises_all_end_and_say_why(culprit, folder, data, start, whole):
    row, token = bad_token(data, culprit, 2)
    try:
        with start(f"raised{culprit}", 2) as run:
            run.reach(1)
            run.wait_for_one()
            began = time.monotonic()
            codes = run.ends(pods.MINUTE)
            print("raised", culprit, codes, time.monotonic() - began)
    finally:
        ids = np.load(data, mmap_mode="r+")
        ids[row, 3] = token
        ids.flush()
    assert all(codes), run.report()
    assert f"expected 17 tokens from 0 to 127 in row {row}" in run.said(culprit)
    print(run.said(1 - culprit))
    check_fault(folder, f"raised{culprit}", run.losses(), whole)
    check_restart(folder, start, f"raised{culprit}", 1, whole)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1)])
@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_where_one_is_gone_all_end(how, victim, folder, start, whole):
    name = f"{how.name}{victim}"
    with start(name, 2) as run:
        run.reach(10)
        run.workers[victim].send_signal(how)
        began = time.monotonic()
        code = run.workers[1 - victim].wait(pods.MINUTE)
        print(how, victim, code, time.monotonic() - began)
    print(run.said(1 - victim)[-3000:])
    assert code, run.report()
    check_fault(folder, name, run.losses(), whole)
    check_restart(folder, start, name, 1, whole)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1)])
def test_where_one_cannot_write_all_end(victim, folder, start, whole):
    name = f"full{victim}"
    with start(name, 2) as run:
        run.reach(10)
        disks.Disk(folder, "limit").fill(run.workers[victim].pid)
        run.wait_for_one()
        began = time.monotonic()
        codes = run.ends(pods.MINUTE)
        print("full", victim, codes, time.monotonic() - began)
    assert all(codes), run.report()
    print(run.said(1 - victim)[-3000:])
    assert "File too large" in run.said(victim)
    check_fault(folder, name, run.losses(), whole)
    check_restart(folder, start, name, 1, whole)
