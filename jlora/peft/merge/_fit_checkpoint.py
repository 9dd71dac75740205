"""Matches an adapter to the tensors of a checkpoint."""

import os
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ..._adapters import is_node, weight_shape
from ..._errors import InputError, Problem, list_few, show
from ..._tree import adapter_leaves, nest
from ..._types import PyTree
from .._changed import with_values
from .._checkpoint import Checkpoint
from .._file import COUNT, COUNTS, DTYPES
from .._problems import About
from .._recognized import CONFIG
from ..adapter._arranged import arrange
from ..adapter._files import Files
from ..adapter._fits import list_misfits, list_misfits_in_full
from ..adapter._open import open_adapter
from ..adapter._parameters import (
    Model,
    assign_parameters,
    list_missing,
    list_unmatched,
)
from ..adapter._parts import Headers, Parameters, T, Values, fill, list_unequal
from ..adapter._sorted import Adapter, sort_tensors
from ..names._names import Name
from ..places._declared import find_transposed
from ..places._find import Pairs, find
from ..places._views import Places, module_of
from ._edits import orient, orient_experts
from ._target import Target, add_head, fit_vocabulary
from ._ties import (
    Shared,
    find_shared,
    list_absent,
    list_untied_heads,
    separate_heads,
    settle_ties,
)

_SHOWN = 9  # names in a warning


class Remarks(NamedTuple):
    """What else is found while an adapter is matched.

    Attributes:
        about: what errors say of the adapter.
        problems: those with its values.
        unused: names in the configuration that match nothing, which PEFT accepts.
        config: what the file with the configuration is called.
    """

    about: About
    problems: Sequence[Problem] = ()
    unused: Sequence[str] = ()
    config: str = CONFIG


def match_to_checkpoint(
    checkpoint: Checkpoint,
    adapter: str | os.PathLike[str] | PyTree,
    names: Sequence[Name] | None,
    about: About,
    ignore: Collection[str] = (),
    prefix: str | None = None,
    renamed: Pairs = (),
) -> tuple[Target, Values, Shared, Remarks]:
    """Reads a PEFT folder, or a tree with `names`, and finds its parameters in the checkpoint.

    Returns:
        The checkpoint with all that the adapter adds to it, the contents of the adapter, what the
        model may read twice of the weights that it changes, and what else is found.

    Raises:
        ValueError: if the adapter does not fit the checkpoint, with all problems.
    """
    if isinstance(adapter, str | os.PathLike):
        if names is not None:
            raise InputError(
                "names", "is for an adapter tree; PEFT's files have PyTorch's names. Leave it out."
            )
        modules = {module_of(name) for name in checkpoint.where}
        files = open_adapter(adapter, "adapter", ignore, prefix, modules)
        target, own, shared, found = _match_files(checkpoint, files, about, renamed)
    elif names is None:
        raise InputError(
            "names",
            "must be a name table for the adapter tree, such as jlora.peft.TABLES['llama']; got "
            "None.",
        )
    else:
        target, own, shared, found = _match_tree(checkpoint, adapter, names, about, renamed)
    problems = [*found.problems, *list_absent(*target, own)]
    return target, own, shared, found._replace(problems=problems)


