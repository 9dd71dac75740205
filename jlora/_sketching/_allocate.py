"""`allocate`: which sites, and which rank each, for a number of trained parameters."""

import functools
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._adapters import LoRA, clip_rank
from .._rules import Rule, explain_no_match, is_int, near, rule_name
from .._types import short
from ._allocation import Allocation, as_rules, index_of, rule_of, takes_by_rank, trained
from ._shares import Share
from ._spectrum import Sketch, Spectrum


def allocate(
    sketch: Sketch,
    rules: Rule | Sequence[Rule],
    *,
    budget: int | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
) -> Allocation:
    r"""Ranks for a number of trained parameters: which sites are adapted, and how far.

    Each component of a site in the sketch has a gain: of a gradient its $\sigma_i^2$, so that a
    site of rank r has the $\lVert G \rVert_F^2$ that a ΔW of rank r can follow; of inputs the
    variance $\sigma_i^2 / \sum_j \sigma_j^2$ that it explains. Components are taken in the order of
    their gain for each parameter, until the next is above the budget. So no other ranks of LoRA
    with as many parameters have more gain, and with a larger budget no site has a lower rank.

    The scale s of each site stays that of its rule. The layers of a stack share a rank, as A and B
    are one array: their gains are summed. A leaf that is used several times is one site.

    Evidence that this helps is weak: of as many parameters, one rank for all linear sites is hard
    to beat. It is for budgets that are too small for that.

    Args:
        sketch: from `jlora.sketch`; it has to have as many components as the largest rank.
        rules: what `transform` would take, or one rule. Ranks are for the sites of the sketch that
            `LoRA` and `DoRA` take; other rules stay as they are.
        budget: the most parameters that those sites train in all; unless told, as many as by
            `rules`.
        min_rank: of each site; at 0 sites may be left out.
        max_rank: of each site; unless told, twice the rank of its rule. No rank is above the number
            of components.

    Returns:
        An `Allocation`, a sequence of rules: `jlora.transform(apply_fn, *allocation)`.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if a rule takes no site of the sketch, the slots of a rule are not those of the
            sketch, or the budget is below what `min_rank` takes, or below any rank of 1.

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
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.eye(4))
        >>> adapter
        {'b': LowRank(a=float32[4,2], b=float32[2,4], scale=16.0)}
    """
    given = as_rules(rules)
    if not isinstance(sketch, Sketch):
        raise TypeError(f"`sketch` must be one from jlora.sketch; got {short(sketch)}.")
    _check("min_rank", min_rank, 0)
    for name, n, least in (("budget", budget, 1), ("max_rank", max_rank, max(1, min_rank))):
        if n is not None:
            _check(name, n, least)
    paths = [path for path in sketch.sites if takes_by_rank(path, given)]
    for i, rule in enumerate(given):
        if isinstance(rule, LoRA) and not any(index_of(path, given) == i for path in paths):
            advice = near if rule.pattern is None else explain_no_match
            raise ValueError(
                f"{rule_name(rule)} takes no site of `sketch`. "
                + advice(rule.pattern or "", list(sketch.sites))
            )
    found = {path: sketch.sites[path] for path in sorted(paths)}
    gains = {path: _gains(s, sketch.kind) for path, s in found.items()}
    shares = {
        path: Share(path, sum(gains[path]), 0, s.shape, s.layout) for path, s in found.items()
    }
    ranks = _ranks(shares, gains, given, budget, min_rank, max_rank)
    return Allocation(tuple(shares[path]._replace(rank=ranks[path]) for path in paths), given)


def _check(name: str, n: Any, least: int) -> None:
    if not is_int(n) or n < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {n!r}.")


def _ranks(
    shares: Mapping[str, Share],
    gains: Mapping[str, Sequence[float]],
    given: Sequence[Rule],
    budget: int | None,
    min_rank: int,
    max_rank: int | None,
) -> dict[str, int]:
    """Takes the components in order, each after those before it at its site."""
    rules = {path: rule_of(path, given) for path in shares}

    def cost(path: str, rank: int) -> int:
        return trained(shares[path], rules[path], rank)

    def most(path: str, share: Share) -> int:
        n = min(len(gains[path]), share.largest, max_rank or 2 * rules[path].rank)
        if rules[path].pattern is not None:
            return n
        return clip_rank(n, share.layout, share.shape, functools.partial(cost, path))

    largest = {path: most(path, share) for path, share in shares.items()}
    ranks = {path: min(min_rank, n) for path, n in largest.items()}

    if budget is None:
        budget = sum(cost(path, min(rules[path].rank, n)) for path, n in largest.items())

    def step(path: str) -> tuple[float, str, int]:
        parameters = cost(path, ranks[path] + 1) - cost(path, ranks[path])
        return -gains[path][ranks[path]] / max(parameters, 1), path, parameters

    spent = sum(cost(path, rank) for path, rank in ranks.items())
    if spent > budget:
        raise ValueError(f"`budget` is {budget}; `min_rank` {min_rank} takes {spent} parameters.")
    heap = [step(path) for path, n in largest.items() if ranks[path] < n]
    heapq.heapify(heap)
    while heap and spent + heap[0][2] <= budget:
        _, path, parameters = heapq.heappop(heap)
        ranks[path], spent = ranks[path] + 1, spent + parameters
        if ranks[path] < largest[path]:
            heapq.heappush(heap, step(path))
    if not any(ranks.values()):
        raise ValueError(f"`budget` is {budget}; the first rank takes {heap[0][2]} parameters.")
    return ranks


def _gains(s: Spectrum, kind: str) -> list[float]:
    """The gain of each component, summed over a stack and over slots."""
    each = s.ratios if kind == "inputs" else s.values**2
    return np.asarray(each, np.float64).reshape(-1, each.shape[-1]).sum(0).tolist()
