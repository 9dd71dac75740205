"""OUT appears whole or not at all, at whatever moment the user interrupts."""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

PATIENCE = 10.0  # seconds for threads that still write when everything else has stopped
T = TypeVar("T")


def staged(out: Path, write: Callable[[Path], T]) -> T:
    """What `write` returns, which writes a folder beside `out` that is then renamed to it.

    Raises:
        FileExistsError: if `out` is there and not an empty folder, or a mount point.
    """
    final = Path(os.path.abspath(out))
    if final.is_mount():
        raise FileExistsError(f"OUT: {final} is a mount point; give a folder in it.")
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise _occupied(final)
    stage = final.with_name(f".{final.name}.{secrets.token_hex(8)}")
    try:
        stage.mkdir(parents=True)
        found = write(stage / final.name)
        _commit(stage / final.name, final)
        return found
    finally:
        _remove(stage)


def _commit(written: Path, final: Path) -> None:
    try:
        os.rename(written, final)
    except OSError as e:
        if final.exists():
            raise _occupied(final) from e
        raise


def _occupied(final: Path) -> FileExistsError:
    return FileExistsError(
        f"OUT: {final} exists and is not an empty folder; nothing is ever overwritten. "
        "Give another path, or remove it first."
    )


def _remove(stage: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while stage.exists() and time.monotonic() < deadline:
        shutil.rmtree(stage, ignore_errors=True)
        time.sleep(0.02 * stage.exists())
