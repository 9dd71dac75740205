"""An adapter without its base: the shapes that its file itself implies, and PyTorch's names."""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from .._tree import adapter_leaves, nest
from .._types import PyTree
from ..adapters import LowRank
from ._config import problems, read_config
from ._file import DTYPES, Entry, read_header, reader
from ._json import TENSORS, Source, opened
from ._load import load_onto
from ._names import Name, resolve
from ._plan import PREFIX, SAVED_BY_NAME, is_saved
from ._select import ends, rank_of, selects
from ._tensors import may_tie

A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
BASE = ".base_layer"
COPY = BASE + ".weight"
KINDS = 100  # of parameter names and numbers of axes, as matching takes kinds × tensors


class _Part(NamedTuple):
    """One parameter of the model that the file implies: what `Name` says, and its shape."""

    module: str
    parameter: str
    axes: str
    shape: tuple[int, ...]
    tied: str | None = None

    @property
    def path(self) -> tuple[str, str]:
        """Where it lies in the tree that is made up for it."""
        return self.module, f"{self.parameter}:{self.axes}"

    @property
    def name(self) -> Name:
        """The row for all of its kind."""
        module = re.escape(self.module) if self.tied else ".*"
        row = f"({module})/{re.escape(self.path[1])}"
        return Name(row, r"\1", self.axes, self.parameter, tied=self.tied)


class Alone(NamedTuple):
    """An adapter with the shapes and the names that its file implies."""

    base: PyTree
    adapter: PyTree
    names: list[Name]

    @property
    def leaves(self) -> dict[str, Any]:
        """The leaves by PyTorch's names: of modules, of parameters in full and of experts."""
        return {_label(path, x): x for path, x in adapter_leaves(self.adapter).items()}


def load_alone(dir: str | os.PathLike[str]) -> Alone:
    """Reads an adapter for a look at it, when the model is not at hand.

    The checks are those of `load`; only whether it fits its model, and whether all that its
    configuration names is there, cannot be known. Axes are those of
    PyTorch's weights. Where several parameters of one module of experts are adapted, the file does
    not say which is which: they are taken in the order of `target_parameters` in which their ranks
    and numbers of experts agree.

    Args:
        dir: the adapter's folder.

    Returns:
        The adapter. A head that is tied to an embedding has no leaf of its own.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: as `load`.
    """
    folder = Path(dir)
    source = Source(folder)
    fields, header = read_config(folder), read_header(source)
    entries = header.entries
    if wrong := problems(fields):
        raise ValueError(f"`dir`: the adapter in {folder} cannot be read:\n  " + "\n  ".join(wrong))
    if odd := [key for key in entries if set(key) & set("{}/\\") or not key.isprintable()]:
        raise ValueError(f"`dir`: the adapter in {folder} has keys that name no module: {odd[:9]}.")
    fields = _with_twins(fields, entries)
    with opened(source, TENSORS) as (file, _):
        parts = list(_parts(fields, entries, reader(file, header)))
    base = nest({part.path: jax.ShapeDtypeStruct(part.shape, np.float32) for part in parts})
    rows = [part.name for part in sorted(parts, key=lambda part: part.tied is None)]
    names = list(dict.fromkeys(rows)) or [Name("", "", "o")]
    if len(names) > KINDS:
        raise ValueError(f"`dir`: {folder} has {len(names)} kinds of tensors; expected few.")
    adapter = load_onto(folder, fields, header, resolve(base, names), names, None)
    return Alone(base, adapter, names)


