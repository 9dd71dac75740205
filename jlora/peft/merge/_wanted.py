"""What an adapter has for the parameters of a model: all is checked before a value is read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ..._adapters import is_node, weight_shape
from ..._tree import adapter_leaves, nest
from ..._types import PyTree
from .._checkpoint import Checkpoint
from .._file import COUNT, COUNTS, DTYPES, Source, show
from .._problems import Problems
from ..adapter._contents import Adapter, Part, explain_resized, sort_tensors
from ..adapter._files import fill, open_files
from ..adapter._parameters import assign_parameters, list_missing, matrix, names_of, orientations
from ..adapter._tokens import Tokens, list_unequal, misfits
from ..adapter._tree import arrange
from ..names._convert import split_weight
from ..names._names import Name
from ._renaming import Views, find_views, shapes_of, tensor_of
from ._ties import list_absent, list_untied, list_untied_heads, separate_heads

T = TypeVar("T")


class Wanted(NamedTuple):
    """What an adapter has for the parameters of the model, by their names there.

    Attributes:
        parts: A and B.
        full: what replaces a parameter.
        rows: what replaces rows of an embedding.
        frozen: what a parameter must be.
        biases: what is added to a bias, and its scale.
        flag: `fan_in_fan_out`.
    """

    parts: list[Part]
    full: dict[str, Any]
    rows: dict[str, Tokens]
    frozen: dict[str, Any]
    biases: dict[str, tuple[Any, float]]
    flag: bool = False


def read_wanted(
    checkpoint: Checkpoint,
    adapter: str | os.PathLike[str] | PyTree,
    names: Sequence[Name] | None,
    problems: Problems,
) -> tuple[Views, Wanted]:
    """Reads a PEFT folder, or a tree with `names`, and finds its parameters in the checkpoint.

    Raises:
        ValueError: if the adapter does not fit the checkpoint, with all that is wrong.
    """
    if isinstance(adapter, str | os.PathLike):
        if names is not None:
            raise ValueError(
                "`names` is for an adapter tree; PEFT's files name the modules themselves. "
                "Leave it out."
            )
        model, wanted = _in_files(checkpoint, Source(Path(adapter), "adapter"), problems)
    elif names is None:
        raise ValueError(
            "`names` must say what the leaves of an adapter tree are called in PyTorch, by a "
            "table such as jlora.peft.LLAMA; got None."
        )
    else:
        model, wanted = _in_tree(checkpoint, adapter, names, problems)
    problems.found += list_absent(checkpoint, model, wanted.parts, wanted.full | wanted.frozen)
    return model, wanted


def _in_tree(
    checkpoint: Checkpoint, adapter: PyTree, names: Sequence[Name], problems: Problems
) -> tuple[Views, Wanted]:
    found = adapter_leaves(adapter)
    shapes = {path: weight_shape(x) if is_node(x) else x.shape for path, x in found.items()}
    base = nest({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
    tree = arrange(base, adapter, names)
    pairs = (
        zip(leaf.parameters, split_weight(leaf, found[leaf.path]), strict=True)
        for leaf in tree.full
    )
    full = {name: x for each in pairs for name, x in each}
    rows = {f"{x.module}.weight": x for x in tree.tokens}
    wanted = Wanted(tree.parts, full, rows, {}, {})
    model = find_views([*(part.name for part in wanted.parts), *full, *rows], checkpoint.shapes)[0]
    _check(checkpoint, model, wanted, problems)
    problems.stop()
    return model, wanted


def _in_files(checkpoint: Checkpoint, source: Source, problems: Problems) -> tuple[Views, Wanted]:
    files = open_files(source)
    adapter = sort_tensors(files, problems)
    choices = find_views([*adapter.full, *adapter.tokens, *names_of(adapter)], checkpoint.shapes)
    model = next((v for v in choices if not list_missing(adapter, shapes_of(v))), choices[0])
    parts = assign_parameters(adapter, shapes_of(model), "the checkpoint", problems)
    rows, heads = separate_heads(checkpoint, model, adapter.tokens)
    full, biases = _with_tied_biases(adapter.full, model), _biases(adapter, model, problems)
    flag = bool(adapter.fields.get("fan_in_fan_out"))
    wanted = Wanted(parts, full, rows, adapter.frozen, biases, flag)
    problems.found += list_untied_heads(checkpoint, adapter)
    strange = [part.name for part in parts if part.name not in model]
    if problems.found and strange:
        problems.found.insert(
            0,
            f"{show(strange[0])}: in the adapter, but not in the checkpoint, whose names differ; "
            "save the base under the names that the model has in memory, in `transformers` 5 by "
            "save_pretrained(..., save_original_format=False)",
        )
    _check(checkpoint, model, wanted, problems)
    problems.stop()
    problems.found += list_absent(checkpoint, model, parts, full | adapter.frozen)
    values = files.values((wanted, heads), problems)
    problems.stop(*list_unequal(((x.v, y.v, False) for x, y in heads), values))
    wanted = fill(wanted, values)
    problems.found += list_untied(checkpoint, model, wanted.parts, wanted.full)
    return model, wanted


def _with_tied_biases(full: dict[str, T], model: Views) -> dict[str, T]:
    """`full` with the bias of BERT's decoder as that of its module, whose tensor it shares."""
    found = dict(full)
    for name in full.keys() - model.keys():
        home = name.removesuffix(".decoder.bias") + ".bias"
        if name.endswith(".decoder.bias") and home in model and home not in full:
            found[home] = found.pop(name)
    return found


