"""What a format is, and the set of formats."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from .._checkpoint import Checkpoint
from .._file import brief
from ._codes import Codes, Dense
from ._tensors import Tensors, Unreadable

Parameter = tuple[str, str, tuple[int, ...]]  # a module, the name of its parameter, its shape


class Format:
    """Reads the weights that a checkpoint stores in one way; here in floats, so it finds none.

    Attributes:
        tensors: the tensors of the checkpoint.
        config: `quantization_config` of its `config.json`.
    """

    def __init__(self, tensors: Any, config: dict[str, Any]) -> None:
        """Reads nothing yet."""
        self.tensors, self.config = tensors, config

    def find(self) -> Iterator[Parameter]:
        """Yields each quantized parameter, with the shape that `read` expects."""
        yield from ()

    def read(self, module: str, parameter: str, shape: tuple[int, ...]) -> Codes | Dense | None:
        """Reads a parameter of a shape, (…, outputs, inputs).

        Returns:
            `Dense` where no scheme has such codes; None where the parameter is in floats.

        Raises:
            Unreadable: if its tensors contradict each other.
        """
        del module, parameter, shape
        return None

    def field(self, name: str, legal: Collection[Any], default: Any = None) -> Any:
        """Returns a field of the configuration, which must be one of the `legal` values."""
        value = self.config.get(name, default)
        if type(value) not in {type(x) for x in legal} or value not in legal:
            expected = " or ".join(map(str, legal))
            raise Unreadable(
                f"`{name}` of the quantization: expected {expected}, got {brief(value)}"
            )
        return value


FORMATS: dict[str, type[Format]] = {}  # by `quant_method` of the configuration
F = TypeVar("F", bound=type[Format])


def register(*methods: str) -> Callable[[F], F]:
    """Adds a format to the set, for each of the `quant_method`s."""

    def add(format: F) -> F:
        FORMATS.update(dict.fromkeys(methods, format))
        return format

    return add


def format_of(checkpoint: Checkpoint) -> Format:
    """Returns the format that the configuration of a checkpoint names."""
    tensors, config = Tensors(checkpoint), checkpoint.quantization
    method = config.get("quant_method")
    if not config:
        return Format(tensors, config)
    if not isinstance(method, str) or method not in FORMATS:
        raise ValueError(
            f"`{checkpoint.source.argument}`: its config.json has the `quant_method` "
            f"{brief(method)}; known are {', '.join(sorted(FORMATS))}. Give the checkpoint that it "
            "was made of, and quantize that by jlora."
        )
    return FORMATS[method](tensors, config)
