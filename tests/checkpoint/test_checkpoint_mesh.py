"""Adapters saved on one mesh by some processes come back on another mesh, in others."""

import pathlib

import checkpoint_worker
import pytest
from processes import free_port, start


def run(folder: pathlib.Path, tasks: str, devices: int, processes: int = 1) -> None:
    """Runs the worker in `processes` processes of `devices` devices; all must end well."""
    command = checkpoint_worker.__file__, folder, tasks, devices
    place = processes, free_port()
    workers = [start(*command, i, *place) for i in range(processes)]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(outputs)


@pytest.mark.slow
def test_from_one_mesh_to_others(tmp_path):
    run(tmp_path, "save:2x2,restore:4x1,restore:1x2,restore:1x1", devices=4)


def test_from_two_processes_to_one(tmp_path):
    """The two have failed before, each in turn, and all have raised and gone on."""
    run(tmp_path, "fail:2x2,save:2x2", devices=2, processes=2)
    checkpoint_worker.restore(tmp_path, checkpoint_worker.make_mesh("1x1"))


@pytest.mark.slow
def test_where_one_of_four_processes_fails_all_raise_and_go_on(tmp_path):
    run(tmp_path, "fail:4x1", devices=1, processes=4)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 2), (4, 2), (2, 4)])
def test_from_processes_to_processes(before, after, tmp_path):
    run(tmp_path, "save:2x4", devices=8 // before, processes=before)
    run(tmp_path, "restore:4x1", devices=4 // after, processes=after)
