"""Converts the tensors of a PyTorch checkpoint to a JAX tree and back, by a name table."""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..._arrays import put
from ..._errors import Problem, stop
from ..._quantized import Quantized, is_quantized, quantize_entries
from ..._tree import flatten, leaves_by_path, name_of, problems_at
from ..._types import PyTree
from ..places._find import find
from ..places._views import View
from ._advice import advise
from ._leaves import NamedLeaf, find_leaves, path_in_names
from ._names import Name
from ._torch_layout import join_parts, join_weight, split_weight, take_part


def from_tensors(tensors: Mapping[str, Any], like: PyTree, names: Sequence[Name]) -> PyTree:
    r"""Converts the tensors of a PyTorch checkpoint to a tree of parameters, with JAX's axes.

    Args:
        tensors: arrays by PyTorch's names, as from `safetensors.numpy.load_file`. Experts of one
            parameter may be separate tensors.
        like: the tree of parameters: arrays or `jax.ShapeDtypeStruct`s, of which only the shapes
            matter, and `jlora.Quantized`, as in `load_base`.
        names: the name table of the model.

    Returns:
        A tree like `like`, with the values and dtypes of `tensors`.

    Raises:
        TypeError: if `names` is not a table.
        ValueError: if a leaf has no name, or tensors are missing, unexpected, misshapen, or of 64
            bits without jax_enable_x64. All are listed.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from jlora import peft
        >>> like = {"layers": {"up": {"kernel": jax.ShapeDtypeStruct((2, 4, 3), jnp.float32)}}}
        >>> names = [peft.Name(r"layers/(\w+)/kernel", r"h.{}.\1", "lio")]
        >>> tensors = {f"h.{i}.up.weight": jnp.ones((3, 4)) for i in range(2)}
        >>> peft.from_tensors(tensors, like, names)["layers"]["up"]["kernel"].shape
        (2, 4, 3)
    """
    leaves = name_all(like, names, "like")
    wanted = {key: leaf.weight_shape for leaf in leaves for key in leaf.parameters}
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    places = next(find(wanted, shapes, {}, argument="tensors"))
    views = {key: places.get(key, View((), ())) for key in wanted}
    used = {piece.tensor for view in views.values() for piece in view.pieces}
    wrong = [
        Problem(
            key,
            f"missing, of shape {wanted[key]}"
            if not view.pieces
            else f"expected shape {wanted[key]}, got {view.shape}",
        )
        for key, view in views.items()
        if view.shape != wanted[key] or not view.pieces
    ]
    for key, tensor in tensors.items():
        if key not in used:
            wrong.append(Problem(key, f"unexpected, of shape {shapes[key]}"))
        elif why := explain_narrowing(np.asarray(tensor).dtype):
            wrong.append(Problem(key, why))
    stop(wrong, "tensors", "do not fit `like`.")
    read = lambda key: views[key].read(lambda name: np.asarray(tensors[name]))  # noqa: E731

    def join(x: NamedLeaf) -> np.ndarray:
        return join_weight(x, [take_part(read(key), x.name) for key in x.parameters])

    values = [
        quantize_leaf(x, join, "tensors") if is_quantized(x.value) else put(join(x)) for x in leaves
    ]
    return jax.tree.unflatten(flatten(like)[1], values)


def quantize_leaf(leaf: NamedLeaf, read: Callable[[NamedLeaf], Any], argument: str) -> Quantized:
    """Reads a leaf that is quantized in `like`, if it is a stack of modules, one after the other.

    `read` returns the values or the codes of some modules of the leaf.
    """
    like = leaf.value
    axis = next((d for d in leaf.name.where("ls") if d in like.form.stack), None)
    entry = lambda i: read(leaf if axis is None else leaf.take(axis, (i,)))  # noqa: E731
    return quantize_entries(like, axis, entry, argument, name_of(leaf.path))


def to_tensors(params: PyTree, names: Sequence[Name]) -> dict[str, np.ndarray]:
    r"""Converts parameters to the tensors of a PyTorch checkpoint: the inverse of `from_tensors`.

    Args:
        params: the tree of parameters.
        names: the name table of the model.

    Returns:
        Arrays by PyTorch's names, with PyTorch's axes and the dtypes of `params`, for
        `safetensors.numpy.save_file`.

    Raises:
        TypeError: if `names` is not a table.
        ValueError: if a leaf has no name, or two leaves have the same name.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import peft
        >>> names = [peft.Name(r"layers/(\w+)/kernel", r"h.{}.\1", "lio")]
        >>> tensors = peft.to_tensors({"layers": {"up": {"kernel": jnp.ones((2, 4, 3))}}}, names)
        >>> {name: x.shape for name, x in tensors.items()}
        {'h.0.up.weight': (3, 4), 'h.1.up.weight': (3, 4)}
    """
    return split_all(name_all(params, names, "params"))


def split_all(leaves: Iterable[NamedLeaf]) -> dict[str, np.ndarray]:
    """Splits leaves into PyTorch's parameters by their names."""
    found = {}
    parts = collections.defaultdict[str, dict[int, tuple[Name, np.ndarray]]](dict)
    for leaf in leaves:
        for key, x in split_weight(leaf, leaf.value).items():
            if leaf.name.part is None:
                found[key] = x
            else:
                parts[key][leaf.name.part[0]] = leaf.name, x
    for key, own in parts.items():
        found[key] = join_parts([own[j][1] for j in sorted(own)], own[0][0])
    return found


def explain_narrowing(dtype: np.dtype) -> str | None:
    """Explains why JAX, as configured, has no arrays of a dtype; None if it has."""
    is_narrowed = jax.dtypes.canonicalize_dtype(dtype) != dtype
    return f"its dtype {dtype} needs jax_enable_x64" if is_narrowed else None


def name_all(tree: PyTree, names: Sequence[Name], argument: str) -> list[NamedLeaf]:
    """Names all leaves; raises `ValueError` if one has no name."""
    leaves = find_leaves(tree, names)
    named = {leaf.path for leaf in leaves}
    parts = [leaf for leaf in leaves if leaf.name.part]
    counts = collections.Counter(key for leaf in parts for key in leaf.parameters)
    lone = {
        leaf.path: key
        for leaf in parts
        if leaf.name.part and counts[key := leaf.parameters[0]] < leaf.name.part[1]
    }
    why = f"makes these leaves of `{argument}` parts of parameters whose other parts have no leaf."
    stop(problems_at(lone), "names", f"{why} Add rows for the other parts.")
    lost = {path: tuple(x.shape) for path, x in leaves_by_path(tree) if path not in named}
    why = f"has no row that fits these leaves of `{argument}` by path and number of axes."
    each = [Problem(path_in_names(path), f"of shape {shape}") for path, shape in lost.items()]
    stop(each, "names", why, advise(names, lost) if lost else "")
    return leaves
