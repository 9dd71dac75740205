"""Assigns each A and B to a parameter, by the shapes of a tree's or a checkpoint's parameters."""

import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..._errors import Problem, show
from .._file import PREFIX, TensorInfo
from .._recognized import CONFIG, TENSORS
from ..names._kinds import EMBEDDING, EXPERTS, LINEAR, Kind
from ..places._views import Shapes
from ._fits import fit_axes, list_orientations
from ._parts import Header, Headers, Parameters, Part, T
from ._roles import Role, list_unused
from ._sorted import Adapter, may_tie


class Model(NamedTuple):
    """The model that an adapter is for.

    Attributes:
        shapes: the shapes of all its parameters, by the adapter's names; None if unknown.
        called: what errors call it.
        is_ordered: whether `shapes` has the parameters of a module in the order in which PEFT wraps
            them. The order then distinguishes parameters of one shape.
        advise: makes a remedy for tensors without a parameter.
    """

    shapes: Shapes | None
    called: str = ""
    is_ordered: bool = False
    advise: Callable[[], str] = lambda: ""


def assign_parameters(adapter: Adapter, model: Model) -> tuple[Headers, list[Problem]]:
    """Finds the parameter of each A and B, and returns all tensors by parameter."""
    shapes = model.shapes or {}
    order = {name: i for i, name in enumerate(shapes)}
    found, problems = list[Header](), list[Problem]()
    for module, parts in adapter.modules.items():
        names = [f"{module}.{parameter}" for parameter in adapter.roles[module].parameters]
        if model.shapes is not None:
            names = sorted((name for name in names if name in order), key=order.__getitem__)
        if names and parts:
            own, wrong = _assign_by_shape(adapter, module, names, parts, model)
        elif parts:
            parts = [fit_axes(part, shapes.get(f"{module}.weight", ())) for part in parts]
            own, wrong = _check_module(adapter, module, parts, model)
        else:
            continue
        found += own
        problems += wrong
    return adapter.rest._replace(parts=found), problems


def list_unmatched(adapter: Adapter, own: Parameters, model: Model) -> list[str]:
    """Lists the names in the configuration that match nothing in the model, or in the adapter."""
    shapes = model.shapes or {}
    known = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1]
    saved = {name.rpartition(".")[0] for name in adapter.rest.full}
    return list_unused(adapter.roles, [part.key for part in own.parts], saved, known, model.called)


def _check_module(
    adapter: Adapter, module: str, parts: list[Header], model: Model
) -> tuple[list[Header], list[Problem]]:
    """Checks A and B of the weight of a module. A part of a wrong rank is kept."""
    role = adapter.roles[module]
    config = adapter.files.config
    key = PREFIX + module
    if role.parameters:
        listed = ", ".join(show(f"{module}.{name}") for name in role.parameters)
        why = f"target_parameters selects {listed}, which is not in {model.called}"
        return [], [Problem(key, why, model.advise())]
    part = parts[0]
    is_taken = role.adapts or may_tie(adapter.fields, module)
    if len(parts) > 1:
        return [], [Problem(key, "adapted more than once")]
    if not is_taken or role.saves:
        why = "has it in modules_to_save" if role.saves else "does not select it"
        return [], [Problem(key, f"unexpected; {config} {why}")]
    found = list[Problem]()
    if part.a.shape[0] != role.rank:
        why = f"expected rank {role.rank} by {config}, got an A of shape {part.a.shape}"
        found.append(Problem(key, why))
    # With a model its shape tells.
    if model.shapes is None and math.prod(part.b.shape[1:]) != part.rank:
        why = f"expected {part.rank} columns, as A has rows, got shape {part.b.shape}"
        found.append(Problem(part.b.key, why))
    if part.m is not None and part.m.shape != (shape := part.further_shape):
        found.append(Problem(part.m.key, f"expected shape {shape}, got {part.m.shape}"))
    return parts, found


