"""Every `*_on_devices.py`, in one process with eight forced devices, as a start takes seconds."""

import os
import pathlib

import processes
import pytest
from small import some

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("marked", some(["not slow", "slow"], "not slow"))
def test_on_eight_devices(marked: str) -> None:
    """The tests with that mark, in float64."""
    files = sorted(str(x) for x in ROOT.joinpath("tests").rglob("*_on_devices.py"))
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    args = ["-m", "pytest", "-n", "0", "-m", marked, *files]
    done = processes.run(*args, env=env, cwd=ROOT, timeout=1800)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
