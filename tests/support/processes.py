"""Processes of Python that tests start."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    *args: Any, env: Mapping[str, str] = {}, stderr: int | None = subprocess.STDOUT
) -> subprocess.Popen[str]:
    """Starts Python with these arguments, and with more variables in its environment."""
    command, own = [sys.executable, *map(str, args)], os.environ | env
    return subprocess.Popen(command, env=own, text=True, stdout=subprocess.PIPE, stderr=stderr)


def run(
    *args: Any, env: Mapping[str, str] = {}, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs Python likewise, to its end; what it writes is kept, unless `options` say otherwise."""
    command, own = [sys.executable, *map(str, args)], os.environ | env
    return subprocess.run(command, env=own, text=True, **{"capture_output": True} | options)


def cached(folder: pathlib.Path) -> dict[str, str]:
    """The variables of processes on CPUs that keep all that they compile in a folder."""
    return {
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
