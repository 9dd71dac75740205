"""The ranks of sites, and their JSON."""

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        _, inputs, outputs, slots = self.layout
        lengths = [math.prod(self.shape[d] for d in dims) for dims in (inputs, outputs)]
        return min(lengths[0], lengths[1] // (slots[0] if slots else 1))


def encode(shares: Sequence[Share]) -> str:
    """The shares as JSON."""
    sites = [share._asdict() | share.layout._asdict() for share in shares]
    for site in sites:
        del site["layout"]
    return json.dumps({"format": FORMAT, "sites": sites}, indent=1)


def decode(text: str) -> tuple[Share, ...]:
    """The shares of JSON; `ValueError` if it is anything else."""
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
    return tuple(_share(i, item) for i, item in enumerate(fields["sites"]))


def _share(i: int, item: Any) -> Share:
    where, names = f"site {i} of `text`", ("path", "rank", "score", "shape", *Layout._fields)
    if not isinstance(item, dict) or set(item) != set(names):
        raise ValueError(f"{where} must be an object with {', '.join(names)}.")
    path, rank, score, shape, stack, inputs, outputs, slots = (item[name] for name in names)
    right = {
        "path": isinstance(path, str),
        "rank": is_int(rank),
        "score": is_finite(score),
        **{name: _are_lengths(item[name]) for name in ("shape", "stack", "inputs", "outputs")},
    }
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise ValueError(f"`{wrong[0]}` of {where} is {reprlib.repr(item[wrong[0]])}.")
    if sorted(stack + inputs + outputs) != list(range(len(shape))):
        raise ValueError(f"`stack`, `inputs` and `outputs` of {where} must have each axis once.")
    if slots is not None:
        slots = _slots(where, slots, shape, outputs)
    layout = Layout(tuple(stack), tuple(inputs), tuple(outputs), slots)
    return Share(path, float(score), rank, tuple(shape), layout)


def _are_lengths(x: Any) -> bool:
    return isinstance(x, list) and all(is_int(n) and 0 <= n < 2**63 for n in x)


def _slots(where: str, slots: Any, shape: list[int], outputs: list[int]) -> Any:
    match slots:
        case [int(count), list(chosen), int(axis)] if axis in outputs and count > 0:
            if not shape[axis] % count:
                return count, Slots(count, tuple(chosen)).chosen, axis
    raise ValueError(f"`slots` of {where} is {reprlib.repr(slots)}.")
