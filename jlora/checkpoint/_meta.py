"""Converts the metadata of a checkpoint, everything but the arrays, to JSON and back."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._adapters import RULES, AdapterLeaf, Node, is_node, state, static, to_tuples
from .._rules import Slots
from .._site import Rule
from .._tree import nest
from .._types import Layout, Path, PyTree
from ._fingerprint import Fingerprint, Leaf, leaf_of, struct_of
from ._rules_in_files import Record, decode_rule, encode_rule, registered

FORMAT = 2  # format 1 is of jlora 0.1 and 0.2
LIBRARIES = ("jlora", "jax", "jaxlib", "orbax-checkpoint")
FULL = "full"


class Saved(NamedTuple):
    """The metadata of a checkpoint.

    Attributes:
        adapter: the saved adapter, with a `jax.ShapeDtypeStruct` for each array. It can be the
            `like` of `restore`.
        rules: the saved rules. An initializer that is not jlora's own, or that needs a sketch, is a
            `Foreign`.
        step: the training step, or None.
        versions: the versions of jlora, JAX, jaxlib and Orbax that wrote it.
        base: the fingerprint of the base, or None.
        hashes: 64 bits for the values of each array, by path and its name in the node, such as
            `"a"`, or `"full"`.
    """

    adapter: PyTree
    rules: tuple[Rule, ...]
    step: int | None
    versions: dict[str, str]
    base: Fingerprint | None
    hashes: dict[Path, str]


def flatten_leaves(found: Mapping[Path, Any]) -> dict[Path, Any]:
    """Returns the arrays of an adapter by path; the path ends with the name in the node."""
    flat = {}
    for path, x in found.items():
        parts = state(x) if is_node(x) else {FULL: x}
        flat |= {(*path, name): value for name, value in parts.items()}
    return flat


def encode(
    found: Mapping[Path, Any], rules: Sequence[Rule], step: int | None, base: Fingerprint | None
) -> Record:
    """Returns the metadata of an adapter as JSON."""
    fields = {
        "format": FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "step": step,
        "rules": [encode_rule(rule) for rule in rules],
        "adapter": [_encode_leaf(path, x) for path, x in found.items()],
        "base": None if base is None else [[list(p), *leaf] for p, leaf in base.items()],
    }
    plain = json.loads(json.dumps(fields, default=np.generic.item))  # without NumPy's numbers
    return plain | {"sha256": digest(plain)}


def digest(fields: Record) -> str:
    """Returns the hash of metadata, without their field `sha256`."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def decode(fields: Record) -> Saved:
    """Returns the metadata from JSON; any error may be raised for invalid JSON."""
    leaves, hashes = {}, {}
    for item in fields["adapter"]:
        path = _strings(item["path"])
        parts = {name: _leaf(*leaf) for name, leaf in item["arrays"].items()}
        hashes |= {(*path, name): leaf.hash for name, leaf in parts.items()}
        leaves[path] = _decode_leaf(item, {n: struct_of(leaf) for n, leaf in parts.items()})
    base = fields["base"]
    return Saved(
        adapter=nest(leaves),
        rules=tuple(map(decode_rule, fields["rules"])),
        step=fields["step"],
        versions=dict(fields["versions"]),
        base=None if base is None else {_strings(p): _leaf(*leaf) for p, *leaf in base},
        hashes=hashes,
    )


# ------------------------------------------------------------------------------------------ leaves


def _encode_leaf(path: Path, x: AdapterLeaf) -> Record:
    parts = {p[-1]: leaf_of(array, values=True) for p, array in flatten_leaves({path: x}).items()}
    item = {"path": list(path), "arrays": parts}
    if is_node(x):
        item |= static(x) | {"node": type(x).__name__, "layout": x.layout._asdict()}
    return item


def _decode_leaf(item: Record, parts: dict[str, Any]) -> Any:
    if "layout" not in item:
        (full,) = parts.values()
        return full
    kind = registered("node", item["node"], node_types())
    names = [name for name in kind._fields if name in item and name not in kind.labels]
    fields = {name: to_tuples(item[name]) for name in names}
    frozen = fields.get("frozen", ())
    if not isinstance(frozen, tuple) or not all(name in parts for name in frozen):
        raise TypeError(f"`frozen` must name arrays of {kind.__name__}; got {frozen!r}")
    return kind(**parts | fields | {"layout": _layout(**fields["layout"])})


def node_types() -> dict[str, type[Node]]:
    """Returns the classes of nodes that checkpoints know, by name: those of registered rules."""
    return {x.node.__name__: x.node for x in RULES.values() if hasattr(x, "node")}


def _layout(**fields: Any) -> Layout:
    found = Layout(**fields)
    axes = (*found.stack, *found.inputs, *found.outputs)
    if not all(type(d) is int and d >= 0 for d in axes) or len(set(axes)) < len(axes):
        raise ValueError(f"{found} must have each axis once")
    if found.slots is not None:
        count, chosen, axis = found.slots
        Slots(count, chosen)  # raises unless it is possible
        if axis not in found.outputs:
            raise ValueError(f"{found} must have its slots along an output axis")
    return found


def _leaf(shape: Sequence[int], dtype: str, hash: str | None, scheme: str | None = None) -> Leaf:
    if not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise TypeError(f"expected a shape, got {shape!r}")
    return Leaf(tuple(shape), str(dtype), hash, None if scheme is None else str(scheme))


def _strings(path: object) -> Path:
    if not isinstance(path, list) or not all(isinstance(part, str) for part in path):
        raise TypeError(f"expected a path, got {path!r}")
    return tuple(path)
