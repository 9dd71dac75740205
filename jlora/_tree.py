"""Paths, and what an adapter's tree must be."""

import collections
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from ._explicit import explicit
from ._types import Adapted, Layout, LowRank, Params, Path, PyTree, short


def leaves_by_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[Path, Any]]:
    """The leaves in tree order with their paths; `ValueError` if two have the same.

    An NNX variable is its own path without the trailing `value`.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    siblings = collections.Counter(path[:-1] for path, _ in flat)
    paths = [_strings(path, only=siblings[path[:-1]] == 1) for path, _ in flat]
    twice = ["/".join(p) for p, n in collections.Counter(paths).items() if n > 1]
    if twice:
        raise ValueError(
            f"two leaves have the path {', '.join(twice)}, as keys that differ only in type do. "
            "Rename one of them."
        )
    return list(zip(paths, (x for _, x in flat), strict=True))


def _strings(path: tuple[Any, ...], only: bool) -> Path:
    parts = tuple(_part(key) for key in path)
    is_variable = len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value"
    return parts[:-1] if is_variable and only else parts


def _part(key: Any) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return key.name
    return str(key)


def name_of(path: Path) -> str:
    """How errors call a path."""
    return "/".join(path) or "the root"


def check_key(key: Any) -> None:
    """`TypeError` if `key` is not one PRNG key, new or old style."""
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (typed and ndim == 0) and not (dtype == jnp.uint32 and ndim == 1):
        got = type(key).__name__ if dtype is None else f"an array of {dtype} and shape {key.shape}"
        raise TypeError(f"`key` must be one PRNG key, such as jax.random.key(0); got {got}.")


def nest(leaves: dict[Path, Any]) -> PyTree:
    """A nested dict of leaves by path; a leaf at the root is itself the tree."""
    if () in leaves:
        return leaves[()]
    tree: dict[str, Any] = {}
    for parts, leaf in leaves.items():
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = leaf
    return tree


def fold(key: jax.Array, parts: Path) -> jax.Array:
    """A key of its own for a path, whatever the other paths are."""
    # So that the one part `a/b` is not the two parts `a` and `b`.
    name = "/".join(part.replace("/", "\0") for part in parts)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def take(
    tree: PyTree, pick: Callable[[Any], bool], is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Callable[[Sequence[Any]], PyTree]]:
    """The leaves that `pick` picks, and the tree as a function of what stands in their places."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    at = [i for i, x in enumerate(leaves) if pick(x)]
    picked = [leaves[i] for i in at]
    for i in at:  # so that `put` keeps nothing alive
        leaves[i] = None

    def put(values: Sequence[Any]) -> PyTree:
        full = dict(enumerate(leaves)) | dict(zip(at, values, strict=True))
        return jax.tree.unflatten(structure, list(full.values()))

    return picked, put


def is_abstract(x: Any) -> bool:
    """Whether `x` stands for an array that is not there."""
    return isinstance(x, jax.ShapeDtypeStruct)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, and the dtype that it has in JAX."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    weak_type = getattr(x, "weak_type", False)
    return jax.ShapeDtypeStruct(x.shape, dtype, weak_type=weak_type, sharding=explicit(x))


def is_concrete(x: Any) -> bool:
    """Whether `x` is a JAX array with a value and a place, not one being traced."""
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)  # pyright: ignore


def is_adapted(x: Any) -> bool:
    """Whether `x` is a leaf of a bound tree with its adapter."""
    return isinstance(x, Adapted)


def is_low_rank(x: Any) -> bool:
    """Whether `x` is a `LowRank` node."""
    return isinstance(x, LowRank)


def is_empty(adapter: PyTree) -> bool:
    """Whether `adapter` is `{}`, that of the base model; None is an adapter that was not found."""
    return isinstance(adapter, Mapping) and not adapter


