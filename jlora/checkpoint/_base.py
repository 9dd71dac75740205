"""Reads the shapes or the values of a base model from an Orbax checkpoint."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from .._arrays import AnyArray
from .._errors import InputError
from .._folders import Where
from .._types import PyTree
from ._fingerprint import shapes_of
from ._restore import read
from ._save import METADATA
from ._store import check_files, damage, find


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


def base_values(path: Where) -> PyTree:
    """Reads the parameters of an Orbax checkpoint into the host's memory.

    Args:
        path: a folder that `ocp.StandardCheckpointer` or `export` wrote.

    Returns:
        A tree of NumPy arrays (random keys are JAX arrays), with the saved dtypes and the paths of
        `base_shapes`.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if the checkpoint has no parameters, or is damaged.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from jlora import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.export(f"{folder}/base", {"w": jnp.ones((2, 3))})
        ...     checkpoint.base_values(f"{folder}/base")["w"].sum()
        np.float32(6.0)
    """
    _, values = _read(find(path), lambda _: True)
    return _with_variables(jax.tree.map(lambda x: x if _is_key(x) else np.asarray(x), values))


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
