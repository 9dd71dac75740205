"""`allocate` chooses sites and their ranks for a number of trained parameters."""

import functools
import heapq
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .._adapters import LoRA, clip_rank
from .._rules import check_int, explain_no_match, near_misses, rule_name
from .._site import Rule, check_rules
from .._types import short
from ._allocation import Allocation, Share, index_of, trainable_parameters
from ._kinds import Sketch, Spectrum


def allocate(
    sketch: Sketch,
    rules: Rule | Sequence[Rule],
    *,
    budget: int | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
) -> Allocation:
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
        An `Allocation`, a sequence of rules: `jlora.transform(apply_fn, *allocation)`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a rule matches no site of the sketch, a rule has other slots than the sketch,
            or the budget is too small for `min_rank`, or for any rank of 1.

    Source: Paischer et al., EVA, arXiv 2410.07170, which counts ranks and not parameters; He et
    al., GoRA, arXiv 2502.12171, for ranks by gradients.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"a": jnp.eye(4), "b": jnp.eye(4) / 2}
        >>> model = lambda params, x: x @ params["a"] @ params["b"]
        >>> loss = lambda params, x: jnp.sum(model(params, x) ** 2)
        >>> rule = jlora.LoRA(rank=1)
        >>> found = jlora.sketch(loss, params, rule, [jnp.eye(4)], kind="gradient")
        >>> lora = jlora.transform(model, *jlora.allocate(found, rule, budget=16))
        >>> base, adapter = jax.jit(lora.init)(jax.random.key(0), params, jnp.eye(4))
        >>> adapter
        {'b': LowRank(a=float32[4,2], b=float32[2,4], scale=32.0)}
    """
    given = check_rules(rules)
    if not isinstance(sketch, Sketch):
        raise TypeError(f"`sketch` must be one from jlora.sketch; got {short(sketch)}.")
    check_int("`min_rank`", min_rank, 0)
    for name, n, least in (("budget", budget, 1), ("max_rank", max_rank, max(1, min_rank))):
        if n is not None:
            check_int(f"`{name}`", n, least)
    taken = {path: index_of(path, given) for path in sketch.sites}
    for i, rule in enumerate(given):
        if isinstance(rule, LoRA) and i not in taken.values():
            advice = near_misses if rule.pattern is None else explain_no_match
            raise ValueError(
                f"{rule_name(rule)} matches no site of `sketch`. "
                + advice(rule.pattern or "", list(sketch.sites))
            )
    rules_by_path = {p: given[i] for p, i in taken.items() if i is not None}
    sites = {p: rule for p, rule in rules_by_path.items() if isinstance(rule, LoRA)}
    gains = {path: _gains(sketch.sites[path], sketch.kind) for path in sites}
    shares = [
        Share(path, sum(gains[path]), 0, sketch.sites[path].shape, sketch.sites[path].layout)
        for path in sites
    ]
    ranks = _ranks(shares, gains, sites, budget, min_rank, max_rank)
    return Allocation(tuple(share._replace(rank=ranks[share.path]) for share in shares), given)


def _ranks(
    shares: Sequence[Share],
    gains: Mapping[str, Sequence[float]],
    rules: Mapping[str, LoRA],
    budget: int | None,
    min_rank: int,
    max_rank: int | None,
) -> dict[str, int]:
    """Chooses components by gain per parameter, at each site in their order."""

    def largest(share: Share) -> int:
        rule, cost = rules[share.path], costs[share.path]
        n = min(len(gains[share.path]), share.largest, max_rank or 2 * rule.rank)
        return n if rule.pattern is not None else clip_rank(n, share.layout, share.shape, cost)

    def steps(path: str) -> Iterator[tuple[float, str, int]]:
        """Yields the negative gain per parameter, and the parameters, of each next rank."""
        for rank in range(ranks[path], most[path]):
            parameters = costs[path](rank + 1) - costs[path](rank)
            yield -gains[path][rank] / max(parameters, 1), path, parameters

    costs = {s.path: functools.partial(trainable_parameters, s, rules[s.path]) for s in shares}
    most = {share.path: largest(share) for share in shares}
    ranks = {path: min(min_rank, n) for path, n in most.items()}
    if budget is None:
        budget = sum(costs[path](min(rules[path].rank, n)) for path, n in most.items())
    spent = sum(costs[path](rank) for path, rank in ranks.items())
    if spent > budget:
        raise ValueError(
            f"`budget` must be at least {spent}, the parameters of `min_rank` {min_rank}; got "
            f"{budget}."
        )
    for _, path, parameters in heapq.merge(*map(steps, list(ranks))):
        if spent + parameters > budget:
            if not any(ranks.values()):
                raise ValueError(
                    f"`budget` must be at least {parameters}, the parameters of the first rank; "
                    f"got {budget}."
                )
            break
        ranks[path], spent = ranks[path] + 1, spent + parameters
    return ranks


def _gains(s: Spectrum, kind: str) -> list[float]:
    """Sums the gain of each component over a stack and over slots."""
    each = s.ratios if kind == "inputs" else s.values**2
    return np.asarray(each, np.float64).reshape(-1, each.shape[-1]).sum(0).tolist()