def _with_twins(fields: dict[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """`fields` that save by name what PEFT saves because it is tied to what it saves by name."""
    weights = [key.removeprefix(PREFIX) for key in entries if key.endswith(".weight")]
    modules = [key.removesuffix(".weight") for key in weights]
    more = [m for m in modules if may_tie(fields, m) and not is_saved(fields, m)]
    return fields | {"modules_to_save": [*(fields.get("modules_to_save") or []), *more]}


def with_copies(dir: str | os.PathLike[str], alone: Alone) -> PyTree:
    """The base of `alone` with the frozen embeddings and heads that the file holds, for `save`."""
    source = Source(Path(dir))
    header = read_header(source)
    with opened(source, TENSORS) as (file, _):
        read = reader(file, header)

        def value(path: tuple[Any, ...], x: Any) -> Any:
            key = f"{PREFIX}{path[0].key}{COPY}"
            return read(key) if key in header.entries else x

        return jax.tree_util.tree_map_with_path(value, alone.base)


def _label(path: tuple[str, ...], x: Any) -> str:
    module, parameter = path[0], path[1].rpartition(":")[0]
    return module if isinstance(x, LowRank) and parameter == "weight" else f"{module}.{parameter}"


def _parts(
    fields: Mapping[str, Any], entries: Mapping[str, Entry], read: Callable[[str], np.ndarray]
) -> Iterator[_Part]:
    shapes = {k.removeprefix(PREFIX): e.shape for k, e in entries.items() if k.startswith(PREFIX)}
    nested: dict[str, list[str]] = {}
    for key in shapes:
        if key.endswith(A):
            wrapper = key.removesuffix(A)
            nested.setdefault(_unwrapped(wrapper), []).append(wrapper)
    heads = _heads(fields, list(nested), shapes)
    tied = {head for m, head in heads.items() if _same(entries, read, m, head)}
    for module, wrappers in nested.items():
        if parameters := _parameters(fields, module):
            yield from _experts(fields, module, wrappers, parameters, shapes)
        elif module in wrappers and module not in tied:
            a, b = shapes[module + A], _beside(shapes, module + A, module + B)
            yield _Part(module, "weight", _axes(len(a)), (b[0], *a[1:]))
    for key, shape in shapes.items():
        module, _, parameter = key.rpartition(".")
        if key.endswith(EMBEDDING_A):
            b = _beside(shapes, key, module + EMBEDDING_B)
            yield _Part(module, "weight", "vo", (shape[-1], b[0]), heads.get(module))
        elif shape and (is_saved(fields, module) or _is_bias(fields, parameter)):
            yield _Part(module.removesuffix(BASE), parameter, _axes(len(shape)), shape)


def _heads(
    fields: Mapping[str, Any], modules: Sequence[str], shapes: Mapping[str, Any]
) -> dict[str, str]:
    """The heads that may share the weight of an embedding, by the embedding."""
    tying = bool(fields.get("ensure_weight_tying"))
    unselected = [m for m in modules if tying and not selects(fields, m)]
    copied = [m for m in modules if m + COPY in shapes]
    embeddings = [k.removesuffix(EMBEDDING_A) for k in shapes if k.endswith(EMBEDDING_A)]
    named = {m: m.rpartition(".")[2] in SAVED_BY_NAME for m in embeddings}
    heads = {m: unselected if named[m] else copied if m + COPY in shapes else [] for m in named}
    return {m: found[0] for m, found in heads.items() if found}


def _same(entries: Mapping[str, Entry], read: Callable[[str], np.ndarray], *modules: str) -> bool:
    """Whether the frozen weights of two modules, where the file holds both, are one weight."""
    keys = [f"{PREFIX}{module}{COPY}" for module in modules]
    if not all(key in entries and entries[key].dtype in DTYPES for key in keys):
        return True
    first, second = (read(key) for key in keys)
    return first.tobytes() == second.tobytes()


def _is_bias(fields: Mapping[str, Any], parameter: str) -> bool:
    return parameter == "bias" and fields.get("bias", "none") != "none"


def _axes(ndim: int) -> str:
    """Those of PyTorch: outputs, inputs, window."""
    return ("oi" + "k" * (ndim - 2))[:ndim]


def _unwrapped(wrapper: str) -> str:
    while wrapper.endswith(BASE):
        wrapper = wrapper.removesuffix(BASE)
    return wrapper


def _parameters(fields: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of `module` that `target_parameters` names, where it is of experts."""
    if selects(fields, module):
        return []
    targets = [t.rpartition(".") for t in fields.get("target_parameters") or []]
    return [name for parent, _, name in targets if not parent or ends(module, parent)]


def _experts(
    fields: Mapping[str, Any],
    module: str,
    wrappers: list[str],
    parameters: list[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[_Part]:
    wrappers = sorted(wrappers, key=len, reverse=True)  # the first parameter is wrapped innermost
    pairs = [(shapes[w + A], _beside(shapes, w + A, w + B)) for w in wrappers]
    for order in itertools.permutations(parameters[:6], len(wrappers)):
        ranks = [rank_of(fields, f"{module}.{p}") for p in order]
        counts = {(a[0] / r, b[1] / r) for (a, b), r in zip(pairs, ranks, strict=True)}
        if len({n for pair in counts for n in pair}) == 1:
            for (a, b), rank, parameter in zip(pairs, ranks, order, strict=True):
                yield _Part(module, parameter, "eoi", (a[0] // rank, b[0], a[1]))
            return
    raise ValueError(
        f"`dir`: the shapes of {module}'s A and B agree with no order of the parameters "
        f"{', '.join(parameters)} and their ranks."
    )


def _beside(shapes: Mapping[str, tuple[int, ...]], a: str, b: str) -> tuple[int, ...]:
    """The shape of B, where A and B are there and at least matrices."""
    if b not in shapes:
        raise ValueError(f"`dir`: {PREFIX}{b}: missing, though {PREFIX}{a} is there.")
    for key in (a, b):
        if len(shapes[key]) < 2:
            raise ValueError(f"`dir`: {PREFIX}{key}: expected a matrix, got shape {shapes[key]}.")
    return shapes[b]
