"""Disks that are full or cannot be written, for tests, whoever runs them.

A tmpfs where mounting is allowed. Elsewhere the file size limit of the process stands for the full
disk, and permissions, or a file system of the kernel's, for the one that cannot be written.
"""

import contextlib
import functools
import os
import pathlib
import resource
import subprocess
import tempfile
from collections.abc import Iterator


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    if os.geteuid():
        return False
    with tempfile.TemporaryDirectory() as folder:
        if not _mount("-t", "tmpfs", "tmpfs", folder):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


KINDS = ["limit", *(["tmpfs"] if can_mount() else [])]


class Disk:
    """A folder whose disk can be filled and given room again, for one process."""

    def __init__(self, folder: pathlib.Path, kind: str):
        """Of a kind in `KINDS`."""
        self.folder, self.kind = folder, kind

    def fill(self, pid: int = 0) -> None:
        """From now on the process can write next to nothing."""
        if self.kind == "tmpfs":
            ballast = (self.folder / "ballast").open("wb", buffering=0)
            with ballast, contextlib.suppress(OSError):
                while ballast.write(bytes(2**12)):
                    pass
        else:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    def make_room(self, pid: int = 0) -> None:
        """Takes back what `fill` did."""
        if self.kind == "tmpfs":
            (self.folder / "ballast").unlink(missing_ok=True)
        else:
            everything = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, everything)


@contextlib.contextmanager
def disk(folder: pathlib.Path, kind: str) -> Iterator[Disk]:
    """A disk of 16 MB at `folder`, or the one that `folder` is on."""
    folder.mkdir()
    if kind == "tmpfs":
        assert _mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder))
    try:
        yield Disk(folder, kind)
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[None]:
    """Nobody, not even root, can write to `folder` meanwhile."""
    if can_mount():
        assert _mount("--bind", str(folder), str(folder))
        assert _mount("-o", "remount,bind,ro", str(folder))
    else:
        assert os.geteuid(), "root without the right to mount ignores permissions"
        folder.chmod(0o555)
    try:
        yield
    finally:
        if can_mount():
            subprocess.run(["umount", "-l", str(folder)], check=True)
        else:
            folder.chmod(0o755)
