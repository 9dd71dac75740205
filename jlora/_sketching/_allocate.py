"""`allocate` chooses sites and their ranks for a number of trained parameters."""

import dataclasses
import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapters import LoRA, clip_rank, matrix_lengths
from .._errors import InputError
from .._rules import (
    Slots,
    check_int,
    explain_no_match,
    is_for,
    near_misses,
    precedence,
    rule_name,
)
from .._site import Frozen, Rule, check_rules
from .._types import short
from ._kinds import Sketch, Spectrum


def allocate(
    sketch: Sketch,
    rules: Rule | Sequence[Rule],
    *,
    budget: int | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
) -> tuple[Rule, ...]:
    r"""Chooses which sites are adapted, and their ranks, for a number of trained parameters.

    Use it only if the budget is too small for rank 1 at all linear sites. Evidence that it helps is
    weak: with as many parameters, one rank for all linear sites is hard to beat.

    Each component of a site in the sketch has a gain. For gradients it is $\sigma_i^2$: rank r
    gains the part of $\lVert G \rVert_F^2$ that a ΔW of rank r can follow. For inputs it is the
    explained variance $\sigma_i^2 / \sum_j \sigma_j^2$. Components are chosen in the order of gain
    per parameter, until the next one exceeds the budget. So no other ranks with as many parameters
    have more gain, and a larger budget lowers no rank.

    Each site keeps the scale s of its rule. The layers of a stack share one rank, because their A
    is one array; their gains are summed. A leaf that is used several times is one site.

    Args:
        sketch: from `jlora.sketch`, with as many components as the largest rank.
        rules: one rule, or several as for `transform`. The sites of the sketch that `LoRA` and
            `DoRA` match get ranks; other rules do not change.
        budget: the largest number of parameters that these sites may train together; by default as
            many as with `rules`.
        min_rank: the smallest rank of a site; with 0, sites may be left out.
        max_rank: the largest rank of a site; by default twice the rank of its rule. No rank exceeds
            the number of components.

    Returns:
        Rules for `transform`. Each `LoRA` or `DoRA` is replaced by a rule for each of its sites
        that has a rank, whose pattern is the path of the site. `jlora.transform(apply_fn,
        *rules).sites(...)` prints them as a table.

    Raises:
        TypeError: if `sketch` is not a sketch, or a rule not a rule.
        ValueError: if a number is out of range, a rule matches no site of the sketch, a rule has
            other slots than the sketch, a rule of another method would match a site that is left
            out, or the budget is too small for `min_rank`, or for any rank of 1.

    Source: Paischer et al., EVA, arXiv 2410.07170, which counts ranks and not parameters; He et
    al., GoRA, arXiv 2502.12171, for ranks by gradients.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"a": jnp.eye(4), "b": jnp.eye(4) / 2}
        >>> model = lambda params, x: x @ params["a"] @ params["b"]
        >>> loss = lambda params, x: jnp.sum(model(params, x) ** 2)
        >>> rule = jlora.LoRA(rank=1)
        >>> found = jlora.sketch(loss, params, rule, [jnp.eye(4)], kind="gradient")
        >>> rules = jlora.allocate(found, rule, budget=16)
        >>> [(rule.pattern, rule.rank, rule.scale) for rule in rules]
        [('^b$', 2, 32.0)]
        >>> lora = jlora.transform(model, *rules)
        >>> base, adapter = jax.jit(lora.init)(jax.random.key(0), params, jnp.eye(4))
        >>> adapter
        {'b': LowRank(a=float32[4,2], b=float32[2,4], scale=32.0)}
    """
    given = check_rules(rules)
    _check_arguments(sketch, budget, min_rank, max_rank)
    places = {path: _find_rule(path, s.use, given) for path, s in sketch.sites.items()}
    _check_matches(sketch, given, set(places.values()))
    taken = ((path, given[i]) for path, i in places.items() if i is not None)
    sites = {path: rule for path, rule in taken if isinstance(rule, LoRA)}
    for path, rule in sites.items():
        _check_slots(path, rule, sketch.sites[path])
    ranks = _choose_ranks(sketch, sites, budget, min_rank, max_rank)
    _check_left_out({path: sketch.sites[path] for path, n in ranks.items() if not n}, given)
    found: list[Rule] = []
    for i, rule in enumerate(given):
        if not isinstance(rule, LoRA):
            found.append(rule)
            continue
        for path, rank in ranks.items():
            if rank and places[path] == i:
                one = rule.of_rank(rank)  # with the same scale
                found.append(dataclasses.replace(one, pattern=f"^{re.escape(path)}$"))
    return tuple(found)


