"""The two files of an adapter, in a folder or in memory."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..._types import PyTree
from .._file import COUNTS, DTYPES, TENSORS, Source, TensorInfo, read_header, read_tensors
from .._problems import Problems
from ._config import read_fields
from ._parts import MAGNITUDE, list_tensors


class Files(NamedTuple):
    """The two files of an adapter.

    Attributes:
        fields: the configuration.
        tensors: the tensors.
        read: a function that reads the values of some tensors, by key.
        argument: the user's argument with the files, for errors.
        is_own: whether this process made them, so that they can be trusted.
        keys: what a file of another dialect has, by PEFT's keys and names of files.
        metadata: the texts in the header of a file of another dialect.
    """

    fields: dict[str, Any]
    tensors: list[TensorInfo]
    read: Callable[[Iterable[TensorInfo]], dict[str, np.ndarray]]
    argument: str
    is_own: bool = False
    keys: Mapping[str, str] = {}
    metadata: Mapping[str, str] = {}

    def values(self, tree: PyTree, problems: Problems) -> dict[str, np.ndarray]:
        """Reads the tensors of a tree; raises first if there are problems.

        Adds a problem for each tensor with values that are not finite.
        """
        problems.stop()
        found = self.read({x.key: x for x in list_tensors(tree)}.values())
        for key, x in found.items():
            if n := x.size - np.count_nonzero(np.isfinite(x)):
                problems.add(key, f"{n} of {x.size} values are not finite")
            elif key.endswith(MAGNITUDE) and not x.any():
                why = f"all {x.size} values are 0, so that the module would return zeros"
                problems.add(key, why)
        return found


def open_files(source: Source, ignore: Collection[str]) -> Files:
    """Reads the configuration, without the fields in `ignore`, and the header in a folder.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged, or jlora knows a field in `ignore`.
    """
    fields = read_fields(source, ignore)
    return open_tensors(source, TENSORS)._replace(fields=fields)


def open_tensors(source: Source, name: str) -> Files:
    """Reads the header of a file in a folder."""
    header = read_header(source, name)
    read = functools.partial(read_tensors, source, header, name=name)
    return Files({}, [*header.entries.values()], read, source.argument, metadata=header.metadata)


def as_files(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], argument: str) -> Files:
    """Presents a configuration and tensors in memory as files."""
    read = lambda wanted: {x.key: tensors[x.key] for x in wanted}  # noqa: E731
    return Files(dict(fields), list_infos(tensors), read, argument, True)


def list_infos(tensors: Mapping[str, np.ndarray]) -> list[TensorInfo]:
    """Lists what a file says of tensors in memory."""
    types = {dtype: name for name, dtype in (DTYPES | COUNTS).items()}
    return [TensorInfo(key, types[x.dtype], x.shape) for key, x in tensors.items()]