def _biases(adapter: Adapter, model: Views, problems: Problems) -> dict[str, tuple[Any, float]]:
    """What is added to biases, and its scale."""
    found = {}
    for name, x in adapter.biases.items():
        module = name.rpartition(".")[0]
        if module not in adapter.parts or name not in model or model[name].shape != x.shape:
            there = f"of shape {model[name].shape}" if name in model else "none"
            why = "is to be added to the bias of an adapted module, of which the checkpoint has"
            problems.add(x.key, f"of shape {x.shape}, {why} {there}")
        elif name in adapter.full:
            problems.add(x.key, "added to a bias that is replaced")
        else:
            found[name] = x, adapter.selection.scale(module)
    return found


def _check(checkpoint: Checkpoint, model: Views, wanted: Wanted, problems: Problems) -> None:
    """Adds what the checkpoint has in another shape, or in a dtype that cannot be changed."""
    for name, x in wanted.rows.items():
        if (view := model.get(name)) is None or len(view.shape) != 2:
            problems.add(name, "has rows in the adapter, and is no table of the checkpoint")
        else:
            problems.found += misfits(x, view.shape)
    for part in wanted.parts:
        if (view := model.get(part.name)) and not orientations(part, view.shape):
            why = f"expected a {part.kind} weight of shape {view.shape}, but A {part.a.shape} and B"
            problems.add(part.name, f"{why} {part.b.shape} make {matrix(part)}")
    for name in [*wanted.rows, *(part.name for part in wanted.parts)]:
        if odd := sorted(_dtypes(checkpoint, model, name) - DTYPES.keys()):
            legal = ", ".join(DTYPES)
            why = f"of dtype {odd[0]}; expected one of {legal}. Dequantize the checkpoint first"
            problems.add(name, why)
    for name, x in (wanted.full | wanted.frozen).items():
        if (view := model.get(name)) is None:
            continue
        [dtype, *_] = _dtypes(checkpoint, model, name)
        known = COUNTS if name.endswith(COUNT) else DTYPES
        if why := explain_resized(name, x.shape, view.shape):
            problems.found.append(why)
        elif view.shape != x.shape or dtype not in known:
            why = f"expected {dtype} of shape {view.shape}, got {x.shape} in the adapter"
            problems.add(name, why)
        elif len(view.pieces) > 1:
            problems.add(name, "in full, but the checkpoint has it in parts")


def _dtypes(checkpoint: Checkpoint, model: Views, name: str) -> set[str]:
    """The dtypes of the tensors of a parameter; none if the checkpoint has none."""
    pieces = model[name].pieces if name in model else ()
    return {checkpoint.entry(piece.tensor).dtype for piece in pieces}


def check_frozen(checkpoint: Checkpoint, model: Views, wanted: Wanted, problems: Problems) -> None:
    """Adds the tensors of which an adapter has other values, though it does not change them."""
    for name, x in wanted.frozen.items():
        if name in model and not _holds(checkpoint, tensor := tensor_of(model, name), x):
            why = "a trained embedding under an adapter is not supported"
            problems.add(tensor, f"the adapter holds other values of it; {why}")


def _holds(checkpoint: Checkpoint, name: str, value: np.ndarray) -> bool:
    """Whether a tensor has just these values."""
    dtype, at = DTYPES[checkpoint.entry(name).dtype], 0
    for piece in checkpoint.pieces(name):
        own = np.frombuffer(piece, dtype)
        if not np.array_equal(own, value.reshape(-1)[at : at + own.size].astype(dtype)):
            return False
        at += own.size
    return True
