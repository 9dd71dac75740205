"""Paths of leaves, and checks of the trees that users give as base and adapter."""

import collections
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from ._adapters import AdapterLeaf, Node, is_node, state
from ._arrays import AnyArray
from ._errors import Problem, printable, stop
from ._node import BoundLeaf, misfit
from ._quantized import Quantized, is_quantized
from ._types import Holder, Params, Path, PyTree, short


def leaves_by_path(
    tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[Path, Any]]:
    """Returns the leaves in tree order with their paths; `ValueError` if two paths are equal.

    The path of an NNX variable lacks the trailing `value`. A quantized weight is one leaf.
    """

    def stop(x: object) -> bool:
        return is_quantized(x) or (is_leaf is not None and is_leaf(x))

    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    name = functools.cache(lambda key: jax.tree_util.keystr((key,), simple=True))
    paths = [tuple(map(name, path)) for path, _ in flat]
    for i in _variables([path for path, _ in flat]):
        paths[i] = paths[i][:-1]
    joined = list(map("/".join, paths))
    if len(set(joined)) < len(joined):
        twice = [path for path, n in collections.Counter(joined).items() if n > 1]
        raise ValueError(
            f"two leaves have the path {', '.join(twice)}: keys that differ only in type, or in "
            "where a `/` stands, are equal in a path. Rename one of them."
        )
    return list(zip(paths, [x for _, x in flat], strict=True))


def _variables(paths: list[tuple[Any, ...]]) -> list[int]:
    """Lists which paths end in the `value` of an NNX variable."""
    value = GetAttrKey("value")
    found = [i for i, path in enumerate(paths) if len(path) > 1 and path[-1] == value]
    siblings = collections.Counter(path[:-1] for path in paths) if found else {}
    return [i for i in found if siblings[paths[i][:-1]] == 1]


def flatten(tree: PyTree) -> tuple[list[Any], Any]:
    """Flattens a base, in which a quantized weight is one leaf."""
    return jax.tree.flatten(tree, is_leaf=is_quantized)


def name_of(path: Path) -> str:
    """Returns the name of a path for errors."""
    return printable("/".join(path)).replace("\n", r"\n") or "the root"


def problems_at(reasons: Mapping[Path, str]) -> list[Problem]:
    """Makes the problem of each path, with what is wrong there."""
    return [Problem(name_of(path), why) for path, why in reasons.items()]


def nest(leaves: dict[Path, Any]) -> PyTree:
    """Makes a nested dict of leaves by path; a leaf at the root is the tree itself."""
    if () in leaves:
        return leaves[()]
    tree: dict[str, Any] = {}
    for parts, leaf in leaves.items():
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = leaf
    return tree


def is_abstract(x: object) -> TypeGuard[jax.ShapeDtypeStruct]:
    """Whether `x` is a shape and dtype without values."""
    return isinstance(x, jax.ShapeDtypeStruct)


def is_adapted(x: object) -> TypeGuard[BoundLeaf]:
    """Whether `x` is a weight of a bound tree, with its adapter."""
    return isinstance(x, BoundLeaf)


def adapter_of(x: PyTree) -> PyTree:
    """Returns the adapter of a module that holds one; any other object is returned as it is."""
    return x.adapter if isinstance(x, Holder) else x


def refuse_module(x: PyTree, argument: str) -> None:
    """Raises `TypeError` for a module that holds an adapter: its leaves are those of both."""
    if isinstance(x, Holder):
        raise TypeError(f"`{argument}` must be a tree; got {_describe_other(x)}")


def is_empty(adapter: PyTree) -> bool:
    """Whether `adapter` is `{}`, which is the base model; None is a missing adapter."""
    return isinstance(adapter, Mapping) and not adapter


def adapter_leaves(adapter: PyTree) -> dict[Path, Any]:
    """Returns the nodes and arrays of an adapter by path; `TypeError` if it is not an adapter."""
    expected = "`adapter` must be a nested dict of LowRank nodes and arrays"
    if other := _describe_other(adapter):
        raise TypeError(f"{expected}; got {other}")
    found = dict(leaves_by_path(adapter, lambda x: is_node(x) or is_adapted(x)))
    if any(map(is_adapted, found.values())):
        raise TypeError(f"{expected}; got a tree from `bind`. Give the adapter in it.")
    wrong = {p: x for p, x in found.items() if not is_node(x) and not _is_array(x)}
    if wrong or not found:
        listed = ", ".join(f"{name_of(p)}: {type(x).__name__}" for p, x in wrong.items())
        got = listed or f"{adapter!r}, which holds none"
        raise TypeError(f"{expected}, as `init` returns it; got {got}.")
    return found


def _is_array(x: object) -> TypeGuard[AnyArray]:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def check_base(base: PyTree, argument: str = "base") -> None:
    """Raises `TypeError` if `base` has an adapter in it."""
    other = _describe_other(base)
    if other is None and _has_nodes(base):
        is_bound = any(map(is_adapted, jax.tree.leaves(base, is_leaf=is_adapted)))
        other = "a tree from `bind`" if is_bound else "an adapter"
        other += ", which holds LowRank nodes. Are two arguments swapped, or is one missing?"
    if other:
        raise TypeError(f"`{argument}` must be the frozen tree alone; got {other}")


