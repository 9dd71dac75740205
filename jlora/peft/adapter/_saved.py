"""Both files of an adapter: as a folder has them, or as they are about to be written."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from ..._folders import fresh
from .._file import CONFIG, DTYPES, TENSORS, Source, opened, read_header, read_json, reader
from ._config import LIMIT, dumps, problems
from ._read import Adapter, Stored, parse


class Saved(NamedTuple):
    """Both files of an adapter.

    Attributes:
        fields: the configuration.
        tensors: what is there, before a value is read.
        read: the values of some of the tensors, by their keys.
        argument: what the user gave them by, for errors.
        is_own: whether they are of this process, and not a file's that may say anything.
    """

    fields: dict[str, Any]
    tensors: list[Stored]
    read: Callable[[Iterable[Stored]], dict[str, np.ndarray]]
    argument: str
    is_own: bool = False


def saved_in(source: Source) -> Saved:
    """Those of a folder.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged.
    """
    fields, header = read_json(source, CONFIG, LIMIT), read_header(source)

    def read(wanted: Iterable[Stored]) -> dict[str, np.ndarray]:
        with opened(source, TENSORS) as (file, _):
            value = reader(file, header)
            return {x.key: value(x.key) for x in wanted}

    tensors = [Stored(key, x.dtype, x.shape) for key, x in header.entries.items()]
    return Saved(fields, tensors, read, source.argument)


def in_memory(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], argument: str) -> Saved:
    """Those that `write` would write."""
    types = {dtype: name for name, dtype in DTYPES.items()}
    stored = [Stored(key, types[x.dtype], x.shape) for key, x in tensors.items()]

    def read(wanted: Iterable[Stored]) -> dict[str, np.ndarray]:
        return {x.key: tensors[x.key] for x in wanted}

    return Saved(dict(fields), stored, read, argument, True)


def read_adapter(saved: Saved, raise_if: Callable[[Sequence[str]], None]) -> Adapter:
    """What each tensor is; `raise_if` is given what is wrong with the configuration."""
    raise_if(problems(saved.fields))
    return parse(saved.fields, saved.tensors, f"`{saved.argument}`")


def write(
    path: str | os.PathLike[str],
    what: str,
    fields: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
) -> None:
    """Both files in a new folder `path`, or nothing."""
    with fresh(path, what) as folder:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        # As bytes: text would get other line ends on Windows.
        (folder / CONFIG).write_bytes(dumps(fields).encode())
