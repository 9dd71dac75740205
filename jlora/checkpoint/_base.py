"""The parameters of a base model in an Orbax checkpoint: their shapes, or all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from .._types import PyTree
from ._fingerprint import shapes_of
from ._restore import read
from ._store import Where, check_files


class _Variable(NamedTuple):
    """One of Flax NNX, whose name is the path up to `value`."""

    value: Any


def base_shapes(path: Where) -> PyTree:
    """The shapes of a base: of the parameters in a folder, or that an adapter was saved with.

    Args:
        path: a folder of Orbax, of parameters or of an adapter that knows its base.

    Returns:
        A tree of `jax.ShapeDtypeStruct`s, with the paths that the base has in `transform`: a
        variable of NNX is its path without `value`.

    Raises:
        ValueError: if there are no parameters, or the adapter was saved without its base.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from jlora import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.export(f"{folder}/base", {"w": jnp.ones((2, 3))})
        ...     checkpoint.base_shapes(f"{folder}/base")["w"].shape
        (2, 3)
    """
    folder = Path(path)
    if (folder / "jlora").exists():
        return _fingerprinted(folder)
    found = _metadata(folder)
    structs = jax.tree.map(_struct, found, is_leaf=_is_entry)
    return _with_variables(_with_keys(folder, found, structs, _struct))


def _fingerprinted(folder: Path) -> PyTree:
    """The shapes of the base that the adapter in `folder` was saved with."""
    saved = read(folder)
    if saved.base is None:
        raise ValueError(
            f"`path`: {folder} was saved without its base, so that the base's shapes are not "
            "known. Save it again with jlora.checkpoint.save(..., base=base)."
        )
    return shapes_of(saved.base)


def base_values(path: Where) -> PyTree:
    """The parameters in a folder of Orbax, in the host's memory.

    Args:
        path: a folder that `ocp.StandardCheckpointer` or `export` wrote.

    Returns:
        A tree of NumPy arrays, with the paths of `base_shapes`.

    Raises:
        ValueError: if there are no parameters.
    """
    folder = Path(path)
    found = _metadata(folder)
    template = jax.tree.map(_empty, found, is_leaf=_is_entry)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder.absolute(), template)
    except Exception as e:
        raise _unreadable(folder, e) from e
    tree = jax.tree.map(np.asarray, tree)
    return _with_variables(_with_keys(folder, found, tree, lambda key: key))


def as_saved(tree: PyTree) -> PyTree:
    """The tree of `base_values` as Orbax gave it."""
    return jax.tree.map(
        lambda x: {"value": x.value} if _is_variable(x) else x, tree, is_leaf=_is_variable
    )


def _metadata(folder: Path) -> PyTree:
    check_files(folder)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder.absolute()).item_metadata
        if found is None:
            raise ValueError("its metadata are missing or damaged")
        tree = found.tree
    except Exception as e:
        raise _unreadable(folder, e) from e
    if not jax.tree.leaves(tree, is_leaf=_is_entry):
        raise ValueError(f"`path`: the Orbax checkpoint {folder} holds no parameters.")
    return tree


def _unreadable(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"`path`: {folder} cannot be read as parameters that Orbax's StandardCheckpointer saved "
        f"({type(error).__name__}: {reason})."
    )


def _is_entry(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _empty(x: Any) -> Any:
    """What makes Orbax read into NumPy's memory, whatever the devices were that wrote it."""
    if x.storage is None:  # a number of Python
        return np.zeros((), x.dtype).item()
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _with_keys(folder: Path, found: PyTree, tree: PyTree, of: Callable[[jax.Array], Any]) -> PyTree:
    """`tree`, and in it `of` JAX's random keys, which Orbax calls uint32 until it reads them."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    empty = jax.tree.map(
        lambda x: _struct(x) if x.dtype == np.uint32 else ocp.PLACEHOLDER, found, is_leaf=_is_entry
    )
    if all(x is ocp.PLACEHOLDER for x in jax.tree.leaves(empty)):
        return tree
    args = ocp.args.PyTreeRestore(
        item=empty,
        restore_args=jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=place), empty),
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            read = checkpointer.restore(folder.absolute(), args=args)
    except Exception as e:
        raise _unreadable(folder, e) from e
    return jax.tree.map(lambda x, key: of(key) if _is_key(key) else x, tree, read)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _with_variables(tree: PyTree) -> PyTree:
    """Orbax keeps NNX's variables as {"value": array}: all of them, or it is none of NNX's."""

    def is_one(x: Any) -> bool:
        return isinstance(x, dict) and set(x) == {"value"} and not isinstance(x["value"], dict)

    if all(map(is_one, jax.tree.leaves(tree, is_leaf=is_one))):
        return jax.tree.map(lambda x: _Variable(x["value"]), tree, is_leaf=is_one)
    return tree


def _is_variable(x: Any) -> bool:
    return isinstance(x, _Variable)
