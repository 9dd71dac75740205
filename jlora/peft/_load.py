"""PEFT's files to an adapter tree: all is checked, then all of it is read."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .._adapters import is_node
from .._tree import leaves_by_path, nest
from .._types import PyTree
from ._file import CONFIG, Source, listing
from .adapter._miss import as_lora, is_miss, problems_of_miss
from .adapter._parameters import parts_of, without_biases
from .adapter._places import Placed, differing, narrowed, places_of, put_in_place
from .adapter._read import Adapter
from .adapter._saved import Saved, read_adapter, saved_in
from .adapter._values import stored_in, unfit
from .names._advice import advice
from .names._arrays import decomposed, low_rank, of_part, replaced, weight
from .names._names import Leaf, Name, by_row, resolve

WHERE = "`base` under `names`"


def load(path: str | os.PathLike[str], base: PyTree, names: Sequence[Name]) -> PyTree:
    r"""Reads an adapter that PEFT or `save` wrote.

    Args:
        path: its folder, with `adapter_config.json` and `adapter_model.safetensors`; nothing else
            in it is read. MiSS is loaded as LoRA.
        base: the frozen tree that it adapts, arrays or `jax.ShapeDtypeStruct`s.
        names: a table of `Name` rows, such as `jlora.peft.LLAMA`.

    Returns:
        An adapter for `apply` and `merge`: $\Delta W = s \cdot A B$ with A, B of the file's dtype,
        the layers of a scan stacked, `modules_to_save` and biases as leaves in full. Of `use_dora`
        its nodes are those of `DoRA`; of `trainable_token_indices` an embedding has that of `Rows`.
        The A of MiSS is frozen.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if anything is missing, unexpected, misshapen, of a wrong dtype, not finite,
            there twice or not supported; all of it is listed, and nothing is loaded.

    Warns:
        UserWarning: of what its configuration names and nothing has, as PEFT takes it.

    Source: PEFT 0.21, `peft.utils.save_and_load`.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, names)
        ...     again = peft.load(f"{folder}/adapter", base, names)
        >>> jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again, adapter))
        True
    """
    leaves = by_row(resolve(base, names), names)
    named = {leaf.path for leaf in leaves}
    every = {path: getattr(x, "shape", ()) for path, x in leaves_by_path(base, is_node)}
    lost = {path: shape for path, shape in every.items() if path not in named and len(shape) > 1}

    def refuse(found: Sequence[str]) -> None:
        if found:
            unnamed = lost and any(WHERE in problem for problem in found)
            raise ValueError(
                f"`path`: the adapter in {path} cannot be loaded onto `base` with `names`; "
                f"nothing was loaded. {listing(found)}"
                + (f"\n{advice(names, lost)}" if unnamed else "")
            )

    adapter, placed, found, frozen = fitted(saved_in(Source(Path(path))), leaves, refuse)
    dropout, nodes = float(adapter.fields.get("lora_dropout", 0.0)), {}
    if adapter.fields.get("use_dora") and dropout:
        adapter.idle.append(f"lora_dropout: {dropout} is of training alone, and DoRA here has none")
    warn_of_idle(adapter)
    for leaf, own in placed.low:
        arrays = of_part(leaf, [(found[x.a.key], found[x.b.key]) for x in own])
        rank = arrays[0][0].shape[0] // leaf.experts
        scale = own[0].scale * leaf.factor
        node = low_rank(leaf, arrays, rank, scale=scale, dropout=dropout, frozen=frozen)
        ms = [found[x.m.key] for x in own if x.m is not None]
        nodes[leaf.path] = decomposed(leaf, node, ms) if ms else node
    for leaf, own in placed.full:
        nodes[leaf.path] = jnp.asarray(weight(leaf, [found[x.key] for x in own]))
    for leaf, own in placed.rows:
        nodes[leaf.path] = replaced(leaf, own.rows, found[own.v.key])
    return nest(nodes)


class Fitted(NamedTuple):
    """An adapter that fits a tree.

    Attributes:
        adapter: what its files say.
        placed: the leaves that it is of.
        values: its tensors by their keys.
        frozen: which of A and B are not trained.
    """

    adapter: Adapter
    placed: Placed
    values: dict[str, np.ndarray]
    frozen: tuple[str, ...]


def fitted(saved: Saved, leaves: Sequence[Leaf], refuse: Callable[[Sequence[str]], None]) -> Fitted:
    """An adapter on the tree that has `leaves`; `refuse` is given what does not fit."""
    places = places_of(leaves)
    shapes = {name: place.leaf.weight_shape for name, place in places.items()}
    frozen: tuple[str, ...] = ()
    if is_miss(saved.fields):
        refuse(problems_of_miss(saved.fields))
        wrong = list[str]()
        saved, frozen = as_lora(saved, shapes, wrong), ("a",)
        refuse(wrong)
    adapter = read_adapter(saved, refuse)
    without_biases(adapter)
    parts = parts_of(adapter, shapes, WHERE, ordered=True)
    placed = put_in_place(adapter, parts, places, leaves)
    tokens = [x.v for x in adapter.tokens.values()]
    stored = (*stored_in(parts), *adapter.full.values(), *adapter.frozen.values(), *tokens)
    refuse(adapter.wrong + ([] if saved.is_own else narrowed(stored)))
    found = saved.read(stored)
    refuse(unfit(found) + differing(placed, found))
    return Fitted(adapter, placed, found, frozen)


def warn_of_idle(adapter: Adapter) -> None:
    """Says what of a configuration names nothing, as PEFT takes such."""
    if adapter.idle:
        warnings.warn(f"{CONFIG} of the adapter: {'; '.join(adapter.idle[:9])}.", stacklevel=3)
