"""An adapter of PEFT's whose model is not at hand."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..._adapters import Decomposed, LowRank, Replaced
from ..._types import Layout
from .._file import Source, listing
from ..names._arrays import decomposed, low_rank
from ..names._names import Leaf, Name
from ._parameters import matrix, parts_of, without_biases
from ._read import Adapter, Part
from ._saved import Saved, read_adapter, saved_in
from ._tokens import Tokens
from ._values import stored_in, twins, values, with_values


def read(path: str | os.PathLike[str]) -> dict[str, LowRank | Decomposed | Replaced | np.ndarray]:
    r"""Reads an adapter for a look at it, when the model is not at hand.

    The checks are those of `load`; only whether it fits its model, and whether all that its
    configuration names is there, cannot be known. Where several parameters of one module of experts
    are adapted, the file does not say which is which: they are taken in the order of
    `target_parameters` in which their ranks and numbers of experts agree.

    Args:
        path: the adapter's folder.

    Returns:
        The leaves by PyTorch's names: a `LowRank` node for a module, or for a parameter of
        experts, whose axes are those of PyTorch's weight, or a `Decomposed` where it is of DoRA; a
        `Replaced` for rows of an embedding; an array for a parameter in full. A head that is tied
        to an embedding has no A and B of its own.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: as `load`.

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
        ...     leaves = peft.read(f"{folder}/adapter")
        >>> leaves["model.q_proj"].b.shape
        (2, 3)
    """
    alone = read_alone(path)
    return {**alone.nodes, **alone.rows, **alone.full}


class Alone(NamedTuple):
    """An adapter with its values.

    Attributes:
        adapter: what its files say.
        parts: A and B of each parameter, but for the heads that are in `tied`.
        ranks: r of each by its key, and of those heads.
        tied: by the key of an embedding, the key of the head that has its A and B.
        full: parameters that are replaced.
        frozen: parameters that the base must have just so.
        tokens: rows of embeddings.
    """

    adapter: Adapter
    parts: list[Part]
    ranks: dict[str, int]
    tied: dict[str, str]
    full: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]
    tokens: list[Tokens]

    @property
    def rows(self) -> dict[str, Replaced]:
        """The node of each embedding with rows by its module."""
        layout = Layout((), (0,), (1,))
        return {x.module: Replaced(jnp.asarray(x.v), x.rows, layout) for x in self.tokens}

    @property
    def nodes(self) -> dict[str, LowRank | Decomposed]:
        """The node of each part by its key, with the axes of PyTorch's weight."""
        dropout = float(self.adapter.fields.get("lora_dropout", 0.0))
        found = {}
        for part in self.parts:
            leaf, pair, static = self.leaf(part), [(part.a, part.b)], {"scale": part.scale}
            node = low_rank(leaf, pair, self.ranks[part.key], dropout=dropout, **static)
            found[part.key] = node if part.m is None else decomposed(leaf, node, [part.m])
        return found

    def leaf(self, part: Part) -> Leaf:
        """The weight of a part, which lies as PyTorch's."""
        (rows, columns), count = matrix(part), part.a.shape[0] // self.ranks[part.key]
        window = part.a.shape[2:] if part.kind == "conv" else ()
        axes, shape = {
            "embedding": ("vo", (columns, rows)),
            "linear": ("oi", (rows, columns)),
            "conv": ("oi" + "k" * len(window), (rows, *part.a.shape[1:])),
            "experts": ("eoi", (count, rows, columns)),
        }[part.kind]
        return Leaf((), None, shape, Name("", "", axes), ("",))


def read_alone(path: str | os.PathLike[str], argument: str = "path") -> Alone:
    """Reads all of an adapter whose model is not at hand."""

    def refuse(found: Sequence[str]) -> None:
        if found:
            raise ValueError(
                f"`{argument}`: the adapter in {path} cannot be read. {listing(found)}"
            )

    return alone_in(saved_in(Source(Path(path), argument)), refuse)


def alone_in(saved: Saved, refuse: Callable[[Sequence[str]], None]) -> Alone:
    """All of an adapter whose model is not at hand; `refuse` is given what is wrong with it."""
    adapter = read_adapter(saved, refuse)
    without_biases(adapter)
    parts = parts_of(adapter, None, "")
    refuse(adapter.wrong)
    # Before values are read, as patterns have a time of their own.
    ranks = {part.key: adapter.selection.rank(part.key) for part in parts}
    stored = [x.v for x in adapter.tokens.values()]
    every = (*stored_in(parts), *adapter.full.values(), *adapter.frozen.values(), *stored)
    found = values(saved, every, wrong := list[str]())
    refuse(wrong)
    full, frozen = (
        {name: found[x.key] for name, x in group.items()}
        for group in (adapter.full, adapter.frozen)
    )
    parts = with_values(parts, found)
    shared = twins(parts)
    tied = {x.key: shared[x.name].key for x in parts if x.kind == "embedding" and x.name in shared}
    own = [x for x in parts if x.kind == "embedding" or x.name not in shared]
    tokens = [x._replace(v=found[x.v.key]) for x in adapter.tokens.values()]
    return Alone(adapter, own, ranks, tied, full, frozen, tokens)