def _assign_by_shape(
    adapter: Adapter,
    module: str,
    names: Sequence[str],
    parts: Sequence[Header],
    model: Model,
) -> tuple[list[Header], list[Problem]]:
    """Assigns A and B to parameters that the keys do not name, by shapes and ranks."""
    # Of n parameters there are n! ways. Without the model, some names may be of no parameter.
    shapes = model.shapes
    few = len(parts) <= 4 and (shapes is None or len(parts) == len(names))
    tried = names[:6] if few else []
    roles = adapter.roles
    each = [{n: _try_parameter(roles[n], n, x, shapes) for n in tried} for x in parts]
    fitting = list[list[Header]]()
    for order in itertools.permutations(tried, len(parts)):
        found = [x for fits, name in zip(each, order, strict=True) if (x := fits[name])]
        is_one = shapes is not None or len({x.experts for x in found}) == 1
        if len(found) == len(parts) and is_one:
            fitting.append(found)
            if model.is_ordered or (shapes is not None and len(fitting) > 1):
                break
    if shapes is None:  # the list need not be in the order in which PEFT wraps them
        fitting = sorted(fitting, key=_is_gated, reverse=True)[:1]
    if len(fitting) == 1:
        return fitting[0], []
    listed = ", ".join(f"{n} {shapes[n]}" if shapes else f"{n} {roles[n].rank}" for n in names)
    got = ", ".join(f"A {x.a.shape} with B {x.b.shape}" for x in parts)
    what = "can be assigned in several ways to" if fitting else "do not fit"
    remedy = (
        "Load the adapter with jlora.peft.load, where the order of `names` decides, and merge "
        "what it returns."
    )
    why = f"{got} {what} {'' if shapes else 'the ranks of '}{listed}"
    return [], [Problem(PREFIX + module, why, remedy if fitting else "")]


def _is_gated(found: Sequence[Header]) -> bool:
    """Whether gate_up_proj has twice the outputs that down_proj has inputs; A may have either."""
    own = {x.name.rpartition(".")[2]: x.matrix for x in found}
    rows, columns = own.get("gate_up_proj", (0, 0))
    outputs, inputs = own.get("down_proj", (0, 0))
    return (columns, rows) == (outputs, 2 * inputs) or (rows, columns) == (inputs, 2 * outputs)


def _try_parameter(role: Role, name: str, part: Header, shapes: Shapes | None) -> Header | None:
    """Returns A and B as a part of the parameter `name`; None if they do not fit."""
    rank, wide = role.rank, part.a.shape[0]
    part = part._replace(name=name, key=name, scale=role.scale)
    if shapes is None:
        fits = wide == part.b.shape[1]
        kind = LINEAR if wide == rank and name.endswith(".weight") else EXPERTS
        part = part._replace(kind=kind, experts=wide // rank)
    else:
        if len(shape := shapes[name]) == 3:
            part = part._replace(kind=EXPERTS, experts=shape[0])
        else:
            part = part._replace(kind=LINEAR, transposed=False)
        fits = list_orientations(part, shape)
    return part if fits and part.experts and wide == rank * part.experts else None


def list_missing(adapter: Adapter, shapes: Shapes) -> list[Problem]:
    """Lists the parameters of the model that are selected but missing in the file."""
    modules = adapter.modules.keys()

    def is_missing(name: str) -> bool:
        module, _, parameter = name.rpartition(".")
        if parameter == "bias" and len(shapes[name]) > 1:
            return False  # a mask that GPT-2 has in its attention
        role = adapter.roles[module]
        if adapter.roles.saves_whole(module, parameter, module in modules):
            return name not in adapter.rest.full
        if len(shapes[name]) < 2 or module in modules:
            return False
        return parameter in role.parameters or (parameter == "weight" and role.adapts)

    lost = filter(is_missing, shapes)
    return [Problem(name, f"selected by {CONFIG}, but missing in {TENSORS}") for name in lost]


def identify(x: TensorInfo | np.ndarray, is_table: bool = False) -> tuple[Hashable, ...]:
    """Returns a key for equal tensors: shape, dtype, and a hash of the values if they are read.

    The tensors of an embedding (`is_table`) are transposed first.
    """
    shape = x.shape[::-1] if is_table else x.shape
    if isinstance(x, TensorInfo):
        return shape, x.dtype
    data = (x.T if is_table else x).tobytes()
    return shape, x.dtype, hashlib.sha256(data).digest()


def find_twins(parts: Iterable[Part[T]]) -> dict[str, Part[T]]:
    """Maps each of two parts that change one shared weight equally to the other part."""
    groups: dict[Hashable, dict[Kind, Part[T]]] = {}
    for part in parts:
        if part.kind in (EMBEDDING, LINEAR) and part.m is None:
            is_table = part.kind is EMBEDDING
            a, b = (part.b, part.a) if is_table else (part.a, part.b)
            key = part.scale, identify(a, is_table), identify(b, is_table)
            groups.setdefault(key, {}).setdefault(part.kind, part)
    pairs = (group.values() for group in groups.values() if len(group) == 2)
    return {x.name: y for pair in pairs for x, y in itertools.permutations(pair)}
