"""Makes rows with patterns of what single leaves hold."""

import collections
import dataclasses
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..places._views import ALL, Places
from ._names import Name

_NUMBER = re.compile(r"\d+")


class Held(NamedTuple):
    """A leaf that holds parameters.

    Attributes:
        path: its path, as rows match it.
        row: its row up to path, module and parameter.
        keys: its parameters, by the indices along its axes `l` and `s`.
    """

    path: str
    row: Name
    keys: np.ndarray

    @property
    def form(self) -> tuple[Hashable, ...]:
        """What leaves of one row have in common: all but the numbers in names."""
        names = (_NUMBER.sub("#", own.flat[0]) for own in self.slots)
        return _NUMBER.sub("#", self.path), self.row, *names

    @property
    def slots(self) -> list[np.ndarray]:
        """For each module of a tuple, the parameters by the indices along the axes `l`."""
        stacked = [letter for letter in self.row.axes if letter in "ls"]
        each = np.moveaxis(self.keys, stacked.index("s"), 0) if "s" in stacked else self.keys[None]
        return [each[j, ...] for j in range(len(each))]


class Home(NamedTuple):
    """What a tensor is in the model: a parameter, or one of several experts.

    Attributes:
        parameter: the name of the parameter.
        expert: the number of the expert; None if the tensor is the parameter.
        part: the number of the part of an expert's outputs.
        parts: the number of these parts.
    """

    parameter: str
    expert: int | None
    part: int
    parts: int


def find_homes(places: Places) -> dict[str, Home]:
    """Finds what the tensors are that are no more than one parameter, or an expert of one."""
    found = dict[str, Home]()
    for name, view in places.items():
        experts = [piece.expert for piece in view.pieces]
        parts = experts.count(experts[0])
        for i, piece in enumerate(view.pieces):
            if view.is_tensor or (piece.expert is not None and piece.at == ALL):
                found[piece.tensor] = Home(name, piece.expert, i % parts, parts)
    return found


def generalize(
    found: Iterable[Held], homes: Mapping[str, Home]
) -> tuple[list[Name], dict[str, Held]]:
    """Makes rows with patterns for the numbers of layers, and lists what they should name."""
    renamed = (_rename(held, homes) for held in found)
    each = [held if _make_row([held]) else _fuse(held, homes) for held in renamed]
    groups = collections.defaultdict[Hashable, list[Held]](list)
    for held in filter(None, each):
        groups[held.form].append(held)
    patterns = collections.Counter(map(_path_and_axes, groups.values()))
    rows = list[Name]()
    for members in groups.values():
        is_listed = patterns[_path_and_axes(members)] > 1  # by their numbers, apart from others
        row = _make_row(members, is_listed)
        rows += [row] if row else filter(None, (_make_row([held]) for held in members))
    rows.sort(key=lambda row: row.part is None)  # PEFT wraps gate and up before down
    return rows, {held.path: held for held in filter(None, each)}


def _path_and_axes(members: Sequence[Held]) -> tuple[str, str]:
    return _make_path(members)[0], members[0].row.axes


def _make_path(
    members: Sequence[Held], is_listed: bool = False
) -> tuple[str, list[tuple[int, ...]]]:
    """Makes the pattern of paths that differ in numbers, and lists the numbers it captures."""
    digits = [_NUMBER.findall(held.path) for held in members]
    numbers = [tuple(map(int, own)) for own in digits]
    each = [sorted(set(own)) for own in zip(*numbers, strict=True)]
    varying = [n for n, own in enumerate(each) if len(own) > 1]
    texts = [re.escape(text) for text in re.split(r"(\d+)", members[0].path)]
    for n in varying:
        zeros = "0*" if any(re.match(r"0\d", own[n]) for own in digits) else ""
        number = "|".join(map(str, each[n])) if is_listed else r"\d+"
        texts[2 * n + 1] = f"{zeros}({number})"
    return "".join(texts), [tuple(own[n] for n in varying) for own in numbers]


