"""The two files of an adapter, in a folder or in memory."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..._errors import Problem
from ..._types import PyTree
from .._file import COUNTS, DTYPES, TensorInfo
from .._recognized import CONFIG, TENSORS
from ._methods import ENDS
from ._parts import list_tensors


class Files(NamedTuple):
    """The two files of an adapter.

    Attributes:
        fields: the configuration.
        tensors: the tensors.
        read: a function that reads the values of some tensors, by key.
        argument: the user's argument with the files, for errors.
        is_own: whether this process made them, so that they can be trusted.
        keys: what a file of another dialect has, by PEFT's keys and names of files.
        cause: a likely cause of problems, with a remedy; empty if none is known.
    """

    fields: dict[str, Any]
    tensors: list[TensorInfo]
    read: Callable[[Iterable[TensorInfo]], dict[str, np.ndarray]]
    argument: str
    is_own: bool = False
    keys: Mapping[str, str] = {}
    cause: str = ""

    @property
    def config(self) -> str:
        """What the file with the configuration is called."""
        return self.keys.get(CONFIG, CONFIG)

    def values(self, tree: PyTree) -> tuple[dict[str, np.ndarray], list[Problem]]:
        """Reads the tensors of a tree, and lists those that are not finite."""
        wanted = {x.key: x for x in list_tensors(tree)}
        if not wanted:
            return {}, [Problem(TENSORS, "has neither A and B nor a parameter in full")]
        problems = list[Problem]()
        found = self.read(wanted.values())
        for key, x in found.items():
            if n := x.size - np.count_nonzero(np.isfinite(x)):
                problems.append(Problem(key, f"{n} of {x.size} values are not finite"))
            elif key.endswith((*ENDS,)) and not x.any():
                why = f"all {x.size} values are 0, so that the module would return zeros"
                problems.append(Problem(key, why))
        return found, problems


def as_files(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], argument: str) -> Files:
    """Presents a configuration and tensors in memory as files."""
    read = lambda wanted: {x.key: tensors[x.key] for x in wanted}  # noqa: E731
    return Files(dict(fields), list_infos(tensors), read, argument, True)


def list_infos(tensors: Mapping[str, np.ndarray]) -> list[TensorInfo]:
    """Lists what a file says of tensors in memory."""
    types = {dtype: name for name, dtype in (DTYPES | COUNTS).items()}
    return [TensorInfo(key, types[x.dtype], x.shape) for key, x in tensors.items()]
