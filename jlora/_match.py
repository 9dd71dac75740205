"""Gives each leaf its rule, and raises for rules that match nothing or cannot apply."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

from ._errors import InputError
from ._rules import explain_no_match, is_for, matches, precedence, rule_name
from ._site import Frozen, Full, Rule, Site
from ._sites import Sites

T = TypeVar("T")


def match(sites: Sites, rules: Sequence[Rule]) -> Sites:
    """Gives each leaf its rule, the first in `precedence`; raises if a rule gets no leaf."""
    first = first_matches(rules, sites.leaves, lambda r, s: is_for(r, s.path, s.kind), "rules")
    for i, rule in enumerate(rules):
        if i not in first:
            _raise_idle(rule, sites)
    pairs = zip(sites.leaves, first, strict=True)
    return Sites(tuple(s if i is None else _fit(s, rules[i], sites) for s, i in pairs))


def first_matches(
    rules: Sequence[Any], leaves: Sequence[T], is_match: Callable[[Any, T], bool], what: str
) -> list[int | None]:
    """Finds for each leaf the index of the first rule in `precedence` that matches it, or None.

    Raises `ValueError` if other rules take all leaves of a rule; errors call the rules `what`.
    """
    order = precedence(rules)
    first = [next((i for i in order if is_match(rules[i], x)), None) for x in leaves]
    pairs = list(zip(first, leaves, strict=True))
    for rule in (r for i, r in enumerate(rules) if i not in first):
        if lost := [rules[i] for i, x in pairs if i is not None and is_match(rule, x)]:
            raise ValueError(
                f"{rule_name(rule)} gets no leaf: other {what} take all {len(lost)} leaves that it "
                f"matches ({', '.join(dict.fromkeys(map(rule_name, lost)))}). The first match "
                f"wins, and {what} without a pattern come last. Drop it, or reorder or narrow the "
                f"{what}."
            )
    return first


def _fit(site: Site, rule: Rule, sites: Sites) -> Site:
    """Gives a site its rule, fitted to the shape; raises if the rule cannot train the site."""
    if site.kind is None and rule.materialize and site.materialized is not None:
        site = dataclasses.replace(site, kind="materialized", layout=site.materialized)
    if not isinstance(rule, Frozen):
        _check(site, rule, sites)
    if isinstance(rule, Full | Frozen):
        return dataclasses.replace(site, rule=rule)
    fitted, layout = rule.fit(site)
    asked, got = (x.sizes(layout).get("rank") for x in (rule, fitted))
    asked = None if asked == got else asked
    return dataclasses.replace(site, rule=fitted, layout=layout, asked_rank=asked)


def _check(site: Site, rule: Rule, sites: Sites) -> None:
    """Raises if a rule cannot train a site."""
    is_full = isinstance(rule, Full)
    name = f"{rule_name(rule)} matches {site.name}"
    if not jnp.issubdtype(site.dtype, jnp.inexact if is_full else jnp.floating):
        raise ValueError(
            f"{name} of dtype {site.dtype}, which is not floating-point. Narrow the pattern, or, "
            "if these are codes of a weight, quantize it with jlora.quantize."
        )
    if is_full and site.scheme is not None:
        raise ValueError(
            f"{name}, which is quantized: trained leaves must not be quantized. Give "
            f"{type(site.scheme).__name__} a pattern that leaves it out, or narrow the pattern of "
            "Full."
        )
    if not is_full and len(site.shape) < 2:
        raise ValueError(
            f"{name} of shape {site.shape}, which is not a matrix. Narrow the pattern"
            f"{_name_matrices(rule, site, sites)}, or train the leaf in full with jlora.Full."
        )
    if site.used is False or not (is_full or site.kind or site.unsupported_uses):
        raise InputError(
            "rules",
            f"has {rule_name(rule)} for {site.name} of shape {site.shape}, which the traced call "
            "does not use, or only behind stop_gradient, so it would get no gradient. Narrow the "
            "pattern, or give `init` the arguments of a call that uses it.",
        )
    if site.unsupported_uses and not is_full and not rule.materialize:
        raise NotImplementedError(
            f"{name}, which the model uses where W + s·A·B has no factored form: "
            f"{'; '.join(site.unsupported_uses)}. Narrow the pattern, train the leaf in full with "
            "jlora.Full, or give LoRA(..., materialize=True), which forms W + ΔW there: exact, but "
            "at full memory and time."
        )


def _name_matrices(rule: Rule, site: Site, sites: Sites) -> str:
    """Names sites that the pattern may be meant for: it matches them, or they are siblings."""
    found = [s for s in sites if matches(rule, s.path)]
    found += [s for s in sites if s.parts[:-1] == site.parts[:-1]]
    return f" to matrices, such as {found[0].name}" if found else ""


def _raise_idle(rule: Rule, sites: Sites) -> None:
    """Raises for a rule that matches no leaf."""
    if rule.pattern is None:
        missed = [f"  {s.path or '(root)'}: used in {s.unsupported_uses[0]}" for s in sites.missed]
        why = (
            f"{rule_name(rule)} adapts every dense and conv site, but the model has none. Name "
            "leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites."
        )
        listed = ["These have no factored form:", *missed] if missed else []
        raise ValueError("\n".join([why, *listed]))
    leaves = ([] if isinstance(rule, Full | Frozen) else list(sites)) or sites.leaves
    advice = explain_no_match(rule.pattern, [s.path for s in leaves])
    raise InputError("params", f"has no leaf that {rule_name(rule)} matches. {advice}")
