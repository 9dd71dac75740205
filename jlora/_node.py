"""The base class of nodes, and what `Node.axes` determines."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, NoReturn, Self, TypeGuard

import jax

from . import _compat
from ._core import RANK, Axis, Change, Factor, Weight, leaf_weight
from ._quantized import Quantized
from ._types import Layout, NotAnArray, short

Axes = dict[str, tuple[int | str, ...]]  # axes of W by their numbers, others by names
SLOTS = "slots"  # the name of the axis of chosen slots
SHOWN = 4  # how many numbers of a tuple are printed


@typing.dataclass_transform(frozen_default=True)
class Node(tuple[Any, ...]):
    """What an adapter holds for one weight: arrays, a layout and static fields.

    A subclass declares its fields like a NamedTuple. `register` makes it a named tuple, and a
    pytree whose children are the arrays that `labels` names. A subclass defines `labels`, `axes`
    and `lower`. All else has defaults, which a field of the same name may replace.

    Attributes:
        labels: the label of each array for the optimizer: `"a"`, `"b"` or any other word for an
            array that is trained, `"base"` for one that is not. None is for arrays that only some
            calls have, such as dropout keys; they are neither checked nor saved.
        is_invertible: whether W follows from W', so that `jlora.unmerge` can compute it; False if
            the change depends on W. A gain is divided out; where it is 0, the result is NaN.
        layout: which axes of W are which.
        materialize: whether jlora may form W + ΔW where it has no factored form.
        dropout: probability of dropping an input of A, in [0, 1).
        key: keys while dropout is active, else None.
        frozen: names of arrays that are not trained, whatever `labels` says.
        residual: whether the node belongs to a base that its initializer changed.
    """

    labels: ClassVar[Mapping[str, str | None]]
    is_invertible: ClassVar[bool] = True
    layout: Layout
    materialize: bool = False
    dropout: float = 0.0
    key: Any = None
    frozen: tuple[str, ...] = ()
    residual: bool = False
    _fields: ClassVar[tuple[str, ...]] = ()
    _field_defaults: ClassVar[Mapping[str, Any]]
    _made: ClassVar[Any]  # the named tuple with the fields of the class
    __signature__: ClassVar[inspect.Signature]  # of its fields, for help() and the reference
    _expected: ClassVar[tuple[tuple[int, str, Callable[[Any], bool]], ...]]  # static fields
    __array_ufunc__: ClassVar = None  # so that NumPy's numbers leave products to the node

    @staticmethod
    def axes(layout: Layout) -> Axes:
        """Maps each array to its axes.

        An integer is that axis of W, a string an axis that W lacks, such as `"rank"`. This
        determines shapes, shardings and checkpoints. An axis that follows one with slots is
        1 / count as long.
        """
        raise NotImplementedError

    def lower(self, w: jax.Array | Quantized) -> Change:
        """Computes the change that the node makes to the weight `w`, an array or a quantized leaf.

        Write it in terms of `factor`. Raise `PartialWeightError` if it needs more than a shard of
        `w` and `needs` cannot express that.
        """
        raise NotImplementedError

    def needs(self) -> dict[str, tuple[int, ...]]:
        """Returns axes of W that no `shard_map` may shard, by the reason that an error gives."""
        slots = self.layout.slots
        return {} if slots is None else {"slots are parts of a whole axis of W": (slots[2],)}

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Says why the node does not fit a weight of `shape` although its axes do; None if it fits.

        `shape` may be incomplete: axes that no array has are then 0.
        """
        del shape
        return None

    @property
    def key_shape(self) -> tuple[int, ...]:
        """The shape of dropout keys: one for each entry of a stack, in each slot of a table."""
        return (*_leading(self), *(lengths(self)[d] for d in self.layout.stack))

    def factor(self, name: str) -> Factor:
        """Returns an array with its axes named by the axes of W."""
        axes = self.axes(self.layout)[name]
        names = tuple(RANK if isinstance(d, str) else Axis(d) for d in axes)
        return Factor(getattr(self, name), names)

    @classmethod
    def shapes(
        cls, layout: Layout, shape: tuple[int, ...], sizes: Mapping[str, int]
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array for a weight of `shape`; `sizes` has its other axes."""
        lengths: dict[int | str, int] = dict(enumerate(shape)) | dict(sizes)
        if layout.slots is not None:
            count, chosen, axis = layout.slots
            lengths[axis] //= count
            lengths[SLOTS] = len(chosen)
        return {n: tuple(lengths.get(d, 0) for d in dims) for n, dims in cls.axes(layout).items()}

    def __init_subclass__(cls) -> None:
        if parents := [x.__name__ for x in cls.__mro__[1:] if "_made" in vars(x)]:
            raise TypeError(
                f"{cls.__name__} must not extend {parents[0]}, whose fields it would lose: "
                "registered nodes are named tuples. Derive it from jlora.extend.Node, declare all "
                f"its fields, and call {parents[0]}.axes and {parents[0]}.lower where they help."
            )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if not cls._fields:
            raise TypeError(
                f"{cls.__name__} is not registered: put @jlora.extend.register above it."
            )
        self = tuple.__new__(cls, cls._made(*args, **kwargs))
        for i, must, holds in cls._expected:
            if not holds(self[i]):
                raise TypeError(self._explain_static(self._fields[i], must))
        return self

    @classmethod
    def _make(cls, values: Iterable[Any]) -> Self:
        """Makes a node of the values of its fields, as a named tuple does."""
        return tuple.__new__(cls, cls._made._make(values))

    def replace(self, **fields: Any) -> Self:
        """Returns a copy with other values of some fields.

        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> _, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> adapter["w"].replace(b=jnp.ones((2, 3))).b.sum().item()
        6.0
        """
        return type(self)(**(dict(zip(self._fields, self, strict=True)) | fields))

    _replace = __replace__ = replace  # of named tuples; of copy.replace

    def _explain_static(self, name: str, must: str) -> str:
        """Says what a static field must be, and what to change instead."""
        factors = [f"`{x}`" for x, label in self.labels.items() if label == "b"]
        instead = f" To scale ΔW by such a number, multiply {factors[0]} by it." if factors else ""
        return (
            f"`{name}` of {type(self).__name__} is a part of the program, so it must be {must}; "
            f"got {_short(getattr(self, name))}. Only arrays of the node can be traced or trained."
            f"{instead}"
        )

    def _refuse(self, other: object) -> NoReturn:
        del other
        raise TypeError(
            f"{type(self).__name__} is a node of an adapter, not an array. To scale or add "
            "adapters, use jlora.arithmetic.scale and add; to change its arrays, jax.tree.map."
        )

    __add__ = __radd__ = __mul__ = __rmul__ = _refuse  # a tuple would be repeated or joined

    def __setattr__(self, name: str, value: object) -> NoReturn:
        del value
        raise AttributeError(f"{type(self).__name__} is immutable: use replace({name}=...).")

    def __repr__(self) -> str:
        shown = {}
        for name in self._fields:
            x = getattr(self, name)
            if isinstance(x, Layout):
                shown |= {"stack": x.stack} if x.stack else {}
                shown |= {"slots": x.slots} if x.slots is not None else {}
            elif name in self.labels:
                shown |= {} if x is None else {name: x}
            elif name not in self._field_defaults or x != self._field_defaults[name]:
                shown[name] = x
        return f"{type(self).__name__}({', '.join(f'{n}={_short(x)}' for n, x in shown.items())})"


def _short(x: object) -> str:
    if not isinstance(x, tuple) or len(x) <= SHOWN:
        return short(x)
    return f"({', '.join(map(repr, x[:2]))}, …, {x[-1]!r})"


AdapterLeaf = Node | jax.Array  # what an adapter has at a path; an array is trained in full


def is_node_type(x: object) -> TypeGuard[type[Node]]:
    """Whether `x` is a class of nodes."""
    return isinstance(x, type) and issubclass(x, Node)


def is_node(x: object) -> TypeGuard[Node]:
    """Whether `x` is the node of a method."""
    return isinstance(x, Node)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundLeaf(NotAnArray):
    """A leaf of a bound tree: the frozen weight and its adapter. It is not an array.

    Attributes:
        base: W.
        delta: the node of its adapter, such as a `LowRank`.
    """

    base: jax.Array | Quantized
    delta: Node

    _remedy: ClassVar = (
        "`params` is a tree from jlora.bind, which holds adapters beside its weights. Only "
        "functions under jlora.wrap accept it: call jlora.wrap(model.apply)(params, ...) instead "
        "of model.apply(params, ...), or lora.apply(base, adapter, ...)."
    )

    def __repr__(self) -> str:
        return f"BoundLeaf(base={short(self.base)}, delta={self.delta!r})"


class PartialWeightError(Exception):
    """A method needs a whole weight, but an enclosing `shard_map` may have sharded it.

    Args:
        need: what the method needs, as a sentence without a full stop, such as "DoRA takes norms
            over all inputs of W".
        mesh_axes: the axes of the mesh over which the weight may be sharded.
    """

    def __init__(self, need: str, mesh_axes: Collection[Any]) -> None:
        names = ", ".join(sorted(map(repr, mesh_axes)))
        super().__init__(
            f"{need}, but the shard_map around it may have sharded W over the mesh axes {names}. "
            "If W is whole, gather it by jax.lax.all_gather(..., to='invarying') with "
            "check_vma=True, so that its type says so (jax.pmap and check_vma=False hide it). If W "
            "is sharded, put the shard_map into the function that jlora.transform adapts, or leave "
            "the mesh to jax.jit."
        )

    def at(self, path: str) -> NotImplementedError:
        """Returns the error with the path of the weight."""
        return NotImplementedError(f"{path!r} cannot be adapted here: {self}")


def weight_of(node: Node, w: jax.Array | Quantized, path: str) -> Weight:
    """Returns the weight `w` at `path` with the change that `node` makes to it."""
    try:
        return leaf_weight(w, lower(node, w), path, node.materialize)
    except PartialWeightError as e:
        raise e.at(path) from None


def lower(node: Node, w: jax.Array | Quantized) -> Change:
    """Computes the change that `node` makes to the weight `w`; raises `PartialWeightError`."""
    axes = node.axes(node.layout)
    for need, dims in node.needs().items():
        along = [w, *(x for name, x in arrays(node).items() if set(dims) & set(axes[name]))]
        if cut := frozenset.intersection(*map(_compat.may_be_cut_over, along)):
            raise PartialWeightError(need, cut)
    return node.lower(w)


# ---------------------------------------------------------------------- what `Node.axes` determines


def arrays(node: Node) -> dict[str, Any]:
    """Returns the arrays of a node by name, without those that are None."""
    found = {name: getattr(node, name) for name in node.labels}
    return {name: x for name, x in found.items() if x is not None}


def is_table(node: Node) -> bool:
    """Whether the arrays of a node have a leading axis more than those of one adapter."""
    return bool(_leading(node))


def _leading(node: Node) -> tuple[int, ...]:
    """Returns the lengths of the axes of a node's arrays before those of one adapter."""
    axes = node.axes(node.layout)
    each = ((len(axes[name]), getattr(x, "shape", ())) for name, x in state(node).items())
    return max((shape[: max(len(shape) - n, 0)] for n, shape in each), key=len)


def static(node: Node) -> dict[str, Any]:
    """Returns the fields of a node that are not arrays."""
    return {name: getattr(node, name) for name in node._fields if name not in node.labels}


def state(node: Node) -> dict[str, Any]:
    """Returns the arrays of a node by name, without those that only some calls have."""
    return {name: getattr(node, name) for name, label in node.labels.items() if label is not None}


def trained(node: Node) -> dict[str, Any]:
    """Returns the arrays of a node by name that are trained."""
    found = state(node).items()
    return {k: x for k, x in found if node.labels[k] != "base" and k not in node.frozen}


def lengths(node: Node) -> dict[int | str, int]:
    """Returns the length of each axis of the arrays of `node`."""
    axes = node.axes(node.layout)
    return {
        d: n
        for name, x in reversed(state(node).items())
        for d, n in zip(reversed(axes[name]), reversed(x.shape), strict=False)
    }


def weight_shape(node: Node) -> tuple[int, ...]:
    """Returns the shape of the weight that a node adapts; axes that no array follows have 0."""
    layout = node.layout
    found = lengths(node)
    if layout.slots is not None:
        count, _, axis = layout.slots
        found[axis] = found.get(axis, 0) * count
    ndim = len(layout.stack) + len(layout.inputs) + len(layout.outputs)
    return tuple(found.get(d, 0) for d in range(ndim))


def misfit(node: Node, shape: tuple[int, ...]) -> str | None:
    """Says why a node does not fit a weight of `shape`, or returns None."""
    layout = node.layout
    axes = sorted((*layout.stack, *layout.inputs, *layout.outputs))
    if axes != list(range(len(shape))):
        return f"made for a weight of {len(axes)} axes, got one of shape {shape} in `base`"
    if why := node.misfit(shape):
        return why
    got = {name: tuple(x.shape) for name, x in state(node).items()}
    sizes = {d: n for d, n in lengths(node).items() if isinstance(d, str)}
    expected = node.shapes(layout, shape, sizes)
    if all(got[name] == expected[name] for name in got):
        return None
    needed = " and ".join(f"{name.upper()} {expected[name]}" for name in got)
    return f"a weight of shape {shape} needs {needed}, got {' and '.join(map(str, got.values()))}"
