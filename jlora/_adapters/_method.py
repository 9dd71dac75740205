"""What a method of adaptation says of itself, and the registry of methods."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from .. import _compat
from .._core import RANK, Axis, Change, Factor
from .._rules import Full
from .._types import Layout

AxisOrName = int | str  # an axis of W by its number, or a name for an axis that W has not
SLOTS = "slots"  # the name of the axis of chosen slots


class Method(NamedTuple):
    """A method: a rule that the user writes, and the node that takes its place in the adapter.

    A node is a NamedTuple, registered as a pytree, with arrays, a `layout` and static fields.

    Attributes:
        rule: the type of the rule, a frozen dataclass with a `pattern`; None for a node that no
            rule makes, and of which `labels`, `axes` and `lower` are all that is used.
        node: the type of the node.
        labels: for each array of the node its label for the optimizer: `"a"`, `"b"`, any other
            for what is trained as it is, or `"base"` for what is not trained. None for what comes
            and goes with a call, as dropout keys do, and is neither checked nor saved. A rule and a
            node with a static field `frozen` name arrays that are `"base"` there.
        axes: what each axis of each array follows, of a layout: an axis of W, or a name for one
            that W has not. Where W's axis has slots, theirs is 1 / count as long.
        sizes: `(rule, layout) -> lengths` of the axes that W has not.
        fit: `(rule, site) -> (rule, layout)`, or an error where the rule cannot apply to the site.
        start: `(key, w, site, rule) -> (w, node)`.
        lower: `(node, w) -> Change` of the weight `w`, an array or a quantized leaf, in terms of
            `factor`. It raises `PartialWeightError` where it needs more than a shard of `w`.
        misfit: `(node, shape) -> why` the node is none for a weight of `shape`, beyond what follows
            from `axes`, or None.
    """

    rule: type | None
    node: type
    labels: Mapping[str, str | None]
    axes: Callable[[Layout], dict[str, tuple[AxisOrName, ...]]]
    sizes: Callable[[Any, Layout], dict[str, int]]
    fit: Callable[[Any, Any], tuple[Any, Layout]]
    start: Callable[..., tuple[Any, Any]]
    lower: Callable[[Any, Any], Change]
    misfit: Callable[[Any, tuple[int, ...]], str | None] = lambda node, shape: None


METHODS: dict[type, Method] = {}  # by the type of the rule and by that of the node


def register(method: Method) -> None:
    """Adds a method to the set."""
    METHODS[method.node] = method
    if method.rule is not None:
        METHODS[method.rule] = method


def is_node(x: Any) -> bool:
    """Whether `x` is the node of a method."""
    return type(x) in METHODS and METHODS[type(x)].node is type(x)


def is_rule(x: Any) -> bool:
    """Whether `x` is a rule: `Full`, or that of a method."""
    return isinstance(x, Full) or (type(x) in METHODS and METHODS[type(x)].rule is type(x))


def method_of(x: Any) -> Method:
    """The method of a rule or a node."""
    return METHODS[type(x)]


class PartialWeightError(Exception):
    """A method needs the whole of a weight, of which an enclosing `shard_map` may have a part."""

    def __init__(self, need: str, mesh_axes: Collection[Any]) -> None:
        names = ", ".join(sorted(map(repr, mesh_axes)))
        super().__init__(
            f"{need}, and the shard_map around it may have cut W over the mesh axes {names}. "
            "What varies over a mesh axis may be a part or whole; check_vma=False, and jax.pmap, "
            "hide both. "
            "Gather what is whole by jax.lax.all_gather(..., to='invarying') with check_vma=True. "
            "For weights that are cut, put the shard_map into the function that jlora.transform "
            "takes, or leave the mesh to jax.jit."
        )

    def at(self, path: str) -> NotImplementedError:
        """The error that says which weight it is."""
        return NotImplementedError(f"{path!r} cannot be adapted here: {self}")


def change_of(node: Any, w: Any, path: str) -> Change:
    """What `node` makes of the weight `w` at `path`."""
    try:
        return lowered(node, w)
    except PartialWeightError as e:
        raise e.at(path) from None


def lowered(node: Any, w: Any) -> Change:
    """What `node` makes of the weight `w`; raises `PartialWeightError`."""
    method, slots = method_of(node), node.layout.slots
    if slots is not None:
        axes = method.axes(node.layout)
        alike = [w, *(x for name, x in arrays(node).items() if slots[2] in axes[name])]
        if may_be_cut := frozenset.intersection(*map(_compat.may_be_cut_over, alike)):
            raise PartialWeightError("its slots are parts of a whole axis of W", may_be_cut)
    return method.lower(node, w)


# ---------------------------------------------------------------- what follows from `Method.axes`


def arrays(node: Any) -> dict[str, Any]:
    """The arrays of a node by name; those that are None left out."""
    found = {name: getattr(node, name) for name in method_of(node).labels}
    return {name: x for name, x in found.items() if x is not None}


def static(node: Any) -> dict[str, Any]:
    """The fields of a node that are no arrays."""
    labels = method_of(node).labels
    return {name: getattr(node, name) for name in node._fields if name not in labels}


def labels_of(x: Any) -> dict[str, str | None]:
    """The label of each array of a node, or of that which a rule makes; of a frozen one "base"."""
    return {**method_of(x).labels, **dict.fromkeys(getattr(x, "frozen", ()), "base")}


def state(node: Any) -> dict[str, Any]:
    """The arrays of a node without those that come and go."""
    labels = method_of(node).labels
    return {name: getattr(node, name) for name, label in labels.items() if label is not None}


def shapes(
    method: Method, layout: Layout, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """The shape of each array for a weight of `shape`."""
    lengths: dict[AxisOrName, int] = dict(enumerate(shape)) | dict(sizes)
    if layout.slots is not None:
        count, _, axis = layout.slots
        lengths[axis] //= count
    axes = method.axes(layout)
    return {name: tuple(lengths.get(d, 0) for d in dims) for name, dims in axes.items()}


def lengths(node: Any) -> dict[AxisOrName, int]:
    """The lengths of axes, W's and others, as the arrays of `node` have them."""
    axes = method_of(node).axes(node.layout)
    return {
        d: n
        for name, x in reversed(state(node).items())
        for d, n in zip(reversed(axes[name]), reversed(x.shape), strict=False)
    }