def adapter_leaves(adapter: PyTree) -> dict[Path, Any]:
    """The `LowRank` nodes and arrays of an adapter by path; `TypeError` if it is none."""
    if isinstance(adapter, Params):
        raise TypeError(
            "`adapter` must be a nested dict of LowRank nodes and arrays; got Params. Give its "
            "`base` and `adapter` one by one."
        )
    found = dict(leaves_by_path(adapter, lambda x: isinstance(x, LowRank | Adapted)))
    wrong = {p: x for p, x in found.items() if not isinstance(x, LowRank) and not _is_array(x)}
    if not found:
        raise TypeError(
            "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
            f"got {adapter!r}, which holds none."
        )
    if wrong:
        listed = ", ".join(f"{name_of(p)}: {type(x).__name__}" for p, x in wrong.items())
        raise TypeError(
            "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it; "
            f"got {listed}."
        )
    return found


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def factor_shapes(
    layout: Layout, shape: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a weight of `shape`."""
    stack = [shape[d] for d in layout.stack]
    inputs = [shape[d] for d in layout.inputs]
    outputs = [shape[d] for d in layout.outputs]
    if layout.slots is not None:
        count, chosen, axis = layout.slots
        outputs[layout.outputs.index(axis)] //= count
        stack.append(len(chosen))
    return (*stack, *inputs, rank), (*stack, rank, *outputs)


def weight_shape(site: LowRank) -> tuple[int, ...]:
    """The shape of the weight that a site adapts, the inverse of `factor_shapes`; 0 if unsaid."""
    stack, inputs, outputs, slots = site.layout
    beside = len(stack) + (slots is not None)
    lengths = dict(zip(stack, site.a.shape, strict=False))
    lengths |= dict(zip(inputs, site.a.shape[beside:], strict=False))
    lengths |= dict(zip(outputs, site.b.shape[beside + 1 :], strict=False))
    if slots is not None:
        lengths[slots[2]] *= slots[0]
    return tuple(lengths.get(d, 0) for d in range(len(lengths)))


def check_fits(base: PyTree, found: dict[Path, Any]) -> None:
    """Raises, naming every path of the adapter `found` that differs from `base`."""
    leaves = leaves_by_path(base, is_low_rank)
    if any(is_low_rank(x) for _, x in leaves):
        raise TypeError(
            "`base` holds LowRank nodes, so it is an adapter, or a tree from `bind`: are `base` "
            "and `adapter` swapped?"
        )
    shapes = {path: tuple(jnp.shape(x)) for path, x in leaves}
    _check_not_forgotten(found, shapes)
    wrong = [f"  {name_of(p)}: {e}" for p, x in found.items() if (e := _misfit(x, shapes.get(p)))]
    if wrong:
        raise ValueError(
            f"`adapter` does not fit `base` at {len(wrong)} of {len(found)} paths:\n"
            + "\n".join(wrong)
            + "\nUse the adapter with the parameters that it was made for, or make one with `init`."
        )


def _check_not_forgotten(found: dict[Path, Any], shapes: dict[Path, tuple[int, ...]]) -> None:
    """Raises if the adapter `found` looks like an argument of the model."""
    if not found or any(is_low_rank(x) or p in shapes for p, x in found.items()):
        return
    listed = ", ".join(f"{name_of(path)}: {short(x)}" for path, x in found.items())
    raise TypeError(
        "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it, with "
        f"paths of `base`; got {listed}. Was it forgotten, as in apply(base, x) for "
        "apply(base, adapter, x)? For the base model alone it is {}."
    )


def _misfit(leaf: Any, shape: tuple[int, ...] | None) -> str | None:
    if shape is None:
        return "not in `base`"
    if not is_low_rank(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return f"a leaf trained in full must be floating-point, got {leaf.dtype}"
        got = tuple(leaf.shape)
        return None if got == shape else f"expected shape {shape} as in `base`, got {got}"
    for name in ("a", "b"):
        if not _is_array(x := getattr(leaf, name)):
            return f"`{name}` must be an array, got {type(x).__name__}"
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return f"`{name}` must be floating-point, got {x.dtype}"
    layout, a, b = leaf.layout, tuple(leaf.a.shape), tuple(leaf.b.shape)
    axes = sorted((*layout.stack, *layout.inputs, *layout.outputs))
    if axes != list(range(len(shape))):
        return f"made for a weight of {len(axes)} axes, got one of shape {shape} in `base`"
    expected = factor_shapes(layout, shape, a[-1] if a else 0)
    if (a, b) == expected:
        return None
    return f"a weight of shape {shape} needs A {expected[0]} and B {expected[1]}, got {a} and {b}"


def count(tree: PyTree) -> int:
    """The number of parameters in a tree of arrays or `jax.ShapeDtypeStruct`s.

    Args:
        tree: a base, an adapter or any other pytree; dropout keys are not parameters.

    Returns:
        The sum of the sizes of its numeric leaves.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.count({"w": jnp.ones((4, 3)), "b": jnp.ones(3)})
        15
    """
    return sum(math.prod(x.shape) for x in _numeric(tree))


def size_in_bytes(tree: PyTree) -> int:
    """The bytes of the numeric leaves of a tree."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in _numeric(tree))


def _numeric(tree: PyTree) -> list[Any]:
    leaves = [x if hasattr(x, "dtype") else np.asarray(x) for x in jax.tree.leaves(tree)]
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
