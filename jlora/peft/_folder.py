"""PEFT's files, read for a checkpoint: its tensors take the place of a base tree."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._checkpoint import refuse
from ._config import LIMIT, problems
from ._file import read_header
from ._json import CONFIG, TENSORS, Source, brief, read_json, shown
from ._parts import Part, orientations
from ._plan import HEADS, PREFIX, is_saved
from ._renaming import Renaming, renaming
from ._select import ends, idle, rank_of, scale_of, selects
from ._tensors import Pairs, may_tie, read_tensors

Shapes = Mapping[str, tuple[int, ...]]


class Folder(NamedTuple):
    """An adapter in PEFT's files.

    Attributes:
        fields: its configuration.
        names: from its names to the checkpoint's.
        parts: A and B of each parameter.
        full: parameters that are replaced.
        frozen: parameters that the checkpoint must have just so.
    """

    fields: dict[str, Any]
    names: Renaming
    parts: list[Part]
    full: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]


def from_folder(source: Source, shapes: Shapes) -> Folder:
    """Reads all of an adapter for a checkpoint of the tensors `shapes`.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged, or do not fit the checkpoint or one another.
    """
    fields = read_json(source, CONFIG, LIMIT)
    header = read_header(source)
    refuse(problems(fields))
    wrong: list[str] = []
    pairs, full, frozen = read_tensors(source, header, fields, wrong)
    wanted = [*full, *(name for place in pairs for name in _parameters(fields, place.module))]
    names = renaming(wanted, shapes)
    own = {back: s for name, s in shapes.items() if (back := names.back(name)) is not None}
    parts = [p for group in _groups(pairs) for p in _parts(fields, group, own, wrong)]
    modules = {place.module for place in pairs}
    missing = _missing(fields, {p.name for p in parts}, modules, set(full), own)
    strange = [part.name for part in parts if part.name not in own]
    if missing and strange:
        wrong.append(
            f"{shown(strange[0])}: in the adapter, but not in the checkpoint, whose names differ; "
            "save both by the same release of `transformers`"
        )
    wrong += missing
    keys = [_key(fields, part) for part in parts]
    known = [n.removesuffix(".weight") for n, shape in own.items() if len(shape) > 1]
    wrong += idle(fields, keys, known, "the checkpoint")
    wrong += _unsaved(fields, full)
    refuse(wrong)
    return Folder(fields, names, parts, full, frozen)


def _groups(pairs: Pairs) -> list[Pairs]:
    """The pairs of each module: more than one where its parameters are adapted one by one."""
    by_module = itertools.groupby(sorted(pairs), key=lambda place: place.module)
    return [{key: pairs[key] for key in keys} for _, keys in by_module]


def _targets(fields: Mapping[str, Any], module: str) -> list[str]:
    """The parameters of `module` that `target_parameters` names, if it is not selected whole."""
    if selects(fields, module):
        return []
    keys = (f"{module}.{t.rpartition('.')[2]}" for t in fields.get("target_parameters") or [])
    found = dict.fromkeys(keys)
    return [k for k in found if any(ends(k, t) for t in fields["target_parameters"])]


def _parameters(fields: Mapping[str, Any], module: str) -> list[str]:
    return _targets(fields, module) or [f"{module}.weight"]


def _parts(fields: Mapping[str, Any], group: Pairs, shapes: Shapes, wrong: list[str]) -> list[Part]:
    """The parts of one module."""
    [module] = {module for module, *_ in group}
    targets = [name for name in _targets(fields, module) if name in shapes]
    if targets:
        return _of_parameters(fields, module, targets, list(group.values()), shapes, wrong)
    parts = []
    for (_, depth, table), sides in group.items():
        kind = "embedding" if table else "linear" if sides["A"].ndim == 2 else "conv"
        part = _part(fields, f"{module}.weight", kind, sides, module)
        rank = rank_of(fields, module)
        if depth or len(group) > 1:
            wrong.append(f"{shown(PREFIX + module)}: adapted more than once")
        elif part.a.shape[0] != rank:
            wrong.append(
                f"{shown(PREFIX + module)}: expected rank {rank} by {CONFIG}, got an A of shape "
                f"{part.a.shape}"
            )
        elif is_saved(fields, module) or not (selects(fields, module) or may_tie(fields, module)):
            wrong.append(f"{shown(PREFIX + module)}: unexpected; {CONFIG} does not select it")
        parts.append(part)
    return parts


def _part(
    fields: Mapping[str, Any], name: str, kind: str, sides: Mapping[str, np.ndarray], key: str
) -> Part:
    return Part(name, kind, sides["A"], sides["B"], scale_of(fields, key))


def _of_parameters(
    fields: Mapping[str, Any],
    module: str,
    targets: list[str],
    pairs: list[dict[str, np.ndarray]],
    shapes: Shapes,
    wrong: list[str],
) -> list[Part]:
    """The parts of parameters that the keys do not name, told apart by their shapes."""
    fitting = []
    few = len(targets) == len(pairs) <= 6  # as there are n! ways
    for order in itertools.permutations(targets) if few else ():
        parts = [_wrapped(fields, n, x, shapes) for n, x in zip(order, pairs, strict=True)]
        if all(_fits(fields, p, shapes[p.name]) for p in parts):
            fitting.append(parts)
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{name} {shapes[name]}" for name in targets)
    got = ", ".join(f"A {x['A'].shape} with B {x['B'].shape}" for x in pairs)
    what = "may be those of either of" if fitting else "are not those of"
    wrong.append(f"{shown(PREFIX + module)}: {got} {what} {listed}")
    return []


def _wrapped(
    fields: Mapping[str, Any], name: str, sides: Mapping[str, np.ndarray], shapes: Shapes
) -> Part:
    kind = "experts" if len(shapes[name]) == 3 else "linear"
    part = _part(fields, name, kind, sides, name)
    return part if kind == "experts" else part._replace(transposed=False)


def _fits(fields: Mapping[str, Any], part: Part, shape: tuple[int, ...]) -> bool:
    count = shape[0] if part.kind == "experts" else 1
    return bool(orientations(part, shape)) and part.a.shape[0] == count * rank_of(fields, part.name)


def _key(fields: Mapping[str, Any], part: Part) -> str:
    """What patterns match: the parameter where it was chosen by name, else the module."""
    module = part.name.rpartition(".")[0]
    return part.name if part.name in _targets(fields, module) else module


def _missing(
    fields: Mapping[str, Any], adapted: set[str], modules: set[str], full: set[str], shapes: Shapes
) -> list[str]:
    """What the configuration selects of the checkpoint and the files lack."""
    found = []
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        saved, bias = is_saved(fields, module), fields.get("bias", "none")
        if saved or (
            parameter == "bias"
            and len(shape) == 1
            and (bias == "all" or (bias == "lora_only" and module in modules))
        ):
            lost = name not in full
        elif parameter == "weight" and len(shape) > 1 and selects(fields, module):
            lost = module not in modules
        else:
            targeted = any(ends(name, t) for t in fields.get("target_parameters") or [])
            lost = targeted and len(shape) > 1 and module not in modules and name not in adapted
        if lost:
            found.append(f"{shown(name)}: selected by {CONFIG}, but missing in {TENSORS}")
    return found


def _unsaved(fields: Mapping[str, Any], full: Mapping[str, np.ndarray]) -> list[str]:
    """The entries of `modules_to_save` that no tensor is of."""
    return [
        f"modules_to_save: {brief(name)} names none of the adapter's tensors"
        for name in fields.get("modules_to_save") or []
        if name not in HEADS
        and not any(is_saved({"modules_to_save": [name]}, k.rpartition(".")[0]) for k in full)
    ]
