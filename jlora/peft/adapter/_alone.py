"""Reads an adapter without its model."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..._adapters import Decomposed, LowRank, Replaced
from ..._types import Layout
from .._file import Source
from .._problems import Problems
from ..names._leaves import NamedLeaf
from ..names._names import Name
from ..names._torch_layout import join_factors
from ._arranged import make_frozen_tensors, make_tensors
from ._contents import Adapter, Contents, Part, sort_tensors
from ._files import Files, as_files, fill, open_files, write
from ._parameters import assign_parameters, find_twins, refuse_biases


def read(
    path: str | os.PathLike[str], *, ignore: Collection[str] = ()
) -> dict[str, LowRank | Decomposed | Replaced | np.ndarray]:
    r"""Reads an adapter without its model, for inspection.

    The file is checked as in `load`, but not against a model. If several parameters of a module of
    experts are adapted, the file does not distinguish them. They are then assigned in the order of
    `target_parameters` for which ranks and numbers of experts agree.

    Args:
        path: the adapter's folder.
        ignore: as in `load`.

    Returns:
        The leaves by PyTorch's names, with the axes of PyTorch's weights: a `LowRank` node for each
        module or parameter of experts (with DoRA a `Decomposed`), a `Replaced` for rows of an
        embedding, and an array for a parameter in full. A head that is tied to an embedding has no
        `LowRank` node of its own.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: as in `load`.

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
    alone = read_alone(path, ignore=ignore)
    return {**alone.nodes, **alone.rows, **alone.contents.full}


class Alone(NamedTuple):
    """An adapter with its values.

    Attributes:
        adapter: its tensors, sorted.
        contents: their values, without A and B of the heads in `tied`.
        tied: a dict from the key of an embedding to the key of the head with the same A and B.
    """

    adapter: Adapter
    contents: Contents
    tied: dict[str, str]

    @property
    def rows(self) -> dict[str, Replaced]:
        """The node of each embedding with replaced rows, by module."""
        layout = Layout((), (0,), (1,))
        tokens = self.contents.tokens.values()
        return {x.module: Replaced(jnp.asarray(x.v), x.rows, layout) for x in tokens}

    @property
    def nodes(self) -> dict[str, LowRank | Decomposed]:
        """The node of each part by its key, with the axes of PyTorch's weight."""
        dropout = float(self.adapter.fields.get("lora_dropout", 0.0))
        return {
            part.key: join_factors(as_leaf(part), [part.arrays], scale=part.scale, dropout=dropout)
            for part in self.contents.parts
        }


def as_leaf(part: Part) -> NamedLeaf:
    """Makes the leaf that a part adapts, with PyTorch's axes."""
    rows, columns = part.matrix
    axes, shape = {
        "embedding": ("vo", (columns, rows)),
        "linear": ("oi", (rows, columns)),
        "conv": ("oi" + "k" * (len(part.a.shape) - 2), (rows, *part.a.shape[1:])),
        "experts": ("eoi", (part.experts, rows, columns)),
    }[part.kind]
    return NamedLeaf((), None, shape, Name("", "", axes), ("",))


def read_alone(
    path: str | os.PathLike[str], argument: str = "path", *, ignore: Collection[str] = ()
) -> Alone:
    """Reads all of an adapter without its model."""
    problems = Problems(f"`{argument}`: the adapter in {path} cannot be read", path)
    return _read(open_files(Source(Path(path), argument), ignore), problems)


def write_alone(
    out: str | os.PathLike[str],
    fields: dict[str, Any],
    parts: Sequence[Part],
    each: Sequence[Alone],
    problems: Problems,
    argument: str,
) -> None:
    """Writes `parts`, with the tied heads and frozen parameters of the adapters they come from.

    The caller has refused adapters with parameters in full or rows of embeddings.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        ValueError: with the title of `problems`, if `read` would refuse the new files.
    """
    tied = {key: head for alone in each for key, head in alone.tied.items()}
    frozen = {name: x for alone in each for name, x in alone.contents.frozen.items()}
    tensors = make_tensors(parts, tied) | make_frozen_tensors(frozen)
    _read(as_files(fields, tensors, argument), problems)
    write(out, "out", fields, tensors)


def _read(files: Files, problems: Problems) -> Alone:
    adapter = sort_tensors(files, problems)
    refuse_biases(adapter, problems)
    found = assign_parameters(adapter, None, "", problems)
    values = files.values(found, problems)
    problems.stop()
    found = fill(found, values)
    shared = find_twins(found.parts)
    tables = [x for x in found.parts if x.kind == "embedding"]
    tied = {x.key: shared[x.name].key for x in tables if x.name in shared}
    own = [x for x in found.parts if x.kind == "embedding" or x.name not in shared]
    return Alone(adapter, found._replace(parts=own), tied)
