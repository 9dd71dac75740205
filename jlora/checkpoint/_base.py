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
    """A variable of Flax NNX: its name is the path up to `value`, which Orbax keeps as a key."""

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
    keys = _restore(folder, found, lambda x: x.dtype == np.uint32)

    def struct(x: Any, key: Any) -> jax.ShapeDtypeStruct:
        return _struct(key if _is_key(key) else x)

    return _with_variables(jax.tree.map(struct, found, keys, is_leaf=_is_entry))


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
    tree = _restore(folder, _metadata(folder), lambda x: True)
    return _with_variables(jax.tree.map(lambda x: x if _is_key(x) else np.asarray(x), tree))


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


def _restore(folder: Path, found: PyTree, is_wanted: Callable[[Any], bool]) -> PyTree:
    """Reads those entries of `found` that are wanted into the host's memory.

    Random keys come as JAX's: Orbax calls them uint32 until it reads them.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def args_of(x: Any) -> ocp.RestoreArgs:
        if x.dtype == np.uint32:
            return ocp.ArrayRestoreArgs(sharding=place)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    def item_of(x: Any) -> Any:
        return _struct(x) if is_wanted(x) else ocp.PLACEHOLDER

    item, restore_args = (jax.tree.map(f, found, is_leaf=_is_entry) for f in (item_of, args_of))
    if all(x is ocp.PLACEHOLDER for x in jax.tree.leaves(item)):  # which Orbax does not take
        return item
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            return checkpointer.restore(folder.absolute(), args=args)
    except Exception as e:
        raise _unreadable(folder, e) from e


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


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _with_variables(tree: PyTree) -> PyTree:
    """Orbax keeps NNX's variables as {"value": array}: all of them, or it is none of NNX's."""

    def is_one(x: Any) -> bool:
        return isinstance(x, dict) and set(x) == {"value"} and not isinstance(x["value"], dict)

    if all(map(is_one, jax.tree.leaves(tree, is_leaf=is_one))):
        return jax.tree.map(lambda x: _Variable(x["value"]), tree, is_leaf=is_one)
    return tree
