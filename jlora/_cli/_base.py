"""The parameters of a base model in an Orbax checkpoint: their shapes, or all of them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from .. import checkpoint
from .._tree import nest
from .._types import PyTree

AGAIN = "Save it again with jlora.checkpoint.save(..., base=base)."


class _Variable(NamedTuple):
    """One of Flax NNX, whose name is the path up to `value`."""

    value: Any


def shapes(folder: Path, what: str) -> PyTree:
    """The base of the adapter in `folder` by its fingerprint, or the parameters saved there."""
    if (folder / "jlora").exists():
        return fingerprinted(folder, what)
    return _with_variables(jax.tree.map(_struct, _metadata(folder, what), is_leaf=_is_entry))


def fingerprinted(folder: Path, what: str, remedy: str = AGAIN) -> PyTree:
    """The shapes of the base that the adapter in `folder` was saved with."""
    saved = checkpoint.read(folder)
    if saved.base is None:
        raise ValueError(
            f"{what}: {folder} was saved without its base, so that the base's shapes are not "
            f"known. {remedy}"
        )
    arrays = {p: leaf for p, leaf in saved.base.items() if not leaf.dtype.startswith("key<")}
    return nest({p: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)) for p, x in arrays.items()})


def values(folder: Path, what: str) -> PyTree:
    """The parameters saved in `folder`, in the host's memory."""
    template = jax.tree.map(_empty, _metadata(folder, what), is_leaf=_is_entry)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder.absolute(), template)
    except Exception as e:
        raise _unreadable(folder, what, e) from e
    return _with_variables(jax.tree.map(np.asarray, tree))


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


def _with_variables(tree: PyTree) -> PyTree:
    """Orbax keeps NNX's variables as {"value": array}: all of them, or it is none of NNX's."""

    def is_one(x: Any) -> bool:
        return isinstance(x, dict) and set(x) == {"value"} and not isinstance(x["value"], dict)

    if all(map(is_one, jax.tree.leaves(tree, is_leaf=is_one))):
        return jax.tree.map(lambda x: _Variable(x["value"]), tree, is_leaf=is_one)
    return tree


def _is_variable(x: Any) -> bool:
    return isinstance(x, _Variable)
