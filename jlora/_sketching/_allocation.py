"""Rules with a rank for each site, and their JSON form."""

import dataclasses
import functools
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

from .._adapters import LoRA, matrix_lengths
from .._report import align_columns
from .._rules import Slots, is_finite, is_int, matches, near_misses, rule_name
from .._site import Rule, check_rules
from .._types import Layout, short

FORMAT = 1
LIMIT = 2**24  # characters of JSON


class Share(NamedTuple):
    """The rank of a site.

    Attributes:
        path: the path of the site.
        score: the sum of the gains of all components, over stack and slots; see `allocate`.
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
    """Reads shares from JSON; raises `ValueError` for anything else."""
    if not isinstance(text, str):
        raise TypeError(f"`text` must be a string of JSON; got {short(text)}.")
    if len(text) > LIMIT:
        raise ValueError(f"`text` has {len(text)} characters; at most {LIMIT} are read.")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"`text` is not valid JSON: {e}.") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"`text` must be a JSON object whose `format` is {FORMAT}.")
    if not isinstance(fields.get("sites"), list):
        raise ValueError("`sites` of `text` must be a list.")
    return tuple(_share(f"site {i} of `text`", item) for i, item in enumerate(fields["sites"]))


def _are_lengths(x: Any) -> bool:
    return isinstance(x, list) and all(is_int(n) and 0 <= n < 2**63 for n in x)


_FIELDS = {  # what each field must be, and whether it is
    "path": ("a string", lambda x: isinstance(x, str)),
    "rank": ("an integer", is_int),
    "score": ("a finite number", is_finite),
    **dict.fromkeys(("shape", "stack", "inputs", "outputs"), ("a list of lengths", _are_lengths)),
    "slots": ("a list or null", lambda x: x is None or isinstance(x, list)),
}


def _share(where: str, item: Any) -> Share:
    if not isinstance(item, dict) or item.keys() != _FIELDS.keys():
        raise ValueError(f"{where} must be an object with {', '.join(_FIELDS)}.")
    for name, (expected, is_right) in _FIELDS.items():
        if not is_right(x := item[name]):
            raise ValueError(f"`{name}` of {where} must be {expected}; got {reprlib.repr(x)}.")
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
            raise ValueError(
                f"`slots` of {where} must be null or [count, chosen, axis] of an output axis that "
                f"`count` divides; got {reprlib.repr(wrong)}."
            )
    stack, inputs, outputs = axes
    layout = Layout(stack, inputs, outputs, slots)
    return Share(item["path"], float(item["score"]), item["rank"], shape, layout)


@dataclasses.dataclass(frozen=True)
class Allocation(Sequence[Rule]):
    """A sequence of rules with a rank for each site; `print` shows a table.

    Each site of rank 1 or more has its own rule, whose pattern is the path of the site. The rule
    has the scale and the other fields of the given rule that matches the site. Given rules of other
    methods do not change.

    Attributes:
        shares: the rank of each site.
        given: the rules that were given to `allocate`.

    Raises:
        ValueError: if a rank is out of range, a rule has other slots than the shares, or another
            rule would match a site of rank 0.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> params = {"a": jnp.eye(4), "b": jnp.eye(4) / 2}
        >>> loss = lambda params, x: jnp.sum((x @ params["a"] @ params["b"]) ** 2)
        >>> rule = jlora.LoRA(rank=1)
        >>> found = jlora.sketch(loss, params, rule, [jnp.eye(4)], kind="gradient")
        >>> allocation = jlora.allocate(found, rule, budget=16)
        >>> print(allocation)
        site  score  rank  parameters
        ─────────────────────────────
        a       0.5     0           0
        b         2     2          16
        ─────────────────────────────
        1 of 2 sites; 16 parameters
        >>> allocation[0].pattern, allocation[0].rank, allocation[0].alpha
        ('^b$', 2, 64.0)
        >>> edited = allocation.with_ranks({"a": 1})
        >>> jlora.types.Allocation.from_json(edited.to_json(), rule) == edited
        True
    """

    shares: tuple[Share, ...]
    given: tuple[Rule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        object.__setattr__(self, "given", check_rules(self.given))
        if len(self.ranks) < len(self.shares):
            raise ValueError("`shares` must have each site once.")
        for share in self.shares:
            self._check(share)

    def _check(self, share: Share) -> None:
        path = share.path
        rule = rule_of(share.path, self.given)
        if not is_int(share.rank) or not 0 <= share.rank <= share.largest:
            raise ValueError(
                f"the rank of {path!r} must be an integer in [0, {share.largest}]; got "
                f"{share.rank!r}."
            )
        count, chosen, _ = share.layout.slots or (1, (0,), 0)
        mine = rule.slots or Slots(1, (0,))
        if (count, chosen) != (mine.count, mine.chosen):
            raise ValueError(
                f"{rule_name(rule)} has the slots {mine.chosen} of {mine.count}, but the sketch of "
                f"{path!r} has {chosen} of {count}. Sketch with these rules."
            )
        others = [r for r in self.given if not isinstance(r, LoRA) and _is_for(r, path)]
        if not share.rank and others:
            raise ValueError(
                f"{path!r} has rank 0, so {rule_name(others[0])} would match it. Narrow the "
                "pattern of that rule, or give `min_rank`."
            )

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, in the order of the given ones."""
        found: list[Rule] = []
        for i, rule in enumerate(self.given):
            if not isinstance(rule, LoRA):
                found.append(rule)
                continue
            for share in (s for s in self.shares if s.rank and index_of(s.path, self.given) == i):
                own = rule.of_rank(share.rank)
                found.append(dataclasses.replace(own, pattern=f"^{re.escape(share.path)}$"))
        return tuple(found)

    @overload
    def __getitem__(self, i: int) -> Rule: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Rule, ...]: ...
    def __getitem__(self, i: Any) -> Any:
        return self.rules[i]

    def __len__(self) -> int:
        return len(self.rules)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each site by its path."""
        return {share.path: share.rank for share in self.shares}

    @property
    def parameters(self) -> dict[str, int]:
        """The number of parameters that each site trains, by its path."""
        return {
            s.path: trainable_parameters(s, rule_of(s.path, self.given), s.rank)
            for s in self.shares
        }

    def with_ranks(self, ranks: Mapping[str, int]) -> "Allocation":
        """Returns a copy with other ranks for the sites at some paths."""
        if unknown := [path for path in ranks if path not in self.ranks]:
            raise ValueError(
                f"`ranks` has {unknown[0]!r}, which is not a site. "
                + near_misses(unknown[0], list(self.ranks))
            )
        shares = (s._replace(rank=ranks.get(s.path, s.rank)) for s in self.shares)
        return dataclasses.replace(self, shares=tuple(shares))

    def __str__(self) -> str:
        header = ("site", "score", "rank", "parameters")
        counts = self.parameters
        rows = [
            (s.path or "(root)", f"{s.score:.3g}", str(s.rank), f"{counts[s.path]:,}")
            for s in self.shares
        ]
        lines = align_columns(header, rows, header[1:])
        line = "─" * max(map(len, lines))
        chosen = sum(s.rank > 0 for s in self.shares)
        last = f"{chosen} of {len(rows)} sites; {sum(counts.values()):,} parameters"
        return "\n".join([lines[0], line, *lines[1:], line, last])

    # ---------------------------------------------------------------------------------- as JSON

    def to_json(self) -> str:
        """Writes the sites with their scores and ranks, which you may edit, but not the rules."""
        return encode(self.shares)

    @staticmethod
    def from_json(text: str, rules: Rule | Sequence[Rule]) -> "Allocation":
        """Reads what `to_json` wrote; `rules` are those that were given to `allocate`.

        Raises:
            TypeError: if `text` is not a string.
            ValueError: if `text` is anything else; the error names the place.
        """
        return Allocation(decode(text), check_rules(rules))


def trainable_parameters(share: Share, rule: LoRA, rank: int) -> int:
    """Counts the parameters that a site trains at a rank."""
    return rule.of_rank(rank).trainable(share.layout, share.shape) if rank else 0


# ------------------------------------------------------------------------------------ the rules


def _is_for(rule: Rule, path: str) -> bool:
    return rule.pattern is None or matches(rule, path)


def index_of(path: str, given: Sequence[Rule]) -> int | None:
    """Finds the index of the first rule that matches the site at `path`, or None."""
    return next((i for i, rule in enumerate(given) if _is_for(rule, path)), None)


def rule_of(path: str, given: Sequence[Rule]) -> LoRA:
    """Returns the LoRA or DoRA that matches the site at `path`; raises if there is none."""
    i = index_of(path, given)
    if i is None or not isinstance(rule := given[i], LoRA):
        raise ValueError(f"no LoRA or DoRA of `rules` matches {path!r}.")
    return rule
