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

Fields = dict[str, Any]
OWN = "jlora.initializers."
SKETCHED = {"eva": "inputs", "lora_ga": "gradient"}  # initializers, with the kind of their sketch
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
        why = f"{show(self.name)} when the adapter was saved, which"
        kind = SKETCHED.get(self.name.removeprefix(OWN))
        if kind is None:
            is_own = self.name.startswith("jlora.")
            what = "cannot be restored by its name" if is_own else "is not a part of jlora"
            raise NotImplementedError(
                f"`init` was {why} {what}. Give the rule your own: "
                "dataclasses.replace(rule, init=...)."
            )
        raise NotImplementedError(
            f"`init` was {why} needs a sketch, and a checkpoint has none. Make one with "
            f"jlora.sketch(..., kind={kind!r}), and give "
            f"dataclasses.replace(rule, init={self.name}(sketch)) with the same options."
        )


def encode_rule(rule: Rule) -> Fields:
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
            name = _name(type(value))
            if name != f"{OWN}{value.name}" or value.name in SKETCHED:
                return {"function": name}
            if all(map(_is_known, vars(value).values())):
                options = {key: _encode_field(x) for key, x in vars(value).items()}
                return {"function": name, "options": options}
        case Scheme():
            return {"scheme": type(value).__name__, "fields": dataclasses.asdict(value)}
    return {"function": value.name if isinstance(value, Foreign) else _name(value)}


def decode_rule(fields: Fields) -> Rule:
    kind = registered("rule", fields["rule"], RULES)
    names = [f.name for f in dataclasses.fields(kind) if f.name in fields]
    return kind(**{name: _decode_field(fields[name]) for name in names})


def _decode_field(value: object) -> Any:
    match value:
        case {"slots": slots}:
            return Slots(**slots)
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"scheme": name, "fields": found}:
            return registered("scheme", name, SCHEMES, "is none of jlora's")(**found)
        case {"function": name, "options": options}:
            made = _function(name)
            if not isinstance(made, Foreign):
                made = made(**{key: _decode_field(x) for key, x in options.items()})
            if not isinstance(made, Initializer | Foreign):
                raise TypeError(f"{name} has no options")
            return made
        case {"function": name}:
            return _function(name)
        case list():
            return tuple(map(_decode_field, value))
    return value


def _is_known(option: object) -> bool:
    """Whether the option of an initializer can be restored: a scheme must be jlora's own."""
    return not isinstance(option, Scheme) or SCHEMES.get(type(option).__name__) is type(option)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if name is None:
        return repr(function)
    if getattr(initializers, name, None) is function:
        return f"{OWN}{name}"
    return f"{function.__module__}.{function.__qualname__}"


def _function(name: str) -> Callable[..., Any]:
    last = name.removeprefix(OWN)
    is_own = name.startswith(OWN) and last.isidentifier() and not last.startswith("_")
    function = getattr(initializers, last, None) if is_own and last not in SKETCHED else None
    return function if callable(function) else Foreign(name)


NOT_REGISTERED = "is not registered; import the module that registers it"


def registered(kind: str, name: object, types: Mapping[str, Any], why: str = NOT_REGISTERED) -> Any:
    """Returns the class in `types` with a name from a file."""
    if not isinstance(name, str) or name not in types:
        raise ValueError(f"the checkpoint has the {kind} {shorten(name)}, which {why}")
    return types[name]
