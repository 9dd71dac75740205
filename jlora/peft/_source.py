"""A folder that the user gave: opens its files, and follows links only where they are harmless."""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .._errors import InputError, MissingError, Problem, show
from ._recognized import CONFIG, PICKLES, TENSORS, recognize


class Source(NamedTuple):
    """A folder to read from.

    Attributes:
        folder: the folder.
        argument: the user's argument with the folder, for errors.
        follow_links: whether its files may be links to anywhere, or only within the folder and to
            the files of models in the Hub's cache; None if the user cannot choose.
    """

    folder: Path
    argument: str = "path"
    follow_links: bool | None = None

    def error(
        self, why: str, path: object = None, problems: Iterable[Problem] = (), remedy: str = ""
    ) -> InputError:
        """Makes the error about a `path` in the folder, or about the folder."""
        path = self.folder if path is None else path
        return InputError(self.argument, why, path=path, problems=problems, remedy=remedy)


@contextlib.contextmanager
def open_file(source: Source, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file of `source`; yields the file and its size in bytes."""
    path = source.folder / name
    # Without waiting, should it be a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not source.follow_links:
        path = resolve(source, path)
        flags |= getattr(os, "O_NOFOLLOW", 0)  # should it have become a link since
    try:
        descriptor = os.open(path, flags)
    except OSError as e:
        raise _explain_unopened(source, name, e) from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise source.error(f"{path} is not a regular file.", path)
        yield file, status.st_size


def resolve(source: Source, path: Path) -> Path:
    """Follows links; raises if they lead out of the folder, to no file of the Hub's cache."""
    folder, real = (Path(os.path.realpath(x)) for x in (source.folder, path))
    if real.is_relative_to(folder) or _is_in_cache(real):
        return real
    option = "" if source.follow_links is None else ", or `follow_links=True`"
    why = f"{show(str(path))} is a link out of the folder, to {show(str(real))}, which may be any"
    advice = f"Give a copy with links followed (cp -rL){option}."
    raise source.error(f"{why} file of this machine. {advice}", path)


def _is_in_cache(path: Path) -> bool:
    """Whether a file is a model's in the Hub's cache, `models--ORG--NAME/blobs/HASH`."""
    return path.parent.name == "blobs" and path.parents[1].name.startswith("models--")


def _explain_unopened(source: Source, name: str, error: OSError) -> Exception:
    folder, argument, _ = source
    path = folder / name
    if path.is_symlink() and not path.exists():
        return MissingError(
            argument,
            f"{path} is a broken link, to {show(os.readlink(path))}. Download or "
            "copy the folder again.",
            path=path,
        )
    if not folder.is_dir():
        return explain_no_folder(argument, folder)
    pickles = [p for p in PICKLES if (folder / p).exists()]
    if name == TENSORS and pickles:
        why = "jlora reads no pickles, as reading one runs the code in it."
        return source.error(
            f"{folder} has {pickles[0]}, a pickle, but no {TENSORS}. {why} Save the adapter in "
            "PEFT with safe_serialization=True."
        )
    if isinstance(error, FileNotFoundError):
        kind = recognize(folder) if name in (CONFIG, TENSORS) else ""
        return MissingError(argument, f"{folder} has no {name}. {kind}".rstrip(), path=folder)
    return error


def explain_no_folder(argument: str, path: Path) -> Exception:
    """Makes the error about a `path` that is no folder."""
    if not path.exists():
        return MissingError(argument, f"there is no folder {path}.", path=path)
    why = f"is a file, not a folder. Give the folder that it is in, {path.parent}."
    return InputError(argument, f"{path} {why}", path=path)