def _find_rule(path: str, use: str | None, given: Sequence[Rule]) -> int | None:
    """Returns the index of the rule that takes the site at `path`; None if there is none."""
    return next((i for i in precedence(given) if is_for(given[i], path, use)), None)


# ------------------------------------------------------------------------------------- the choice


def _choose_ranks(
    sketch: Sketch,
    rules: Mapping[str, LoRA],
    budget: int | None,
    min_rank: int,
    max_rank: int | None,
) -> dict[str, int]:
    """Chooses components by gain per parameter, at each site in their order."""
    gains = {path: _gains(sketch.sites[path], sketch.kind) for path in rules}

    def cost(path: str, rank: int) -> int:
        """Counts the parameters that a site trains at a rank."""
        site, rule = sketch.sites[path], rules[path]
        return rule.of_rank(rank).trainable(site.layout, site.shape) if rank else 0

    def largest(path: str) -> int:
        site, rule = sketch.sites[path], rules[path]
        possible = min(len(gains[path]), *matrix_lengths(site.layout, site.shape))
        n = min(possible, max_rank or 2 * rule.rank)
        if rule.pattern is not None:
            return n
        return clip_rank(n, site.layout, site.shape, lambda rank: cost(path, rank))

    def steps(path: str) -> Iterator[tuple[float, str, int]]:
        """Yields the negative gain per parameter, and the parameters, of each next rank."""
        for rank in range(ranks[path], most[path]):
            parameters = cost(path, rank + 1) - cost(path, rank)
            yield -gains[path][rank] / max(parameters, 1), path, parameters

    most = {path: largest(path) for path in rules}
    ranks = {path: min(min_rank, n) for path, n in most.items()}
    if budget is None:
        budget = sum(cost(path, min(rules[path].rank, n)) for path, n in most.items())
    spent = sum(cost(path, rank) for path, rank in ranks.items())
    if spent > budget:
        raise InputError(
            "budget",
            f"must be at least {spent}, the parameters of `min_rank` {min_rank}; got {budget}.",
        )
    for _, path, parameters in heapq.merge(*map(steps, list(ranks))):
        if spent + parameters > budget:
            if not any(ranks.values()):
                raise InputError(
                    "budget",
                    f"must be at least {parameters}, the parameters of the first rank; "
                    f"got {budget}.",
                )
            break
        ranks[path] += 1
        spent += parameters
    return ranks


def _gains(s: Spectrum, kind: str) -> list[float]:
    """Sums the gain of each component over a stack and over slots."""
    each = s.ratios if kind == "inputs" else s.values**2
    return np.asarray(each, np.float64).reshape(-1, each.shape[-1]).sum(0).tolist()


# ---------------------------------------------------------------------------------------- refusals


def _check_arguments(sketch: Any, budget: Any, min_rank: Any, max_rank: Any) -> None:
    if not isinstance(sketch, Sketch):
        raise TypeError(f"`sketch` must be one from jlora.sketch; got {short(sketch)}.")
    check_int("min_rank", min_rank, 0)
    for name, n, least in (("budget", budget, 1), ("max_rank", max_rank, max(1, min_rank))):
        if n is not None:
            check_int(name, n, least)


def _check_matches(sketch: Sketch, given: Sequence[Rule], matched: set[int | None]) -> None:
    for i, rule in enumerate(given):
        if isinstance(rule, LoRA) and i not in matched:
            advice = near_misses if rule.pattern is None else explain_no_match
            raise ValueError(
                f"{rule_name(rule)} matches no site of `sketch`. "
                + advice(rule.pattern or "", list(sketch.sites))
            )


def _check_slots(path: str, rule: LoRA, site: Spectrum) -> None:
    count, chosen, _ = site.layout.slots or (1, (0,), 0)
    own = rule.slots or Slots(1, (0,))
    if (count, chosen) != (own.count, own.chosen):
        raise ValueError(
            f"{rule_name(rule)} has the slots {own.chosen} of {own.count}, but the sketch of "
            f"{path!r} has {chosen} of {count}. Sketch with these rules."
        )


def _check_left_out(sites: Mapping[str, Spectrum], given: Sequence[Rule]) -> None:
    """Raises if a rule of another method would train a site of rank 0."""
    others = [rule for rule in given if not isinstance(rule, LoRA | Frozen)]
    for path, site in sites.items():
        if found := [rule for rule in others if is_for(rule, path, site.use)]:
            raise ValueError(
                f"{path!r} has rank 0, so {rule_name(found[0])} would match it. Narrow the "
                "pattern of that rule, or give `min_rank`."
            )