def _describe_other(x: object) -> str | None:
    """Says for an error what `x` is, if it holds more than a base or an adapter; else None."""
    if isinstance(x, Params):
        return "Params. Give its `base` and its `adapter` as two arguments."
    if isinstance(x, Holder):
        return (
            f"the module {type(x).__name__}, which holds both. Give its `base` or its `adapter`; "
            "to merge it, call its own `merge()`."
        )
    if not isinstance(x, tuple) or is_node(x) or not _has_nodes(x):
        return None
    if any(map(_is_of_optax, jax.tree.leaves(x, is_leaf=_is_of_optax))):
        return "the state of an optimizer. Give the adapter that it trains."
    return "the pair that `init` returns. Unpack it: base, adapter = lora.init(...)."


def _is_of_optax(x: object) -> bool:
    return type(x).__module__.partition(".")[0] == "optax"


def _has_nodes(tree: PyTree) -> bool:
    return any(map(is_node, jax.tree.leaves(tree, is_leaf=is_node)))


def check_fits(base: PyTree, found: dict[Path, Any]) -> None:
    """Raises, naming every path of the adapter `found` that differs from `base`."""
    check_base(base)
    shapes = {path: tuple(jnp.shape(x)) for path, x in leaves_by_path(base)}
    _check_not_forgotten(found, shapes)
    wrong = {p: why for p, x in found.items() if (why := _misfit(x, shapes.get(p)))}
    why = f"does not fit `base` at {len(wrong)} of {len(found)} paths."
    remedy = "Use the adapter with the parameters that it was made for, or make one with `init`."
    stop(problems_at(wrong), "adapter", why, remedy)


def _check_not_forgotten(found: dict[Path, Any], shapes: dict[Path, tuple[int, ...]]) -> None:
    """Raises if `found` looks like an argument of the model: the adapter was forgotten."""
    if not found or any(is_node(x) or p in shapes for p, x in found.items()):
        return
    listed = ", ".join(f"{name_of(path)}: {short(x)}" for path, x in found.items())
    raise TypeError(
        "`adapter` must be a nested dict of LowRank nodes and arrays, as `init` returns it, with "
        f"paths of `base`; got {listed}. Was it forgotten, as in apply(base, x) instead of "
        "apply(base, adapter, x)? For the base model, give {}."
    )


def _misfit(leaf: AdapterLeaf, shape: tuple[int, ...] | None) -> str | None:
    if shape is None:
        return "not in `base`"
    if not isinstance(leaf, Node):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return f"a leaf trained in full must be floating-point, got {leaf.dtype}"
        got = tuple(leaf.shape)
        return None if got == shape else f"expected shape {shape} as in `base`, got {got}"
    for name, x in state(leaf).items():
        if not _is_array(x):
            return f"`{name}` must be an array, got {type(x).__name__}"
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return f"`{name}` must be floating-point, got {x.dtype}"
    return misfit(leaf, shape)


def bind(base: PyTree, adapter: PyTree) -> PyTree:
    r"""Puts an adapter into its base; the result has the structure of `base`.

    Where `adapter` has a `LowRank` node, the leaf becomes a pair of W and the node, for
    $W + s \cdot A B$; the sum is not computed. Where `adapter` has an array (`Full`), the array
    replaces W. No array is copied.

    Args:
        base: the frozen tree.
        adapter: a nested dict with the adapted paths only, from `init`. With `{}` the result is
            `base`.

    Returns:
        A tree for functions under `jlora.wrap`.

    Raises:
        TypeError: if `adapter` is not such a tree.
        ValueError: if `adapter` does not fit `base`. The error names every path that differs.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> f = lambda params, x: x @ params["w"]
        >>> lora = jlora.transform(f, jlora.LoRA("w", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> jlora.wrap(f)(jlora.bind(base, adapter), jnp.ones((1, 4))).shape
        (1, 3)
    """
    found = {} if is_empty(adapter) else adapter_leaves(adapter)
    check_fits(base, found)

    def join(parts: Path, w: jax.Array | Quantized) -> Any:
        delta = found.get(parts)
        if is_node(delta):
            return BoundLeaf(w, delta)
        return w if delta is None else delta

    leaves = [join(path, w) for path, w in leaves_by_path(base)]
    return jax.tree.unflatten(flatten(base)[1], leaves)


def count(tree: PyTree) -> int:
    """Counts the parameters in a tree of arrays or `jax.ShapeDtypeStruct`s.

    Args:
        tree: a base, an adapter or any other pytree. Dropout keys and frozen factors do not count.
            A quantized weight counts its entries.

    Returns:
        The sum of the sizes of its numeric leaves.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> jlora.count({"w": jnp.ones((4, 3)), "b": jnp.ones(3)})
        15
    """
    nodes = jax.tree.leaves(tree, is_leaf=is_node)
    frozen = [getattr(x, name) for x in nodes if is_node(x) for name in x.frozen]
    every, untrained = (sum(math.prod(x.shape) for x in _numeric(t)) for t in (tree, frozen))
    return every - untrained


def size_in_bytes(tree: PyTree) -> int:
    """Counts the bytes of the numeric leaves of a tree."""
    return sum(_bytes(x) for x in _numeric(tree))


def _bytes(x: AnyArray | Quantized) -> int:
    return x.nbytes if isinstance(x, Quantized) else math.prod(x.shape) * np.dtype(x.dtype).itemsize


def _numeric(tree: PyTree) -> list[Any]:
    leaves = [x if hasattr(x, "dtype") else np.asarray(x) for x in flatten(tree)[0]]
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
