"""Caches of `transformers` as pytrees."""

import contextlib
import functools
import sys
from collections.abc import Iterable
from typing import Any

import jax
import torch  # pyright: ignore[reportMissingImports]

from ._skeleton import to_jax
from .operators._state import PLAIN

STATIC = PLAIN | type | torch.dtype | torch.device


def register_caches() -> None:
    """Registers the classes of caches and of their layers, where `transformers` is imported."""
    module = sys.modules.get("transformers.cache_utils")
    every = vars(module).values() if module else ()
    kinds = [x for x in every if isinstance(x, type) and x.__module__ == "transformers.cache_utils"]
    for kind in kinds:
        _register(kind)
        kinds += kind.__subclasses__()


@functools.cache
def _register(kind: type[Any]) -> None:
    with contextlib.suppress(ValueError):  # the user has registered it
        jax.tree_util.register_pytree_node(kind, _flatten, functools.partial(_make, kind))


def _flatten(x: Any) -> tuple[list[Any], Any]:
    """Returns the tensors in an object; as what is static, the structure and the other values."""
    leaves, structure = jax.tree.flatten(vars(x))
    held = tuple(y if isinstance(y, STATIC) else None for y in leaves)
    varying = [y for y, static in zip(leaves, held, strict=True) if static is None]
    arrays = [to_jax(y) if type(y) is torch.Tensor else y for y in varying]
    return arrays, (structure, held)


def _make(kind: type[Any], about: Any, arrays: Iterable[Any]) -> Any:
    structure, held = about
    found: Any = kind.__new__(kind)
    rest = iter(arrays)
    leaves = [next(rest) if static is None else static for static in held]
    vars(found).update(structure.unflatten(leaves))
    return found
