"""The ranks of sites, and their JSON."""

import json
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from .._adapters import matrix_lengths
from .._rules import Slots, is_finite, is_int
from .._types import Layout, short

FORMAT = 1
LIMIT = 2**24  # characters of JSON


class Share(NamedTuple):
    """The rank of a site.

    Attributes:
        path: the path of the site.
        score: the sum over components, stack and slots of σ² of a gradient, or of the explained
            variance of inputs.
        rank: its rank; 0 if it is left out.
        shape: the shape of W.
        layout: the layout of W, with the slots of the rule.
    """

    path: str
    score: float
    rank: int
    shape: tuple[int, ...]
    layout: Layout

    @property
    def largest(self) -> int:
        """The largest rank that the site can have."""
        return min(matrix_lengths(self.layout, self.shape))


def encode(shares: Sequence[Share]) -> str:
    """Writes shares as JSON."""
    sites = [share._asdict() | share.layout._asdict() for share in shares]
    for site in sites:
        del site["layout"]
    return json.dumps({"format": FORMAT, "sites": sites}, indent=1)


def decode(text: str) -> tuple[Share, ...]:
    """Reads shares from JSON; raises `ValueError` if it is anything else."""
    if not isinstance(text, str):
        raise TypeError(f"`text` must be a string of JSON; got {short(text)}.")
    if len(text) > LIMIT:
        raise ValueError(f"`text` has {len(text)} characters; at most {LIMIT} are read.")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"`text` is no valid JSON: {e}.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"`text` must be a JSON object whose `format` is {FORMAT}.")
    if not isinstance(fields.get("sites"), list):
        raise ValueError("`sites` of `text` must be a list.")
    return tuple(_share(f"site {i} of `text`", item) for i, item in enumerate(fields["sites"]))


def _are_lengths(x: Any) -> bool:
    return isinstance(x, list) and all(is_int(n) and 0 <= n < 2**63 for n in x)


_FIELDS = {
    "path": lambda x: isinstance(x, str),
    "rank": is_int,
    "score": is_finite,
    **dict.fromkeys(("shape", "stack", "inputs", "outputs"), _are_lengths),
    "slots": lambda x: x is None or isinstance(x, list),
}


def _share(where: str, item: Any) -> Share:
    if not isinstance(item, dict) or item.keys() != _FIELDS.keys():
        raise ValueError(f"{where} must be an object with {', '.join(_FIELDS)}.")
    for name, is_right in _FIELDS.items():
        if not is_right(item[name]):
            raise ValueError(f"`{name}` of {where} is {reprlib.repr(item[name])}.")
    shape, *axes = (tuple(item[name]) for name in ("shape", "stack", "inputs", "outputs"))
    if sorted(sum(axes, ())) != list(range(len(shape))):
        raise ValueError(f"`stack`, `inputs` and `outputs` of {where} must have each axis once.")
    match item["slots"]:
        case None:
            slots = None
        case [int(count), list(chosen), int(axis)] if (
            axis in axes[2] and count > 0 and shape[axis] % count == 0
        ):
            slots = count, Slots(count, tuple(chosen)).chosen, axis
        case wrong:
            raise ValueError(f"`slots` of {where} is {reprlib.repr(wrong)}.")
    stack, inputs, outputs = axes
    layout = Layout(stack, inputs, outputs, slots)
    return Share(item["path"], float(item["score"]), item["rank"], shape, layout)
