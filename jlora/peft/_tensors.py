"""The tensors of PEFT's file by what they are: A with B, parameters in full, frozen copies."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._file import DTYPES, Header, reader
from ._json import TENSORS, Source, opened, shown
from ._plan import PREFIX, SAVED_BY_NAME, hint, is_saved

_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)"
    r"\.lora_(?:(?P<side>[AB])\.weight|embedding_(?P<table>[AB]))"
)


class Place(NamedTuple):
    """Where a pair belongs.

    Attributes:
        module: the module.
        depth: how many pairs are wrapped around it.
        table: whether the module is an embedding.
    """

    module: str
    depth: int
    table: bool


Pairs = dict[Place, dict[str, np.ndarray]]


class Tensors(NamedTuple):
    """All tensors without PEFT's prefix.

    Attributes:
        pairs: those that have an A and a B, by these letters.
        full: parameters that are replaced.
        frozen: parameters that the base must have just so.
    """

    pairs: Pairs
    full: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]


def read_tensors(
    source: Source, header: Header, fields: Mapping[str, Any], wrong: list[str]
) -> Tensors:
    """Reads all of a file; what has no place is added to `wrong`."""
    tensors = _read(source, header, wrong)
    pairs: Pairs = {}
    for key, x in tensors.items():
        if found := _FACTOR.fullmatch(key):
            module, depth, side, table = found.group("module", "depth", "side", "table")
            place = Place(module, depth.count("."), bool(table))
            pairs.setdefault(place, {})[side or table] = x
    modules = {place.module for place in pairs}
    full, frozen = {}, {}
    for key, x in tensors.items():
        module, _, parameter = key.rpartition(".")
        inner = module.removesuffix(".base_layer")
        if _FACTOR.fullmatch(key):
            continue
        if inner != module and inner in modules and parameter == "weight":
            frozen[f"{inner}.weight"] = x
        elif _is_full(fields, inner, parameter, inner in modules) and not hint(PREFIX + key):
            full[f"{inner}.{parameter}"] = x
        else:
            wrong.append(f"{shown(PREFIX + key)}: unexpected{hint(PREFIX + key)}")
    return Tensors(_whole(pairs, wrong), full, frozen)


def may_tie(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT may have adapted `module` because it shares its weight with another."""
    return bool(fields.get("ensure_weight_tying")) and module.endswith(SAVED_BY_NAME)


def _read(source: Source, header: Header, wrong: list[str]) -> dict[str, np.ndarray]:
    """The tensors of floating-point numbers."""
    tensors = {}
    with opened(source, TENSORS) as (file, _):
        read = reader(file, header)
        for key, entry in header.entries.items():
            if not key.startswith(PREFIX):
                wrong.append(f"{shown(key)}: unexpected{hint(key)}")
            elif entry.dtype not in DTYPES:
                wrong.append(f"{shown(key)}: expected a floating-point dtype, got {entry.dtype}")
            else:
                x = tensors[key.removeprefix(PREFIX)] = read(key)
                if n := x.size - np.count_nonzero(np.isfinite(x)):
                    wrong.append(f"{shown(key)}: {n} of {x.size} values are not finite")
    return tensors


def _is_full(fields: Mapping[str, Any], module: str, parameter: str, adapted: bool) -> bool:
    bias = fields.get("bias", "none")
    by_bias = parameter == "bias" and (bias == "all" or (bias == "lora_only" and adapted))
    return by_bias or is_saved(fields, module) or may_tie(fields, module)


def _whole(pairs: Pairs, wrong: list[str]) -> Pairs:
    """The pairs that have both an A and a B of some rank."""
    good = {}
    for place, sides in pairs.items():
        module, depth, table = place
        key = PREFIX + module + ".base_layer" * depth
        end = "lora_embedding_{}" if table else "lora_{}.weight"
        lost = [side for side in "AB" if side not in sides]
        wrong += [f"{shown(key)}.{end.format(side)}: missing" for side in lost]
        if lost:
            continue
        if min(sides["A"].ndim, sides["B"].ndim) < 2:
            got = sides["A"].shape, sides["B"].shape
            wrong.append(f"{shown(key)}: expected matrices as A and B, got shapes {got}")
            continue
        good[place] = sides
    return good
