"""Adapters saved on one mesh by some processes come back on another mesh, in others."""

import pathlib
import socket
import subprocess
import sys

import pytest

WORKER = str(pathlib.Path(__file__).parent / "checkpoint_worker.py")


def run(folder: pathlib.Path, task: str, mesh: str, processes: int = 1) -> None:
    """Runs the worker in `processes` processes; all must end well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    commands = [
        [sys.executable, WORKER, str(folder), task, mesh, str(i), str(processes), str(port)]
        for i in range(processes)
    ]
    workers = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(outputs)


def test_from_one_mesh_to_others(tmp_path):
    run(tmp_path, "save", "2x2")
    for mesh in ("4x1", "1x1"):
        run(tmp_path, "restore", mesh)


def test_from_two_processes_to_one(tmp_path):
    run(tmp_path, "save", "2x2", processes=2)
    run(tmp_path, "restore", "1x2")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 2), (4, 2), (2, 4)])
def test_from_processes_to_processes(before, after, tmp_path):
    run(tmp_path, "save", "2x4", processes=before)
    run(tmp_path, "restore", "4x1", processes=after)
