"""Runs tests that need a mesh, each file in a process of its own with eight forced CPU devices."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def run(file: str, part: str = "", marked: str = "not slow") -> None:
    """Asserts that the tests of `file` whose name has `part` pass; in float64."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-k", part, "-m", marked, file]
    done = subprocess.run(
        command,
        cwd=TESTS,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
