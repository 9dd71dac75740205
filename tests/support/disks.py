"""Disks that are full or cannot be written, for tests, whoever runs them.

The file size limit of a process stands for the full disk; a mount where mounting is allowed, or
permissions, for the one that cannot be written.
"""

import contextlib
import os
import pathlib
import resource
import subprocess
from collections.abc import Iterator


def fill(pid: int = 0, size: int = 1) -> None:
    """From now on the process can write next to nothing, or files of that size."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def full() -> Iterator[None]:
    """This process can write next to nothing meanwhile."""
    fill()
    try:
        yield
    finally:
        fill(size=resource.RLIM_INFINITY)


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[None]:
    """Nobody, not even root, can write to `folder` meanwhile."""
    mount = ["mount", "--bind", str(folder), str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    else:
        assert os.geteuid(), "root without the right to mount ignores permissions"
        folder.chmod(0o555)
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        else:
            folder.chmod(0o755)