def weight_shape(node: Any) -> tuple[int, ...]:
    """The shape of the weight that a node adapts; 0 along an axis that no array follows."""
    layout, found = node.layout, lengths(node)
    if layout.slots is not None:
        count, _, axis = layout.slots
        found[axis] = found.get(axis, 0) * count
    ndim = len(layout.stack) + len(layout.inputs) + len(layout.outputs)
    return tuple(found.get(d, 0) for d in range(ndim))


def trainable(rule: Any, layout: Layout, shape: tuple[int, ...]) -> int:
    """The number of parameters that a rule trains at a site."""
    method = method_of(rule)
    found = shapes(method, layout, shape, method.sizes(rule, layout))
    labels, frozen = labels_of(rule), (None, "base")
    return sum(math.prod(s) for name, s in found.items() if labels[name] not in frozen)


def misfit(node: Any, shape: tuple[int, ...]) -> str | None:
    """Why a node is none for a weight of `shape`, or None."""
    method, layout = method_of(node), node.layout
    axes = sorted((*layout.stack, *layout.inputs, *layout.outputs))
    if axes != list(range(len(shape))):
        return f"made for a weight of {len(axes)} axes, got one of shape {shape} in `base`"
    if why := method.misfit(node, shape):
        return why
    got = {name: tuple(x.shape) for name, x in state(node).items()}
    sizes = {d: n for d, n in lengths(node).items() if isinstance(d, str)}
    if layout.slots is not None:
        sizes[SLOTS] = len(layout.slots[1])
    expected = shapes(method, layout, shape, sizes)
    if all(got[name] == expected[name] for name in got):
        return None
    needed = " and ".join(f"{name.upper()} {expected[name]}" for name in got)
    return f"a weight of shape {shape} needs {needed}, got {' and '.join(map(str, got.values()))}"


def factor(node: Any, name: str) -> Factor:
    """An array of a node with its axes named by the axes of W."""
    axes = method_of(node).axes(node.layout)[name]
    return Factor(getattr(node, name), tuple(RANK if isinstance(d, str) else Axis(d) for d in axes))
