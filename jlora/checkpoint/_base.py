"""Reads the shapes or the values of a base model from an Orbax checkpoint."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from .._arrays import AnyArray, put_like
from .._errors import InputError, stop
from .._folders import Where
from .._quantized import BaseLeaf, is_quantized, quantize_entries
from .._tree import flatten, leaves_by_path, name_of, size_in_bytes
from .._types import Path, PyTree
from ._fingerprint import Leaf, differences, shapes_of
from ._restore import read
from ._save import METADATA
from ._store import check_files, damage, find

PIECES = 16  # of a checkpoint that is read like another tree


class _Variable(NamedTuple):
    """A variable of Flax NNX. Orbax keeps `value` as a key; the variable's path ends before it."""

    value: Any


def base_shapes(path: Where) -> PyTree:
    """Reads the shapes and dtypes of a base model, but no values.

    Args:
        path: an Orbax checkpoint of parameters, or of an adapter that was saved with its base.

    Returns:
        A tree of `jax.ShapeDtypeStruct`s with the paths of the base in `transform`. The path of an
        NNX variable does not end with `value`.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if the checkpoint has no parameters or is damaged, or if the adapter was saved
            without its base.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from jlora import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.export(f"{folder}/base", {"w": jnp.ones((2, 3))})
        ...     checkpoint.base_shapes(f"{folder}/base")["w"].shape
        (2, 3)
    """
    folder = find(path)
    if (folder / METADATA).exists():
        saved = read(folder)
        if saved.base is None:
            raise InputError(
                "path",
                f"{folder} was saved without its base, so the base's shapes are not known. "
                "Give a checkpoint of the base itself, or save it again with "
                "jlora.checkpoint.save(..., base=base).",
                path=folder,
            )
        return shapes_of(saved.base)
    entries, values = _read(folder, lambda x: x.dtype == np.uint32)  # random keys among them

    own = jax.tree.map(lambda x, value: value if _is_key(value) else x, entries, values)
    return _with_variables(jax.tree.map(_struct, own))


def base_values(path: Where, *, like: PyTree | None = None) -> PyTree:
    """Reads the parameters of an Orbax checkpoint, without `like` into the host's memory.

    Args:
        path: a folder that `ocp.StandardCheckpointer` or `export` wrote.
        like: the tree of parameters: arrays, `jax.ShapeDtypeStruct`s and `jlora.Quantized`, as in
            `peft.load_base`. Each leaf is put where that of `like` is. The host holds a sixteenth
            of the checkpoint at a time, or one leaf if it is larger.

    Returns:
        A tree like `like`; without it, of NumPy arrays (random keys are JAX arrays) with the paths
        of `base_shapes`. Arrays have the saved dtypes.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if the checkpoint has no parameters, is damaged, or has other paths or shapes
            than `like`.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from jlora import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.export(f"{folder}/base", {"w": jnp.ones((2, 3))})
        ...     checkpoint.base_values(f"{folder}/base")["w"].sum()
        np.float32(6.0)
    """
    folder = find(path)
    if like is not None:
        return _read_like(folder, like)
    _, values = _read(folder, lambda _: True)
    return _with_variables(jax.tree.map(lambda x: x if _is_key(x) else np.asarray(x), values))


def _read_like(folder: epath.Path, like: PyTree) -> PyTree:
    """Reads the leaves in pieces of similar size, each of which reads Orbax's metadata again."""
    saved, wanted = (dict(leaves_by_path(x)) for x in (base_shapes(folder), like))
    wrong = differences(_forms(wanted), _forms(saved))
    stop(wrong, "path", f"{folder} does not fit `like`.", path=folder)
    ends = list(itertools.accumulate(map(size_in_bytes, saved.values())))
    pieces = [PIECES * end // (ends[-1] + 1) for end in ends]
    found = {}
    for piece in sorted(set(pieces)):
        turns = map(piece.__eq__, pieces)
        _, values = _read(folder, lambda _, turns=turns: next(turns))
        for path, n, x in zip(saved, pieces, jax.tree.leaves(values), strict=True):
            if n == piece:
                found[path] = _place(x, wanted[path], name_of(path))
    return jax.tree.unflatten(flatten(like)[1], [found[path] for path in wanted])


def _forms(leaves: dict[Path, Any]) -> dict[Path, Leaf]:
    return {path: Leaf(tuple(x.shape), "") for path, x in leaves.items()}


def _place(x: Any, like: BaseLeaf, name: str) -> Any:
    if not is_quantized(like):
        return put_like(x, like)
    axis = next(iter(like.form.stack), None)
    entry = lambda i: x if axis is None else x.take([i], axis)  # noqa: E731
    return quantize_entries(like, axis, entry, "path", name)


def _read(folder: epath.Path, is_wanted: Callable[[Any], bool]) -> tuple[PyTree, PyTree]:
    """Returns Orbax's metadata of each leaf, and the values of the wanted leaves on the host.

    Random keys are returned as JAX arrays. Orbax calls them uint32 until it reads them.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def args_of(x: AnyArray) -> ocp.RestoreArgs:
        if x.dtype == np.uint32:
            return ocp.ArrayRestoreArgs(sharding=place)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    def item_of(x: AnyArray) -> Any:
        return _struct(x) if is_wanted(x) else ocp.PLACEHOLDER

    check_files(folder)
    with damage(
        folder,
        f"{folder} cannot be read as parameters that Orbax's StandardCheckpointer saved",
        "Give the whole folder of a checkpoint that it or jlora.checkpoint.export wrote.",
    ):
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder).item_metadata
        if found is None or not jax.tree.leaves(found.tree):
            raise ValueError("its metadata are missing or damaged, or it has no parameters")
        item, restore_args = (jax.tree.map(f, found.tree) for f in (item_of, args_of))
        if all(x is ocp.PLACEHOLDER for x in jax.tree.leaves(item)):  # Orbax raises for these
            return found.tree, item
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            return found.tree, checkpointer.restore(folder, args=args)


def _struct(x: AnyArray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _is_key(x: object) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _with_variables(tree: PyTree) -> PyTree:
    """Restores NNX's variables, which Orbax keeps as `{"value": array}`, if every leaf is one."""

    def is_one(x: object) -> bool:
        return isinstance(x, dict) and set(x) == {"value"} and not isinstance(x["value"], dict)

    if all(map(is_one, jax.tree.leaves(tree, is_leaf=is_one))):
        return jax.tree.map(lambda x: _Variable(x["value"]), tree, is_leaf=is_one)
    return tree
