"""Which modules a configuration selects with which rank and scale, and how to say so shortly."""

import collections
import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ._config import DEFAULTS
from ._json import brief


def ends(name: str, tail: str) -> bool:
    """Whether `tail` names `name`, as a whole or as its last parts."""
    return name == tail or name.endswith("." + tail)


def selects(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt `module`: `check_target_module_exists` of `peft.tuners`."""
    exclude, target = fields.get("exclude_modules"), fields["target_modules"]
    if exclude and _names(exclude, module):
        return False
    if not target or not _names(target, module):
        return False
    layers = fields.get("layers_to_transform")
    if isinstance(target, str) or module in target or layers is None or layers == []:
        return True
    index = _layer(module, fields.get("layers_pattern"))
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _names(target: str | list[str], module: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(ends(module, t) for t in target)


def _layer(module: str, patterns: str | list[str] | None) -> int | None:
    patterns = [patterns] if patterns and isinstance(patterns, str) else patterns
    for pattern in patterns or [r"[^.]*"]:
        prefix = r"(?:^|.*?\.)" if patterns else r".*?\."
        if match := re.match(rf"{prefix}{pattern}\.(?P<idx>\d{{1,9}})\.", module):
            return int(match["idx"])
    return None


def rank_of(fields: Mapping[str, Any], key: str) -> int:
    """The rank of a module or parameter."""
    return _look_up(fields.get("rank_pattern"), key, fields.get("r", DEFAULTS["r"]))


def scale_of(fields: Mapping[str, Any], key: str) -> float:
    """The scale of a module or parameter: alpha / r, or alpha / √r."""
    alpha = _look_up(fields.get("alpha_pattern"), key, fields.get("lora_alpha", 8))
    return alpha / _divisor(fields, rank_of(fields, key))


def _divisor(fields: Mapping[str, Any], rank: int) -> float:
    return math.sqrt(rank) if fields.get("use_rslora") else rank


def _look_up(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    found = (p for p in patterns or {} if _matcher(p).match(key))
    return next(((patterns or {})[p] for p in found), default)


@functools.lru_cache(10_000)
def _matcher(pattern: str) -> re.Pattern[str]:
    """PEFT's reading of a key of `rank_pattern` and `alpha_pattern`: `get_pattern_key`."""
    return re.compile(rf"(.*\.)?({pattern})$")


def idle(
    fields: Mapping[str, Any],
    adapted: Collection[str],
    known: Collection[str] | None,
    where: str = "`base` under `names`",
) -> list[str]:
    """The patterns that match none of the `adapted` keys, the names of none that is `known`.

    PEFT lists targets that it excludes, or that lie in other layers, all the same. Where the model
    is not at hand, `known` is None.
    """
    found = [
        f"{name}: {brief(pattern)} matches no adapted module"
        for name in ("rank_pattern", "alpha_pattern")
        for pattern in fields.get(name) or {}
        if not any(_matcher(pattern).match(key) for key in adapted)
    ]
    for name in ("target_modules", "target_parameters") if known is not None else ():
        listed = fields.get(name) or []
        for target in listed if isinstance(listed, list) else []:
            if not any(ends(key, target) for key in (*adapted, *(known or ()))):
                found.append(f"{name}: {brief(target)} names no module of {where}")
    return found


# ------------------------------------------------------------------------------------- writing


def suffixes(wanted: Iterable[str], others: Collection[str]) -> list[str]:
    """Short endings that name all of `wanted` and none of `others`."""
    found: list[str] = []
    for name in wanted:
        if any(ends(name, tail) for tail in found):
            continue
        parts = name.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts)))
        found.append(next((t for t in tails if not any(ends(o, t) for o in others)), name))
    return found


def with_scales(fields: dict[str, Any], scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """`fields` whose rank, alpha and patterns give each key its rank and scale."""
    if all((rank_of(fields, k), scale_of(fields, k)) == wanted for k, wanted in scales.items()):
        return fields
    ranks = {key: rank for key, (rank, _) in scales.items()}
    alphas = {key: _alpha(scale, _divisor(fields, rank)) for key, (rank, scale) in scales.items()}
    r, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    new = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return fields | new


def _alpha(scale: float, divisor: float) -> float:
    alpha = scale * divisor
    return round(alpha) if round(alpha) / divisor == scale else alpha


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and a pattern for each other one."""
    [(most, _)] = collections.Counter(values.values()).most_common(1)
    patterns = {}
    for value in dict.fromkeys(values.values()):
        if value != most:
            wanted = [key for key, v in values.items() if v == value]
            others = [key for key, v in values.items() if v != value]
            patterns |= {re.escape(s): value for s in suffixes(wanted, others)}
    return most, patterns
