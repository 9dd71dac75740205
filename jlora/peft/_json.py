"""Bounded reading of the two files of an adapter, and of JSON that nobody vouches for."""

import contextlib
import json
import os
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@contextlib.contextmanager
def opened(folder: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file of `folder`, no link, with its size in bytes."""
    path = folder / name
    # Without waiting, should it be a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as e:
        raise _unopened(folder, name, e) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"`dir`: {path} is no regular file.")
        yield file, status.st_size


def _unopened(folder: Path, name: str, error: OSError) -> Exception:
    path = folder / name
    if path.is_symlink():
        return ValueError(
            f"`dir`: {path} is a symbolic link, which could lead anywhere. Copy the adapter with "
            "its links followed (cp -L) and load the copy."
        )
    if not folder.is_dir():
        return FileNotFoundError(f"`dir`: there is no folder {folder}.")
    pickles = [p for p in PICKLES if (folder / p).exists()]
    if name == TENSORS and pickles:
        return ValueError(
            f"`dir`: {folder} holds {pickles[0]}, a pickle, and no {TENSORS}. Reading a pickle "
            "runs the code in it, so it is refused; save the adapter from PEFT with "
            "safe_serialization=True."
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"`dir`: {folder} has no {name}.")
    return error


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys and without numbers that are not finite.

    Raises:
        ValueError: for anything else.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
    except ValueError as e:
        raise ValueError(f"{what} is no valid JSON: {e}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object; got {type(value).__name__}.")
    return value


def brief(value: Any) -> str:
    """What a file says, in few characters and without line breaks, however it is nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {brief(key)} is there twice")
        found[key] = value
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
