"""What an adapter changes in a checkpoint, tensor by tensor: all is checked before one is read."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ..._adapters import is_node, weight_shape
from ..._tree import adapter_leaves, nest
from ..._types import PyTree
from .._checkpoint import REFUSAL, Checkpoint, refuse
from .._file import COUNT, COUNTS, DTYPES, Source, Tensor, shown
from .._problems import Problems
from ..adapter._contents import Adapter, Part, resized, sort_tensors
from ..adapter._files import open_files
from ..adapter._parameters import assign_parameters, matrix, missing, names_of, orientations
from ..adapter._tokens import Tokens, misfits, unlike
from ..adapter._tree import arrange
from ..names._convert import weights
from ..names._names import Name
from ._orientation import Orientation, Sum, as_sum
from ._renaming import Piece, View, Views, shapes_of, views
from ._ties import absent, not_there, untied, untied_heads, with_heads

T = TypeVar("T")


class Changes(NamedTuple):
    """What is to be done to the tensors of a checkpoint.

    Attributes:
        sums: what is added to a tensor.
        full: what replaces a tensor.
        rows: what replaces rows of a tensor.
        frozen: what a tensor must be.
    """

    sums: dict[str, Sum]
    full: dict[str, np.ndarray]
    rows: dict[str, Tokens]
    frozen: dict[str, np.ndarray]


def changes(
    checkpoint: Checkpoint, adapter: str | os.PathLike[str] | PyTree, names: Sequence[Name] | None
) -> Changes:
    """The changes by a PEFT folder, or by a tree with `names`.

    Raises:
        ValueError: if the adapter does not fit the checkpoint, with all that is wrong.
    """
    if isinstance(adapter, str | os.PathLike):
        if names is not None:
            raise ValueError(
                "`names` is for an adapter tree; PEFT's files name the modules themselves. "
                "Leave it out."
            )
        return _by_files(checkpoint, Source(Path(adapter), "adapter"))
    if names is None:
        raise ValueError(
            "`names` must say what the leaves of an adapter tree are called in PyTorch, by a "
            "table such as jlora.peft.LLAMA; got None."
        )
    parts, full, rows = _of_tree(adapter, names)
    own = views([*(part.name for part in parts), *full, *rows], checkpoint.shapes)[0]
    wrong = _misfits(checkpoint, own, parts, full) + _misfits_of_rows(checkpoint, own, rows)
    refuse(wrong)
    parts, full, rows = _stored(own, parts, wrong), _renamed(own, full), _renamed(own, rows)
    wrong += absent(checkpoint, parts, full)
    return _made(checkpoint, parts, full, {}, False, wrong)._replace(rows=rows)


def _of_tree(
    adapter: PyTree, names: Sequence[Name]
) -> tuple[list[Part], dict[str, np.ndarray], dict[str, Tokens]]:
    """The parts of an adapter tree, its leaves in full and its rows, by PyTorch's names."""
    found = adapter_leaves(adapter)
    shapes = {path: weight_shape(x) if is_node(x) else x.shape for path, x in found.items()}
    base = nest({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
    tree = arrange(base, adapter, names)
    full = {
        name: x
        for leaf in tree.full
        for name, x in zip(leaf.parameters, weights(leaf, found[leaf.path]), strict=True)
    }
    return tree.parts, full, {f"{x.module}.weight": x for x in tree.tokens}


def _by_files(checkpoint: Checkpoint, source: Source) -> Changes:
    files, problems = open_files(source), Problems(REFUSAL)
    adapter = sort_tensors(files, problems)
    choices = views([*adapter.full, *adapter.tokens, *names_of(adapter)], checkpoint.shapes)
    own = next((v for v in choices if not missing(adapter, shapes_of(v))), choices[0])
    shapes = shapes_of(own)
    parts = assign_parameters(adapter, shapes, "the checkpoint", problems)
    full, frozen, wrong = _with_tied_biases(adapter.full, own), adapter.frozen, problems.found
    tokens, heads = with_heads(checkpoint, own, adapter.tokens)
    wrong += _misfits_of_rows(checkpoint, own, tokens) + untied_heads(checkpoint, adapter)
    strange = [part.name for part in parts if part.name not in own]
    added = _biases(adapter, own, wrong)
    if wrong and strange:
        wrong.insert(
            0,
            f"{shown(strange[0])}: in the adapter, but not in the checkpoint, whose names differ; "
            "save the base under the names that the model has in memory, in `transformers` 5 by "
            "save_pretrained(..., save_original_format=False)",
        )
    refuse(wrong + _misfits(checkpoint, own, parts, full | frozen))
    # What the checkpoint has no tensor for must be the same as something that it has.
    there = {x.shape[::-1] for part in parts if part.name in own for x in (part.a, part.b)}
    there |= {x.shape for name, x in (full | frozen).items() if name in own}
    lost = {part.name: part.a for part in parts if part.name not in own}
    lost |= {name: x for name, x in (full | frozen).items() if name not in own}
    refuse(not_there(checkpoint, [name for name, x in lost.items() if x.shape not in there]))
    rest = (*(x for x, _ in added.values()), *(x.v for x in adapter.tokens.values()))
    stored = [x for part in parts for x in part.arrays]
    found = files.values([*stored, *full.values(), *frozen.values(), *rest], problems)
    refuse(wrong or unlike(((x.v, y.v) for x, y in heads), found))
    rows = {name: x._replace(v=found[x.v.key]) for name, x in tokens.items()}
    parts = _stored(own, [part.read(found) for part in parts], wrong)
    full, frozen = ({n: found[x.key] for n, x in d.items()} for d in (full, frozen))
    full, frozen = _renamed(own, full), _renamed(own, frozen)
    wrong += absent(checkpoint, parts, full | frozen) + untied(checkpoint, parts, full)
    flag = bool(adapter.fields.get("fan_in_fan_out"))
    made = _made(checkpoint, parts, full, frozen, flag, wrong)
    problems.warn()
    one = np.ones((1, 1, 1), np.float32)
    sums = {
        own[name].pieces[0].tensor: Sum(found[x.key].reshape(1, -1, 1), one, scale)
        for name, (x, scale) in added.items()
    }
    return made._replace(sums=made.sums | sums, rows=_renamed(own, rows))


def _with_tied_biases(full: dict[str, T], own: Views) -> dict[str, T]:
    """`full` with the bias of BERT's decoder as that of its module, whose tensor it shares."""
    found = dict(full)
    for name in full.keys() - own.keys():
        home = name.removesuffix(".decoder.bias") + ".bias"
        if name.endswith(".decoder.bias") and home in own and home not in full:
            found[home] = found.pop(name)
    return found


def _biases(adapter: Adapter, own: Views, wrong: list[str]) -> dict[str, tuple[Tensor, float]]:
    """What is added to biases, and its scale; what has no place is added to `wrong`."""
    found = {}
    for name, x in adapter.biases.items():
        module = name.rpartition(".")[0]
        if module not in adapter.parts or name not in own or own[name].shape != x.shape:
            there = f"of shape {own[name].shape}" if name in own else "none"
            wrong.append(
                f"{shown(x.key)}: of shape {x.shape}, is to be added to the bias of an adapted "
                f"module, of which the checkpoint has {there}"
            )
        elif name in adapter.full:
            wrong.append(f"{shown(x.key)}: added to a bias that is replaced")
        else:
            found[name] = x, adapter.selection.scale(module)
    return found


def _renamed(own: Views, full: Mapping[str, T]) -> dict[str, T]:
    """By the checkpoint's names."""
    return {own[n].pieces[0].tensor if n in own else n: x for n, x in full.items()}


def _stored(own: Views, parts: Sequence[Part], wrong: list[str]) -> list[Part]:
    """A and B of each tensor of the checkpoint."""
    shapes = shapes_of(own)
    find, found = Orientation(parts, shapes, False), list[Part]()
    for part in parts:
        view = own.get(part.name) or View((), (Piece(part.name),))
        if view.pieces[0].expert is None:
            found.append(part._replace(name=view.pieces[0].tensor))
        elif (transposed := find.of(part, orientations(part, view.shape))) is None:
            wrong.append(_square(part.name))
        else:
            change = as_sum(part, view.shape, transposed)
            for tensor, expert, start, rows in view.pieces:
                left, right = change.left[expert, start : start + rows], change.right[expert]
                one = part._replace(name=tensor, kind="linear", a=right, b=left)
                found.append(one._replace(transposed=False))
    return found


def _made(
    checkpoint: Checkpoint,
    parts: Sequence[Part],
    full: Mapping[str, np.ndarray],
    frozen: Mapping[str, np.ndarray],
    flag: bool,
    wrong: list[str],
) -> Changes:
    shapes = checkpoint.shapes
    find, sums = Orientation(parts, shapes, flag), dict[str, Sum]()
    for part in parts:
        if part.name not in shapes:
            continue  # it is the same as one that is there
        if part.name in sums or part.name in full:
            wrong.append(f"{shown(part.name)}: changed twice by the adapter, under two names")
        if (transposed := find.of(part, orientations(part, shapes[part.name]))) is None:
            wrong.append(_square(part.name))
        else:
            sums[part.name] = as_sum(part, shapes[part.name], transposed)
    refuse(wrong)
    full, frozen = ({n: x for n, x in d.items() if n in shapes} for d in (full, frozen))
    return Changes(sums, full, {}, frozen)


def _square(name: str) -> str:
    return (
        f"{shown(name)}: is square, and nothing tells whether it is (inputs, outputs) or (outputs, "
        "inputs)"
    )


def _misfits(
    checkpoint: Checkpoint, own: Views, parts: Iterable[Part], full: Mapping[str, Any]
) -> list[str]:
    """What the checkpoint has in another shape, or in a dtype that cannot be changed."""
    wrong = []
    for part in parts:
        if (view := own.get(part.name)) is None:
            continue
        types = {checkpoint.entry(piece.tensor).dtype for piece in view.pieces}
        if not orientations(part, view.shape):
            need = f"A {part.a.shape} and B {part.b.shape} make {matrix(part)}"
            wrong.append(
                f"{shown(part.name)}: expected a {part.kind} weight of shape {view.shape}, but "
                f"{need}"
            )
        elif odd := sorted(types - DTYPES.keys()):
            wrong.append(
                f"{shown(part.name)}: of dtype {odd[0]}; expected one of "
                f"{', '.join(DTYPES)}. Dequantize the checkpoint first"
            )
    for name, x in full.items():
        if (view := own.get(name)) is None:
            continue
        dtype = checkpoint.entry(view.pieces[0].tensor).dtype
        known = COUNTS if name.endswith(COUNT) else DTYPES
        if why := resized(name, x.shape, view.shape):
            wrong.append(why)
        elif view.shape != x.shape or dtype not in known:
            wrong.append(
                f"{shown(name)}: expected {dtype} of shape {view.shape}, got {x.shape} in the "
                "adapter"
            )
        elif len(view.pieces) > 1:
            wrong.append(f"{shown(name)}: in full, but the checkpoint has it in parts")
    return wrong


def _misfits_of_rows(checkpoint: Checkpoint, own: Views, rows: Mapping[str, Tokens]) -> list[str]:
    """Rows of what the checkpoint has in another shape, or in a dtype that cannot be changed."""
    wrong = []
    for name, x in rows.items():
        if (view := own.get(name)) is None or len(view.shape) != 2:
            wrong.append(
                f"{shown(name)}: has rows in the adapter, and is no table of the checkpoint"
            )
        elif bad := misfits(x, view.shape):
            wrong += bad
        elif (dtype := checkpoint.entry(view.pieces[0].tensor).dtype) not in DTYPES:
            wrong.append(f"{shown(name)}: of dtype {dtype}; expected one of {', '.join(DTYPES)}")
    return wrong
