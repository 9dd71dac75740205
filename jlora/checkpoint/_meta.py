"""The metadata of a checkpoint: everything but the numbers, as JSON and back."""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _quantized as quantized
from .. import initializers
from .._adapters import RULES, LoRA, is_node, state, static
from .._quantized import Scheme
from .._rules import Rule, Slots, compile_pattern, is_finite, pattern_anywhere
from .._tree import nest
from .._types import Layout, Path, PyTree
from .._untrusted import shown
from ..initializers import Initializer
from ._fingerprint import Fingerprint, Leaf, exact

FORMAT = 2  # up to 1, patterns matched inside of the components of a path too
LIBRARIES = ("jlora", "jax", "jaxlib", "orbax-checkpoint")
FULL = "full"
SKETCHED = {"eva": "inputs", "lora_ga": "gradient"}  # initializers, and the kind of their sketch

Fields = dict[str, Any]


class Saved(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
        adapter: the adapter as saved, a nested dict of `LowRank` nodes and leaves with
            `jax.ShapeDtypeStruct` in place of each array. It can be the `like` of `restore`.
        rules: the rules as saved; of format 1, with patterns that take the same leaves by whole
            components of a path. An initializer that is not jlora's own, or starts from a sketch,
            is a `Foreign`.
        step: the training step, or None.
        versions: the versions of jlora, JAX, jaxlib and Orbax that wrote it.
        base: the fingerprint of the base, or None.
        hashes: 64 bits of the values of each array, by path and `"a"`, `"b"` or `"full"`.
    """

    adapter: PyTree
    rules: tuple[Rule, ...]
    step: int | None
    versions: dict[str, str]
    base: Fingerprint | None
    hashes: dict[Path, str]


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Stands in a restored rule for an initializer that only the training script has.

    Attributes:
        name: its module and name.
    """

    name: str

    def __call__(self, *args: Any) -> Any:
        """Raises: there is nothing to call."""
        if kind := SKETCHED.get(self.name.removeprefix("jlora.initializers.")):
            raise NotImplementedError(
                f"`init` was {self.name} when the adapter was saved, which starts from a sketch: a "
                "checkpoint holds none. Give the rule one of your own: dataclasses.replace(rule, "
                f"init={self.name}(sketch)), with the options that it had, where sketch is of "
                f"jlora.sketch(..., kind={kind!r})."
            )
        raise NotImplementedError(
            f"`init` was {shown(self.name)} when the adapter was saved, which is not a part of "
            "jlora. Give the rule your own: dataclasses.replace(rule, init=...)."
        )


def arrays(found: Mapping[Path, Any]) -> dict[Path, Any]:
    """The arrays of an adapter by path, each with the name of what it is at the end."""
    flat = {}
    for path, x in found.items():
        parts = state(x) if is_node(x) else {FULL: x}
        flat |= {(*path, name): value for name, value in parts.items()}
    return flat


def encode(
    found: Mapping[Path, Any], rules: Sequence[Rule], step: int | None, base: Fingerprint | None
) -> Fields:
    """The metadata of an adapter as JSON."""
    fields = {
        "format": FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "step": step,
        "rules": [_encode_rule(rule) for rule in rules],
        "adapter": [_encode_leaf(path, x) for path, x in found.items()],
        "base": None if base is None else [[list(p), *leaf] for p, leaf in base.items()],
    }
    return fields | {"sha256": digest(fields)}


def digest(fields: Fields) -> str:
    """The hash that metadata carry of themselves."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def decode(fields: Fields) -> Saved:
    """The metadata from JSON."""
    leaves, hashes = {}, {}
    for item in fields["adapter"]:
        path = _strings(item["path"])
        parts = {name: _leaf(*leaf) for name, leaf in item["arrays"].items()}
        hashes |= {(*path, name): leaf.hash for name, leaf in parts.items()}
        leaves[path] = _decode_leaf(item, {n: _struct(leaf) for n, leaf in parts.items()})
    base, rules = fields["base"], fields["rules"]
    if fields["format"] < 2:
        rules = _match_components(rules, ["/".join(path) for path in leaves])
    return Saved(
        adapter=nest(leaves),
        rules=tuple(map(_decode_rule, rules)),
        step=fields["step"],
        versions=dict(fields["versions"]),
        base=None if base is None else {_strings(p): _leaf(*leaf) for p, *leaf in base},
        hashes=hashes,
    )


# ------------------------------------------------------------------------------------------ leaves


def _encode_leaf(path: Path, x: Any) -> Fields:
    parts = {p[-1]: exact(array, values=True) for p, array in arrays({path: x}).items()}
    item = {"path": list(path), "arrays": parts}
    if is_node(x):
        item |= static(x) | {"node": type(x).__name__, "layout": x.layout._asdict()}
    return item


def _decode_leaf(item: Fields, parts: dict[str, jax.ShapeDtypeStruct]) -> Any:
    if "layout" not in item:
        (full,) = parts.values()
        return full
    nodes = {x.node.__name__: x.node for x in RULES.values() if x.node is not None}
    kind = _registered("node", item.get("node", "LowRank"), nodes)
    names = [name for name in kind._fields if name in item and name not in kind.labels]
    fields = {name: _tuples(item[name]) for name in names}
    hints = typing.get_type_hints(kind)
    for name, value in fields.items():
        if hints[name] is float and not is_finite(value):
            raise TypeError(f"`{name}` must be a number; got {value!r}")
        if hints[name] is bool and not isinstance(value, bool):
            raise TypeError(f"`{name}` must be true or false; got {value!r}")
    frozen = fields.get("frozen", ())
    if not isinstance(frozen, tuple) or not all(name in parts for name in frozen):
        raise TypeError(f"`frozen` must name arrays of {kind.__name__}; got {frozen!r}")
    return kind(**parts | fields | {"layout": _layout(**fields["layout"])})


def _layout(**fields: Any) -> Layout:
    found = Layout(**fields)
    axes = (*found.stack, *found.inputs, *found.outputs)
    if not all(type(d) is int and d >= 0 for d in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"{found} must have each axis once")
    return found


def _registered(kind: str, name: str, types: Mapping[str, Any]) -> Any:
    """The class of `types` by a name."""
    if name not in types:
        raise ValueError(
            f"the checkpoint has the {kind} {name!r}, which no registered method has; import the "
            "module that registers it"
        )
    return types[name]


def _leaf(shape: Any, dtype: str, hash: str | None) -> Leaf:
    if not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise TypeError(f"expected a shape, got {shape!r}")
    return Leaf(tuple(shape), str(dtype), hash)


def _struct(leaf: Leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))


def _strings(path: Any) -> Path:
    if not isinstance(path, list) or not all(isinstance(part, str) for part in path):
        raise TypeError(f"expected a path, got {path!r}")
    return tuple(path)


def _tuples(x: Any) -> Any:
    """JSON's lists as tuples, at any depth."""
    if isinstance(x, dict):
        return {name: _tuples(value) for name, value in x.items()}
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


# ------------------------------------------------------------------------------------------- rules


def _encode_rule(rule: Any) -> Fields:
    fields = {f.name: _encode_field(getattr(rule, f.name)) for f in dataclasses.fields(rule)}
    if isinstance(rule, LoRA):
        fields["scale"] = rule.scale  # for whoever reads the file; it follows from the others
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
        case Initializer() if value.name in SKETCHED:
            return {"function": f"jlora.initializers.{value.name}"}
        case Initializer() if all(map(_is_known, vars(value).values())):
            options = {name: _encode_field(x) for name, x in vars(value).items()}
            return {"function": f"jlora.initializers.{value.name}", "options": options}
        case Scheme():
            return {"scheme": type(value).__name__, "fields": dataclasses.asdict(value)}
    return {"function": value.name if isinstance(value, Foreign) else _name(value)}


LONGEST = 1000  # characters of a pattern that is tried
# A pattern that matches in time that is linear in the path: without repetition, one group at most.
PLAIN = re.compile(r"\^?[\w/]*(?:\((?:\?:)?[\w|]+\)|\[\w+\])?[\w/]*\$?")


def _match_components(rules: Sequence[Fields], adapted: Sequence[str]) -> list[Fields]:
    """Rules of format 1, with patterns that take the same leaves by whole components.

    By whole components a pattern matches a part of what it matched before, and every leaf that it
    took before is in the adapter. So a plain pattern stays if it still matches those leaves. Others
    are not tried, as a file may have one that takes for ever.
    """
    new, left = [], list(adapted)
    for rule in rules:
        if (pattern := rule.get("pattern")) is not None:
            is_short = len(pattern) <= LONGEST
            is_plain = is_short and PLAIN.fullmatch(pattern) and pattern.strip("/") == pattern
            hits = {path for path in left if re.search(pattern, path)} if is_plain else set()
            left = [path for path in left if path not in hits]
            if not is_plain or not all(map(compile_pattern(pattern).search, hits)):
                rule = rule | {"pattern": pattern_anywhere(pattern)}
        new.append(rule)
    return new


def _decode_rule(fields: Fields) -> Rule:
    kind = _registered("rule", fields["rule"], RULES)
    names = [f.name for f in dataclasses.fields(kind) if f.name in fields]
    return kind(**{name: _decode_field(fields[name]) for name in names})


def _decode_field(value: Any) -> Any:
    match value:
        case {"slots": slots}:
            return Slots(**_tuples(slots))
        case {"dtype": name}:
            return jnp.dtype(name)
        case {"scheme": name, "fields": found}:
            return _scheme(name)(**found)
        case {"function": name, "options": options}:
            made = _function(name)(**{key: _decode_field(x) for key, x in options.items()})
            if not isinstance(made, Initializer):
                raise TypeError(f"{name} takes no options")
            return made
        case {"function": name}:
            return _function(name)
        case list():
            return tuple(map(_decode_field, value))
    return value


def _is_known(option: Any) -> bool:
    """Whether the option of an initializer can be read again: a scheme must be jlora's own."""
    own = getattr(quantized, type(option).__name__, None)
    return not isinstance(option, Scheme) or own is type(option)


def _scheme(name: str) -> type[Scheme]:
    found = getattr(quantized, name, None)
    if not isinstance(found, type) or not issubclass(found, Scheme):
        raise ValueError(f"the checkpoint has the scheme {name!r}, which is none of jlora's")
    return found


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", None)
    if name is not None and getattr(initializers, name, None) is function:
        return f"jlora.initializers.{name}"
    if name is None:
        return repr(function)
    return f"{function.__module__}.{function.__qualname__}"


def _function(name: str) -> Callable[..., Any]:
    for sketched in SKETCHED:
        known = f"jlora.initializers.{sketched}"
        # Format 1 had the function in `_eva.py` that it was.
        if name in (known, f"jlora.initializers._{sketched}.{sketched}.<locals>.start"):
            return Foreign(known)
    module, _, last = name.rpartition(".")
    # Version 0.1 had the initializers in `jlora` itself.
    known = module in ("jlora", "jlora.initializers") and not last.startswith("_")
    function = getattr(initializers, last, None) if known and last.isidentifier() else None
    return function if callable(function) else Foreign(name)
