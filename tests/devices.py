"""Runs tests that need a mesh, in a process with eight forced CPU devices."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def run(*files: str, marked: str) -> None:
    """Asserts that the tests of `files` with that mark pass; in float64."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", marked, *files]
    done = subprocess.run(
        command,
        cwd=TESTS,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
