"""The decorator that registers the classes of a method, and what it demands of them."""

import collections
import contextlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import jax
import numpy as np
from jax import export

from .._node import Node, is_node_type
from .._registry import check_free
from .._rules import is_finite, is_int, rule_name
from .._site import Frozen, Full, Rule
from .._types import Layout

C = TypeVar("C", bound=type)
RULES: dict[str, type[Rule]] = {"Full": Full, "Frozen": Frozen}  # by the name in checkpoints


def register(cls: C, *, override: bool = False) -> C:
    """Registers a method's class; decorate its `Node` and its `Rule` with it.

    A node becomes a named tuple and a pytree. Checkpoints refer to a rule by its name.

    Args:
        cls: a subclass of `Node`; or a frozen dataclass, subclass of `Rule`, that sets `node`.
        override: whether a rule may take the name of another one. jlora then refuses the other, and
            reads checkpoints of either as this one.

    Returns:
        The same class.

    Raises:
        TypeError: if `cls` is neither, or is incomplete; if fields of a node without a default come
            after others; if another rule has its name.

    Examples:
        The module's docstring registers a whole method.
    """
    found: Any = cls
    if is_node_type(found):
        _make_node(found)
    elif _sets_node(found):
        _check_rule(found)
        name = found.__name__
        check_free(f"the rule {name!r}", RULES.get(name), found, override)
        RULES[name] = found
    else:
        raise TypeError(f"`cls` must be a Node, or a Rule that sets `node`; got {cls!r}.")
    return cls


def _sets_node(x: object) -> TypeGuard[type[Rule]]:
    """Whether `x` is a class of rules that sets `node`."""
    is_rule = isinstance(x, type) and issubclass(x, Rule)
    return is_rule and is_node_type(getattr(x, "node", None))


def _check_rule(cls: type[Rule]) -> None:
    params = vars(cls).get("__dataclass_params__")
    if params is None or not params.frozen:
        raise TypeError(
            f"{cls.__name__} must be a frozen dataclass: put @dataclasses.dataclass(frozen=True) "
            "below @register."
        )
    _check_complete(cls, Rule, ("start",))
    if "pattern" not in vars(cls)["__dataclass_fields__"]:
        raise TypeError(f"{cls.__name__} must have a field `pattern`.")


def _check_complete(cls: type, of: type, names: Iterable[str]) -> None:
    """Raises for methods that a subclass of `of` must define, but does not."""
    if lost := [name for name in names if getattr(cls, name) is getattr(of, name)]:
        raise TypeError(f"{cls.__name__} must define {' and '.join(f'`{x}`' for x in lost)}.")


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    # First what is quick, as each `jax.tree.map` makes the nodes anew.
    float: ("a finite number", lambda x: (type(x) is float and x - x == 0) or is_finite(x)),
    int: ("an integer", lambda x: type(x) is int or is_int(x)),
    bool: ("True or False", lambda x: isinstance(x, bool)),
}
_ANY = (
    "a Python value",
    lambda x: isinstance(x, tuple | str) or not isinstance(x, jax.Array | np.ndarray),
)


def _make_node(cls: type[Node]) -> None:
    """Makes the class a named tuple of its annotations, and a pytree."""
    # Unregistered classes between it and `Node` may declare fields too.
    parents = [x for x in reversed(cls.__mro__) if is_node_type(x) and x is not Node]
    hints = {k: hint for x in parents for k, hint in inspect.get_annotations(x).items()}
    hints = {name: hint for name, hint in hints.items() if "ClassVar" not in str(hint)}
    names = list(hints)
    given = {k: v for x in parents for k, v in vars(x).items() if k in hints}
    optional = [name for name in names if name in given]
    if optional != names[len(names) - len(optional) :]:
        raise TypeError(
            f"fields of {cls.__name__} with a default must come after those without; got "
            f"{', '.join(names)}, with defaults for {', '.join(optional)}."
        )
    _check_node(cls, names)
    # `flax.serialization` saves any tuple with `_fields`, so Flax is not imported here. It cannot
    # save a dataclass that is not registered with it.
    made = collections.namedtuple(cls.__name__, names, defaults=[given[name] for name in optional])
    own = {"__new__", "_make", "_replace", "__replace__", "__repr__", "__module__", "__slots__"}
    for name in vars(made).keys() - own - {"__doc__"}:
        setattr(cls, name, vars(made)[name])
    cls._made = made
    cls.__signature__ = inspect.signature(made)
    static = [name for name in names if name not in cls.labels]
    cls._expected = tuple((names.index(x), *_KINDS.get(hints[x], _ANY)) for x in static)
    jax.tree_util.register_dataclass(cls, list(cls.labels), static)
    _make_exportable(cls, static)


def _make_exportable(cls: type[Node], static: Sequence[str]) -> None:
    """Lets `jax.export` write functions of nodes; files have the names of package and class."""
    at = static.index("layout")

    def write(values: tuple[Any, ...]) -> bytes:
        return json.dumps(values, default=np.generic.item).encode()

    def read(data: bytes | bytearray) -> tuple[Any, ...]:
        values = to_tuples(json.loads(data))
        return (*values[:at], Layout(*values[at]), *values[at + 1 :])

    def make(aux_data: Any, children: Iterable[Any]) -> Node:
        return cls(**dict(zip((*static, *cls.labels), (*aux_data, *children), strict=True)))

    with contextlib.suppress(ValueError):  # a class of that name was there before, as in a notebook
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"{cls.__module__.partition('.')[0]}.{cls.__name__}",
            serialize_auxdata=write,
            deserialize_auxdata=read,
            from_children=make,
        )


def to_tuples(x: object) -> Any:
    """Converts the lists of JSON to tuples, at any depth."""
    if isinstance(x, dict):
        return {name: to_tuples(value) for name, value in x.items()}
    return tuple(map(to_tuples, x)) if isinstance(x, list) else x


def _check_node(cls: type[Node], names: Sequence[str]) -> None:
    """Raises unless `labels`, `axes` and `lower` are there, and agree with the fields `names`."""
    own = getattr(cls, "labels", None)
    if not isinstance(own, Mapping):
        raise TypeError(
            f"{cls.__name__} must define `labels`, the label of each array by its field, such as "
            'labels: ClassVar = {"a": "a", "b": "b"}.'
        )
    if lost := [name for name in (*own, "layout") if name not in names]:
        raise TypeError(
            f"{cls.__name__} must have a field for each label, and `layout`; it lacks "
            f"{', '.join(lost)} among {', '.join(names) or 'none'}."
        )
    _check_complete(cls, Node, ("axes", "lower"))
    if (found := cls.axes(Layout((0,), (1,), (2,)))).keys() != own.keys():
        raise TypeError(
            f"`axes` of {cls.__name__} must have the arrays that `labels` has, "
            f"{', '.join(own)}; got {', '.join(found)}."
        )


def check_registered(rule: Rule) -> None:
    """Raises `TypeError` unless checkpoints know the class of a rule by its name."""
    cls = type(rule)
    if RULES.get(cls.__name__) is not cls:
        raise TypeError(
            f"`rules` has {rule_name(rule)}, whose class is not registered under its name, which "
            "checkpoints have. Put @jlora.extend.register above the class; rename it if another "
            "class has the name."
        )