def _make_row(members: Sequence[Held], is_listed: bool = False) -> Name | None:
    """Makes the row of leaves whose paths, and whose modules, differ in numbers alone."""
    path, captured = _make_path(members, is_listed)
    found = [_make_module(captured, own) for own in zip(*(x.slots for x in members), strict=True)]
    if not all(found):
        return None
    modules, parameters = zip(*(key.rsplit(".", 1) for key in found if key), strict=True)
    row = members[0].row
    module = modules if "s" in row.axes else modules[0]
    return dataclasses.replace(row, path=path, module=module, parameter=parameters[0])


def _make_module(captured: Sequence[tuple[int, ...]], keys: Sequence[np.ndarray]) -> str | None:
    """Makes the template of parameters, each array by the indices along the stacked axes."""
    points = [
        (own, index, tuple(map(int, _NUMBER.findall(str(x[index])))))
        for own, x in zip(captured, keys, strict=True)
        for index in np.ndindex(x.shape)
    ]
    texts = re.split(r"(\d+)", keys[0].flat[0])
    used = list[int]()
    for n in range(len(texts) // 2):
        if (term := _make_sum([(own, index, all[n]) for own, index, all in points])) is None:
            return None
        texts[2 * n + 1], axes = term
        used += axes
    return "".join(texts) if used == list(range(keys[0].ndim)) else None


def _make_sum(
    points: Sequence[tuple[tuple[int, ...], tuple[int, ...], int]],
) -> tuple[str, list[int]] | None:
    """Writes a number as a sum of multiples of indices, a captured number and a constant.

    Returns:
        The text in a template, and the axes whose indices it has.
    """
    captures, first, _ = points[0]
    n = len(first)
    for capture in (None, *range(len(captures))):
        rest = {(own, i): x - (0 if capture is None else own[capture]) for own, i, x in points}
        start = rest[captures, (0,) * n]
        units = (tuple(int(d == axis) for d in range(n)) for axis in range(n))
        steps = [rest.get((captures, unit), start) - start for unit in units]
        sums = (start + sum(map(math.prod, zip(steps, i, strict=True))) for _, i in rest)
        if start < 0 or min(steps, default=0) < 0 or list(rest.values()) != list(sums):
            continue
        terms = [f"{step}*" for step in steps if step]
        terms += [] if capture is None else [rf"\{capture + 1}"]
        terms += [str(start)] if start or not terms else []
        text = "+".join(terms)
        if "*" in text or len(terms) > 1:
            text = "{}" if text == "1*" else f"{{{text}}}"
        return text, [axis for axis, step in enumerate(steps) if step]
    return None


def _rename(held: Held, homes: Mapping[str, Home]) -> Held:
    """Gives parameters their names in the model."""
    names = [x.parameter if (x := homes[key]).expert is None else key for key in held.keys.flat]
    return held._replace(keys=np.array(names, object).reshape(held.keys.shape))


def _fuse(held: Held, homes: Mapping[str, Home]) -> Held | None:
    """Names single experts as one parameter, as a model has them."""
    each = [homes[key] for key in held.keys.flat if key in homes]
    if len(each) < held.keys.size or len({(x.part, x.parts) for x in each}) > 1:
        return None
    numbers = np.reshape([x.expert for x in each], held.keys.shape)
    names = np.array([x.parameter for x in each], object).reshape(held.keys.shape)
    for n, at in enumerate(held.row.where("ls")):
        along = np.moveaxis(numbers, n, -1)
        if held.row.axes[at] == "l" and (along == np.arange(along.shape[-1])).all():
            part = (each[0].part, each[0].parts) if each[0].parts > 1 else None
            axes = held.row.axes[:at] + "e" + held.row.axes[at + 1 :]
            module = ".".join(["{}"] * axes.count("l")) or "m"
            row = dataclasses.replace(held.row, module=module, axes=axes, part=part)
            return Held(held.path, row, names.take(0, n))
    return None
