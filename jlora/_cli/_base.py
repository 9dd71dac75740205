"""The parameters of a base model in an Orbax checkpoint: their shapes, or all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from .. import checkpoint
from .._tree import nest
from .._types import PyTree

KEYS = ("threefry2x32", "rbg", "unsafe_rbg")  # what JAX has
AGAIN = "Save it again with jlora.checkpoint.save(..., base=base)."


class _Variable(NamedTuple):
    """One of Flax NNX, whose name is the path up to `value`."""

    value: Any


def shapes(folder: Path, what: str) -> PyTree:
    """The base of the adapter in `folder` by its fingerprint, or the parameters saved there."""
    if (folder / "jlora").exists():
        return fingerprinted(folder, what)
    found = _metadata(folder, what)
    structs = jax.tree.map(_struct, found, is_leaf=_is_entry)
    return _with_variables(_with_keys(folder, what, found, structs, _struct))


def fingerprinted(folder: Path, what: str, remedy: str = AGAIN) -> PyTree:
    """The shapes of the base that the adapter in `folder` was saved with."""
    saved = checkpoint.read(folder)
    if saved.base is None:
        raise ValueError(
            f"{what}: {folder} was saved without its base, so that the base's shapes are not "
            f"known. {remedy}"
        )
    kinds = (jax.random.key(0, impl=name).dtype for name in KEYS)
    keys = {str(dtype): dtype for dtype in kinds}
    return nest(
        {
            path: jax.ShapeDtypeStruct(x.shape, keys.get(x.dtype) or jnp.dtype(x.dtype))
            for path, x in saved.base.items()
        }
    )


def values(folder: Path, what: str) -> PyTree:
    """The parameters saved in `folder`, in the host's memory."""
    found = _metadata(folder, what)
    template = jax.tree.map(_empty, found, is_leaf=_is_entry)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder.absolute(), template)
    except Exception as e:
        raise _unreadable(folder, what, e) from e
    tree = jax.tree.map(np.asarray, tree)
    return _with_variables(_with_keys(folder, what, found, tree, lambda key: key))


def plain(tree: PyTree) -> PyTree:
    """The tree as Orbax gave it."""
    return jax.tree.map(
        lambda x: {"value": x.value} if _is_variable(x) else x, tree, is_leaf=_is_variable
    )


def _metadata(folder: Path, what: str) -> PyTree:
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder.absolute()).item_metadata
        tree = found.tree
    except Exception as e:
        raise _unreadable(folder, what, e) from e
    if not jax.tree.leaves(tree, is_leaf=_is_entry):
        raise ValueError(f"{what}: the Orbax checkpoint {folder} holds no parameters.")
    return tree


def _unreadable(folder: Path, what: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{what}: {folder} cannot be read as parameters that Orbax's StandardCheckpointer saved "
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


def _with_keys(
    folder: Path, what: str, found: PyTree, tree: PyTree, of: Callable[[jax.Array], Any]
) -> PyTree:
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
        raise _unreadable(folder, what, e) from e
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
