"""Rules with a rank for each site."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from .._adapters import LoRA
from .._report import align_columns
from .._rules import Rule, Slots, is_int, matches, name_mistake, near_misses, rule_name
from ._shares import Share, decode, encode


@dataclasses.dataclass(frozen=True)
class Allocation(Sequence[Rule]):
    """A sequence of rules with a rank for each site; `str()` is a table.

    Each site of rank 1 or more has a rule: its pattern is the site's path, and its scale is that of
    the rule from which it is made. Rules of other methods do not change.

    Attributes:
        shares: the rank of each site.
        given: the rules from which it is made.

    Raises:
        ValueError: if a rank is out of range, a rule has other slots than the shares, or
            another rule would take a site of rank 0.

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
        ('^b$', 2, 32.0)
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
            raise ValueError("`shares` has a site twice.")
        for share in self.shares:
            self._check(share)

    def _check(self, share: Share) -> None:
        path, rule = share.path, rule_of(share.path, self.given)
        if not is_int(share.rank) or not 0 <= share.rank <= share.largest:
            raise ValueError(
                f"the rank of {path!r} must be an integer in [0, {share.largest}]; got "
                f"{share.rank!r}."
            )
        count, chosen, _ = share.layout.slots or (1, (0,), 0)
        mine = rule.slots or Slots(1, (0,))
        if (count, chosen) != (mine.count, mine.chosen):
            raise ValueError(
                f"{rule_name(rule)} has other slots than {path!r} had in the sketch: {mine.chosen} "
                f"of {mine.count}, not {chosen} of {count}. Sketch with these rules."
            )
        others = [r for r in self.given if not isinstance(r, LoRA) and _is_for(r, path)]
        if not share.rank and others:
            raise ValueError(
                f"{path!r} has rank 0, which would leave it to {rule_name(others[0])}. Narrow the "
                "pattern of that rule, or give `min_rank`."
            )

    @functools.cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, in the order of those from which they are made."""
        return tuple(r for i, rule in enumerate(self.given) for r in self._rules_of(i, rule))

    def _rules_of(self, i: int, rule: Rule) -> Iterator[Rule]:
        if not isinstance(rule, LoRA):
            yield rule
            return
        for share in self.shares:
            if share.rank and index_of(share.path, self.given) == i:
                pattern = f"^{re.escape(share.path)}$"
                yield dataclasses.replace(rule.of_rank(share.rank), pattern=pattern)

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
                f"`ranks` has {unknown[0]!r}. {near_misses(unknown[0], list(self.ranks))}"
            )
        shares = (s._replace(rank=ranks.get(s.path, s.rank)) for s in self.shares)
        return dataclasses.replace(self, shares=tuple(shares))

    def __str__(self) -> str:
        header, counts = ("site", "score", "rank", "parameters"), self.parameters
        rows = [
            (s.path or "(root)", f"{s.score:.3g}", str(s.rank), f"{counts[s.path]:,}")
            for s in self.shares
        ]
        lines = align_columns(header, rows, header[1:])
        line, chosen = "─" * max(map(len, lines)), sum(s.rank > 0 for s in self.shares)
        last = f"{chosen} of {len(rows)} sites; {sum(counts.values()):,} parameters"
        return "\n".join([lines[0], line, *lines[1:], line, last])

    # ---------------------------------------------------------------------------------- as JSON

    def to_json(self) -> str:
        """Writes the sites, with scores and ranks to read and to edit, but not the rules."""
        return encode(self.shares)

    @staticmethod
    def from_json(text: str, rules: Rule | Sequence[Rule]) -> "Allocation":
        """Reads what `to_json` wrote, with the rules from which the allocation was made.

        Raises:
            ValueError: if `text` is anything else, with what and where.
        """
        return Allocation(decode(text), check_rules(rules))


def trainable_parameters(share: Share, rule: LoRA, rank: int) -> int:
    """The number of parameters that a site trains at a rank."""
    return rule.of_rank(rank).trainable(share.layout, share.shape) if rank else 0


# ------------------------------------------------------------------------------------ the rules


def check_rules(rules: Any) -> tuple[Rule, ...]:
    """Checks one rule or several, and returns a tuple."""
    rules = tuple(rules) if isinstance(rules, Sequence) else (rules,)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"`rules` must be rules, such as jlora.LoRA(); got {name_mistake(rule)}."
            )
    return rules


def _is_for(rule: Rule, path: str) -> bool:
    return rule.pattern is None or matches(rule, path)


def index_of(path: str, given: Sequence[Rule]) -> int | None:
    """The index of the rule that takes the site at `path`, or None."""
    return next((i for i, rule in enumerate(given) if _is_for(rule, path)), None)


def rule_of(path: str, given: Sequence[Rule]) -> LoRA:
    """The rule with a rank that takes the site at `path`."""
    i = index_of(path, given)
    if i is None or not isinstance(rule := given[i], LoRA):
        raise ValueError(f"no LoRA or DoRA of `rules` takes {path!r}.")
    return rule
