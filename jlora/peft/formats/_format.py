"""What a format says of itself, and the set of formats."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ._stored import Dense, Stored


class Format(NamedTuple):
    """A way to store weights in few bits.

    Attributes:
        method: `quant_method` of its configuration, `config.json`'s `quantization_config`.
        find: `(tensors, configuration) -> (module, parameter, shape)` of each quantized parameter,
            of which `read` takes the shape.
        read: `(tensors, configuration, module, parameter, shape) -> Stored` of a parameter of that
            shape, (outputs, inputs), or `Dense` where no scheme has such codes; None where it is
            stored as it is. `Unreadable` if its tensors contradict each other.
    """

    method: str
    find: Callable[[Any, dict[str, Any]], Iterator[tuple[str, str, tuple[int, ...]]]]
    read: Callable[[Any, dict[str, Any], str, str, tuple[int, ...]], Stored | Dense | None]


FORMATS: dict[str, Format] = {}  # by method


def register(format: Format) -> None:
    """Adds a format to the set."""
    FORMATS[format.method] = format
