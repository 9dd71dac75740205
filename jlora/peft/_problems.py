"""Raises all problems with a user's files together."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .._errors import Problem, stop


class About(NamedTuple):
    """What an error about files says besides its problems.

    Attributes:
        argument: the user's argument with the files.
        sentence: what cannot be done.
        path: the files.
        cause: a likely cause of problems, with a remedy; empty if none is known.
        keys: what a file of another dialect has, by PEFT's keys and names of files.
    """

    argument: str
    sentence: str
    path: object = None
    cause: str = ""
    keys: Mapping[str, str] = {}

    def stop(self, problems: Iterable[Problem]) -> None:
        """Raises if there are problems; they name what the user's file has."""
        named = [x._replace(where=self.keys.get(x.where, x.where)) for x in problems]
        stop(named, self.argument, f"{self.sentence} {self.cause}".rstrip(), path=self.path)


def warn(config: str, unused: Sequence[str]) -> None:
    """Warns about names in a configuration that match nothing, which PEFT accepts.

    The warning points at the caller of the public function.
    """
    if unused:
        text = "; ".join(unused[:9])
        warnings.warn(f"{config} of the adapter: {text}.", stacklevel=3)