def _match_tree(
    checkpoint: Checkpoint,
    adapter: PyTree,
    names: Sequence[Name],
    about: About,
    renamed: Pairs,
) -> tuple[Target, Values, Shared, Remarks]:
    nodes = adapter_leaves(adapter)
    shapes = {path: weight_shape(x) if is_node(x) else x.shape for path, x in nodes.items()}
    base = nest({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
    tree = arrange(base, adapter, names, for_peft=False)
    found = Parameters(tree.parts, tree.whole)
    places = next(find(found.changed, checkpoint.shapes, checkpoint.config, renamed))
    target = Target(checkpoint, places)
    ties, shared, problems = find_shared(target, found, {})
    if ties and any(ties.tensor(name, places) in ties.sources for name in found.changed):
        target, found, shared, uneven = settle_ties(
            target, found, ties, shared, lambda _: {}, lambda _: True
        )
        problems += uneven
    target, unsized = fit_vocabulary(target, found)
    # The names that were given say which way round experts lie; here only shapes are left to ask.
    parts = orient_experts(found.parts, target.model.shapes, frozenset())
    found = found._replace(parts=parts)
    about.stop([*problems, *unsized, *_list_misfits(target, found)])
    return target, found, shared, Remarks(about)


def _match_files(
    checkpoint: Checkpoint, files: Files, about: About, renamed: Pairs
) -> tuple[Target, Values, Shared, Remarks]:
    adapter, about, problems = sort_tensors(files, about, is_merged=True)
    is_transposed = bool(files.fields.get("fan_in_fan_out"))
    models = find(adapter.names, checkpoint.shapes, checkpoint.config, renamed)
    tried = list(models)
    old = next((x for x in tried if not list_missing(adapter, x.shapes)), tried[0])
    missing, unused = _sort_missing(adapter, old)
    described = Model(old.shapes, "the checkpoint")
    found, unassigned = assign_parameters(adapter, described)
    unused += list_unmatched(adapter, found, described)
    target = Target(checkpoint, old)
    ties, shared, untied = find_shared(target, found, adapter.fields)
    problems += [*missing, *unassigned, *untied, *list_untied_heads(checkpoint, shared, adapter)]
    target, found, shared, uneven = settle_ties(
        target, found, ties, shared, files.read, adapter.roles.saves
    )
    target, unsized = fit_vocabulary(target, found)
    target = add_head(target, found, adapter)
    checkpoint, model = target
    transposed = find_transposed(checkpoint.config)
    parts = orient(found.parts, model.shapes, transposed, is_transposed)
    full, heads = separate_heads(model, shared, found)
    found = found._replace(parts=parts, full=full)
    problems += [*unsized, *_list_misfits(target, found), *_list_odd_biases(model, found)]
    # What is absent is the likely cause of the others.
    about.stop([*list_absent(checkpoint, model, found), *problems])
    values, problems = files.values((found, heads))
    unequal = list_unequal(((x.x, y.x, False) for x, y in heads), values) if values else []
    about.stop([*problems, *unequal])
    found = fill(found, values)
    names = [n for n in found.frozen if n in old and old[n].shape != model[n].shape]
    values = {model.tensor(name): found.frozen[name].x for name in names}
    target = target._replace(checkpoint=with_values(checkpoint, values))
    return target, found, shared, Remarks(about, uneven, unused, files.config)


def _sort_missing(adapter: Adapter, model: Places) -> tuple[list[Problem], list[str]]:
    """Lists what the configuration selects but the file lacks: problems, and what stays as it is.

    That is a problem in layers of which the adapter has some modules. Elsewhere the adapted model
    may have lacked it, such as an old head or a pooler: it stays as it is, as in PEFT.
    """
    adapted = {_find_layers(name) for name in adapter.names if name in model} - {None}
    missing = list_missing(adapter, model.shapes)
    problems = [x for x in missing if _find_layers(x.where) in adapted]
    left = [show(x.where) for x in missing if _find_layers(x.where) not in adapted]
    what = f"selects {list_few(left, _SHOWN)}, which the adapter lacks; they stay as they are"
    return problems, [what] * bool(left)


def _find_layers(name: str) -> str | None:
    """Returns the components before the first number in a name; None without a number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if at is None else ".".join(parts[:at])


def _list_misfits(target: Target, found: Parameters[T]) -> list[Problem]:
    """Lists the parameters whose shape or dtype in the checkpoint does not fit."""
    checkpoint, model = target
    problems = list[Problem]()
    for x in (*found.full.values(), *found.frozen.values()):
        view = model.get(x.name)
        if x.rows and not (view and view.is_tensor and len(view.shape) == 2):
            why = "has rows in the adapter, but is not an embedding in the checkpoint"
            problems.append(Problem(x.name, why))
        elif view:
            problems += list_misfits_in_full(x, view.shape, checkpoint.entry(view.tensor).dtype)
    for part in found.parts:
        if view := model.get(part.name):
            problems += list_misfits(part, view.shape)
    for name in dict.fromkeys([*found.changed, *found.frozen, *found.biases]):
        pieces = model[name].pieces if name in model else ()
        known = COUNTS if name.endswith(COUNT) else DTYPES
        if odd := {checkpoint.entry(x.tensor).dtype for x in pieces} - known.keys():
            remedy = "" if known is COUNTS else "Dequantize the checkpoint first."
            why = f"of dtype {min(odd)}; expected one of {', '.join(known)}"
            problems.append(Problem(name, why, remedy))
    return problems


def _list_odd_biases(model: Places, found: Headers) -> Iterator[Problem]:
    """Lists the tensors of `lora_bias` that the checkpoint has no bias for."""
    adapted = {part.key for part in found.parts}
    for name, (x, _) in found.biases.items():
        view = model.get(name)
        if name in found.full:
            yield Problem(x.key, "added to a bias that the adapter also replaces")
        elif name.removesuffix(".bias") not in adapted:
            yield Problem(x.key, "added to the bias of a module that has no A and B")
        elif view is None or view.shape != x.shape:
            there = f"a bias of shape {view.shape}" if view else "no bias"
            why = f"has shape {x.shape}, but the module in the checkpoint has {there}"
            yield Problem(x.key, why)


def list_changed(target: Target, found: Values) -> Iterator[Problem]:
    """Lists the frozen tensors of an adapter whose values differ from the checkpoint's."""
    checkpoint, model = target
    for name, x in found.frozen.items():
        view = model.get(name)
        if view and not (view.is_tensor and _holds(checkpoint, view.tensor, x.x)):
            why = (
                "has other values than the adapter's copy of the base: `path` is another model, "
                "or one with this adapter merged already"
            )
            yield Problem(view.tensor, why)


def _holds(checkpoint: Checkpoint, name: str, value: np.ndarray) -> bool:
    """Whether a tensor has exactly these values."""
    dtype = DTYPES[checkpoint.entry(name).dtype]
    at = 0
    for piece in checkpoint.pieces(name):
        own = np.frombuffer(piece, dtype)
        if not np.array_equal(own, value.reshape(-1)[at : at + own.size].astype(dtype)):
            return False
        at += own.size
    return True
