"""PEFT's files to an adapter tree: all of it is checked, then all of it is read."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import name_of, nest
from .._types import PyTree
from ._arrays import low_rank, weight, weights
from ._config import problems, read_config
from ._file import DTYPES, Header, read_header, reader
from ._json import TENSORS, Source, listing, opened, shown
from ._names import Leaf, Name, resolve
from ._plan import Plan, hint, make_plan, unsaved_names
from ._select import idle


def load(dir: str | os.PathLike[str], base: PyTree, names: Sequence[Name]) -> PyTree:
    r"""Reads an adapter that PEFT or `save` wrote.

    Args:
        dir: its folder, with `adapter_config.json` and `adapter_model.safetensors`; nothing else
            in it is read.
        base: the frozen tree that it adapts, arrays or `jax.ShapeDtypeStruct`s.
        names: a table of `Name` rows, such as `jlora.peft.LLAMA`.

    Returns:
        An adapter for `apply` and `merge`: $\Delta W = s \cdot A B$ with A, B of the file's dtype,
        the layers of a scan stacked, `modules_to_save` and biases as leaves in full.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if anything is missing, unexpected, misshapen, of a wrong dtype, not finite,
            there twice or not supported; all of it is listed, and nothing is loaded.

    Source: PEFT 0.21, `peft.utils.save_and_load`.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, peft.LLAMA)
        ...     again = peft.load(f"{folder}/adapter", base, peft.LLAMA)
        >>> jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again, adapter))
        True
    """
    folder = Path(dir)
    fields = read_config(folder)
    header = read_header(Source(folder))
    leaves = resolve(base, names)
    _raise(folder, problems(fields))
    known = [leaf.key(m) for leaf in leaves if leaf.name.kind for m in leaf.modules]
    return load_onto(folder, fields, header, leaves, names, known)


def load_onto(
    folder: Path,
    fields: Mapping[str, Any],
    header: Header,
    leaves: Sequence[Leaf],
    names: Sequence[Name],
    known: Sequence[str] | None,
) -> PyTree:
    """The adapter for the `leaves` of a base, by its checked `fields`.

    Args:
        folder: where it lies.
        fields: its configuration.
        header: of its tensors.
        leaves: of the base.
        names: their table.
        known: the keys of all that can be adapted; None if there may be more than `leaves`.
    """
    plan = make_plan(fields, leaves, names)
    keys = [*plan.heads, *(leaf.key(m) for leaf, *_ in plan.adapted for m in leaf.modules)]
    found = [*plan.problems, *idle(fields, keys, known)]
    found += [] if known is None else unsaved_names(fields, leaves)
    _raise(folder, found + _check_header(plan, header))
    tensors = _read(folder, plan, header)
    dropout = float(fields.get("lora_dropout", 0.0))
    adapter = {}
    for leaf, rank, scale, pairs in plan.adapted:
        arrays = [(tensors[a], tensors[b]) for a, b in pairs]
        adapter[leaf.path] = low_rank(leaf, arrays, rank, scale=scale, dropout=dropout)
    for leaf, saved in plan.saved:
        adapter[leaf.path] = jnp.asarray(weight(leaf, [tensors[key] for key in saved]))
    return nest(adapter)


def _raise(folder: Path, found: Sequence[str]) -> None:
    if found:
        raise ValueError(
            f"`dir`: the adapter in {folder} cannot be loaded onto `base` with `names`; "
            f"nothing was loaded. {listing(found)}"
        )


def _check_header(plan: Plan, header: Header) -> list[str]:
    """What is missing, unexpected, misshapen or of a wrong dtype."""
    expected = _shapes(plan)
    found = []
    for key, shape in expected.items():
        if key not in header.entries:
            found.append(f"{key}: missing; expected shape {shape}")
        else:
            found += _check_entry(key, header, shape)
    for key in header.entries:
        if key in plan.copies:
            found += _check_entry(key, header, plan.copies[key].weight_shape)
        elif key not in expected:
            found.append(f"{shown(key)}: unexpected{hint(key)}")
    if not expected:
        found.append("adapter_config.json selects no leaf of `base` under `names`")
    return found


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The shape of each key that must be there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf, rank, _, pairs in plan.adapted:
        a, b = leaf.shapes(rank)
        for key_a, key_b in pairs:
            shapes |= {key_a: a, key_b: b}
    for leaf, saved in plan.saved:
        shapes |= dict.fromkeys(saved, leaf.weight_shape)
    return shapes | {key: shapes[source][::-1] for key, source in plan.tied.items()}


def _check_entry(key: str, header: Header, shape: tuple[int, ...]) -> list[str]:
    entry = header.entries[key]
    if entry.shape != shape:
        return [f"{key}: expected shape {shape}, got {entry.shape}"]
    if entry.dtype not in DTYPES:
        return [f"{key}: expected a floating-point dtype, got {entry.dtype}"]
    if jax.dtypes.canonicalize_dtype(DTYPES[entry.dtype]) != DTYPES[entry.dtype]:
        return [f"{key}: dtype {entry.dtype} needs jax_enable_x64"]
    return []


def _read(folder: Path, plan: Plan, header: Header) -> dict[str, np.ndarray]:
    """All tensors, finite; those stored twice must agree."""
    with opened(Source(folder), TENSORS) as (file, _):
        read = reader(file, header)
        tensors = {key: read(key) for key in _shapes(plan)}
        found = [
            f"{key}: {n} of {x.size} values are not finite"
            for key, x in tensors.items()
            if (n := x.size - np.count_nonzero(np.isfinite(x)))
        ]
        found += [
            f"{key}: expected the transpose of {source}, got other values"
            for key, source in plan.tied.items()
            if not np.array_equal(tensors[key], tensors[source].T)
        ]
        found += _check_copies(plan, header, read)
    _raise(folder, found)
    return tensors


def _check_copies(plan: Plan, header: Header, read: Callable[[str], np.ndarray]) -> list[str]:
    """A stored base embedding must be that of `base`; a resized or trained one is not supported."""
    return [
        f"{key}: expected the values of `base` at {name_of(leaf.path)}, got others; a trained or "
        "resized embedding under an adapter is not supported"
        for key, leaf in plan.copies.items()
        if key in header.entries and not _same(leaf, read(key))
    ]


def _same(leaf: Leaf, x: np.ndarray) -> bool:
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        return True
    [own] = weights(leaf, leaf.value)
    return np.array_equal(own, x.astype(own.dtype))
