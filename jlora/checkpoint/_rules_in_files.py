"""Converts rules to JSON and back, with the functions that they name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import _quantized, initializers
from .._adapters import RULES, LoRA
from .._errors import shorten, show
from .._quantized import Scheme
from .._rules import Slots
from .._site import Rule
from ..initializers import Initializer
from ..initializers._initializer import SketchInitializer

Record = dict[str, Any]
OWN = "jlora.initializers."
SCHEMES = {
    name: x for name, x in vars(_quantized).items() if isinstance(x, type) and issubclass(x, Scheme)
}


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A placeholder, in a restored rule, for an initializer that only the training script has.

    Attributes:
        name: the module and name of the initializer.
    """

    name: str

    def __call__(self, *args: Any) -> Any:
        """Raises: there is nothing to call."""
        raise NotImplementedError(
            f"`init` was {show(self.name)} when the adapter was saved, which a checkpoint cannot "
            "hold: it is not a part of jlora, or it has a sketch. Make it again, and give "
            "dataclasses.replace(rule, init=...)."
        )


def encode_rule(rule: Rule) -> Record:
    fields = {f.name: _encode_field(getattr(rule, f.name)) for f in dataclasses.fields(rule)}
    if isinstance(rule, LoRA):
        fields["scale"] = rule.scale  # for readers of the file; it follows from the other fields
    return {"rule": type(rule).__name__, **fields}


def _encode_field(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Slots():
            return {"slots": dataclasses.asdict(value)}
        case tuple():
            return [_encode_field(x) for x in value]
        case np.dtype() | type():
            return {"dtype": jnp.dtype(value).name}
        case Initializer():
            fields: Record = {"function": _name(type(value))}
            if _is_known(value):
                fields["options"] = {name: _encode_field(x) for name, x in vars(value).items()}
            return fields
        case Scheme():
            return {"scheme": type(value).__name__, "fields": dataclasses.asdict(value)}
    return {"function": value.name if isinstance(value, Foreign) else _name(value)}


def decode_rule(fields: Record) -> Rule:
    kind = registered("rule", fields["rule"], RULES)
    names = [f.name for f in dataclasses.fields(kind) if f.name in fields]
    return kind(**{name: _decode_field(fields[name]) for name in names})


def _decode_field(value: Any) -> Any:
    match value:
        case {"slots": slots}:
            return Slots(**slots)
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"scheme": name, "fields": found}:
            return registered("scheme", name, SCHEMES, "is none of jlora's")(**found)
        case {"function": name}:
            found = _own(name)
            if "options" not in value or found is None:  # a class without options lacks its sketch
                return Foreign(name) if found is None or isinstance(found, type) else found
            return found(**{key: _decode_field(x) for key, x in value["options"].items()})
        case list():
            return tuple(map(_decode_field, value))
    return value


def _is_known(init: Initializer) -> bool:
    """Whether an initializer can be restored: it and its schemes are jlora's own; no sketch."""
    if _own(_name(type(init))) is None or isinstance(init, SketchInitializer):
        return False
    schemes = [type(x) for x in vars(init).values() if isinstance(x, Scheme)]
    return all(SCHEMES.get(x.__name__) is x for x in schemes)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if name is None:
        return repr(function)
    if getattr(initializers, name, None) is function:
        return f"{OWN}{name}"
    return f"{function.__module__}.{function.__qualname__}"


def _own(name: str) -> Any:
    """Returns jlora's initializer of a name, or None."""
    last = name.removeprefix(OWN)
    is_own = name.startswith(OWN) and not last.startswith("_")
    return getattr(initializers, last, None) if is_own else None


NOT_REGISTERED = "is not registered; import the module that registers it"


def registered(kind: str, name: object, types: Mapping[str, Any], why: str = NOT_REGISTERED) -> Any:
    """Returns the class in `types` with a name from a file."""
    if not isinstance(name, str) or name not in types:
        raise ValueError(f"the checkpoint has the {kind} {shorten(name)}, which {why}")
    return types[name]
