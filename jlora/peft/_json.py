"""Bounded reading of files, and of JSON, that nobody vouches for; how errors quote them."""

import contextlib
import json
import os
import reprlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


class Source(NamedTuple):
    """A folder to read from.

    Attributes:
        folder: the folder.
        argument: the user's argument that named it, for errors.
        links: whether its files may be symbolic links: `none`, `within` the folder or the download
            cache that it is of, or `all`.
    """

    folder: Path
    argument: str = "dir"
    links: Literal["none", "within", "all"] = "none"


@contextlib.contextmanager
def opened(source: Source, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file of `source` with its size in bytes."""
    path = source.folder / name
    if source.links == "within":
        check_within(source, path)
    # Without waiting, should it be a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(
            path, flags | (getattr(os, "O_NOFOLLOW", 0) if source.links == "none" else 0)
        )
    except OSError as e:
        raise _unopened(source, name, e) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"`{source.argument}`: {path} is no regular file.")
        yield file, status.st_size


def check_within(source: Source, path: Path) -> None:
    """Raises for a link that leads out of the folder; of a download cache, out of that."""
    folder, real = (Path(os.path.realpath(x)) for x in (source.folder, path))
    cache = [folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else []
    if not any(real.is_relative_to(root) for root in (folder, *cache)):
        raise ValueError(
            f"`{source.argument}`: {path} is a link to {real}, out of the folder; what it holds "
            "would come to be in the output. Give a copy with links followed (cp -rL), or "
            "follow_links=True."
        )


def _unopened(source: Source, name: str, error: OSError) -> Exception:
    folder, argument, links = source
    path = folder / name
    if path.is_symlink() and links == "none":
        return ValueError(
            f"`{argument}`: {path} is a symbolic link, which could lead anywhere. Copy the adapter "
            "with its links followed (cp -L) and load the copy."
        )
    if not folder.is_dir():
        return FileNotFoundError(f"`{argument}`: there is no folder {folder}.")
    pickles = [p for p in PICKLES if (folder / p).exists()]
    if name == TENSORS and pickles:
        return ValueError(
            f"`{argument}`: {folder} holds {pickles[0]}, a pickle, and no {TENSORS}. Reading a "
            "pickle runs the code in it, so it is refused; save the adapter from PEFT with "
            "safe_serialization=True."
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"`{argument}`: {folder} has no {name}.")
    return error


def read_json(source: Source, name: str, limit: int) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes."""
    with opened(source, name) as (file, size):
        if size > limit:
            raise ValueError(
                f"`{source.argument}`: {name} has {size} bytes; expected at most {limit}."
            )
        return parse(file.read(limit + 1), f"`{source.argument}`: {name}")


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


def listing(found: Sequence[str]) -> str:
    """How many problems there are, and the first hundred of them."""
    shown = [f"  {p}" for p in found[:100]]
    shown += [f"  … and {len(found) - 100} more"] * (len(found) > 100)
    return f"{len(found)} problems:\n" + "\n".join(shown)


def shown(key: str) -> str:
    """A key of a file as it is, unless it is long or would garble the message."""
    return key if key.isprintable() and len(key) <= 300 else brief(key)


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
