"""Gives each leaf its rule, and raises for rules that match nothing or cannot apply."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

from ._errors import InputError
from ._rules import compile_pattern, explain_no_match, is_for, matches, rule_name
from ._site import Full, Rule, Site
from ._sites import Sites

T = TypeVar("T")


def match(sites: Sites, rules: Sequence[Rule]) -> Sites:
    """Gives each leaf the first rule that matches it; raises if a rule gets no leaf."""
    first = first_matches(rules, sites.leaves, lambda r, s: is_for(r, s.path, s.kind), "rules")
    for i, rule in enumerate(rules):
        if i not in first:
            _raise_idle(rule, sites)
    pairs = zip(sites.leaves, first, strict=True)
    return Sites(tuple(s if i is None else _fit(s, rules[i], sites) for s, i in pairs))


def first_matches(
    rules: Sequence[Any], leaves: Sequence[T], is_match: Callable[[Any, T], bool], what: str
) -> list[int | None]:
    """Finds for each leaf the index of the first rule that matches it, or None.

    Raises `ValueError` if earlier rules match all leaves of a rule; errors call the rules `what`.
    """
    first = [next((i for i, r in enumerate(rules) if is_match(r, x)), None) for x in leaves]
    pairs = list(zip(first, leaves, strict=True))
    for rule in (r for i, r in enumerate(rules) if i not in first):
        if lost := [rules[i] for i, x in pairs if i is not None and is_match(rule, x)]:
            raise ValueError(
                f"{rule_name(rule)} gets no leaf: earlier {what} match all {len(lost)} leaves "
                f"that it matches ({', '.join(dict.fromkeys(map(rule_name, lost)))}). The first "
                f"match wins; reorder the {what} or drop this one."
            )
    return first


def _fit(site: Site, rule: Rule, sites: Sites) -> Site:
    """Gives a site its rule, fitted to the shape; raises if the rule cannot adapt the site."""
    if isinstance(rule, Full):
        _check_full(rule, site)
        return dataclasses.replace(site, rule=rule)
    if site.kind is None and rule.materialize and site.materialized is not None:
        site = dataclasses.replace(site, kind="materialized", layout=site.materialized)
    if site.kind is None:
        raise ValueError(_explain_not_linear(rule, site, sites))
    if site.unsupported_uses and not rule.materialize:
        raise NotImplementedError(
            f"{rule_name(rule)} matches {site.name}, which the model also uses where W + s·A·B "
            f"has no factored form: {'; '.join(site.unsupported_uses)}. Leave it out of the rules, "
            "or give LoRA(..., materialize=True), which forms W + ΔW there: exact, but at full "
            "memory and time."
        )
    fitted, layout = rule.fit(site)
    asked, got = (x.sizes(layout).get("rank") for x in (rule, fitted))
    asked = None if asked == got else asked
    return dataclasses.replace(site, rule=fitted, layout=layout, asked_rank=asked)


def _check_full(rule: Full, site: Site) -> None:
    if not jnp.issubdtype(site.dtype, jnp.inexact):
        raise ValueError(
            f"{rule_name(rule)} matches {site.name} of dtype {site.dtype}, which cannot be "
            "trained. Narrow the pattern to floating-point leaves."
        )
    if site.scheme is not None:
        raise ValueError(
            f"{rule_name(rule)} matches {site.name}, which is quantized: trained leaves must not "
            f"be quantized. Give {type(site.scheme).__name__} a pattern that leaves it out, or "
            "narrow the pattern of Full."
        )
    if site.used is False:
        raise InputError(
            f"{rule_name(rule)} matches {site.name} of shape {site.shape}, which the traced call "
            "does not use, or only behind stop_gradient, so it would get no gradient. Narrow the "
            "pattern, or give `init` the arguments of a call that uses it."
        )


def _explain_not_linear(rule: Rule, site: Site, sites: Sites) -> str:
    narrow, remedy = "Narrow the pattern", ", or train the leaf in full with jlora.Full"
    if not jnp.issubdtype(site.dtype, jnp.floating):
        why = f"of dtype {site.dtype}, which is not floating-point"
        remedy = ""
        if jnp.issubdtype(site.dtype, jnp.integer):
            narrow += ", or, if these are codes of a weight, quantize it with jlora.quantize"
    elif len(site.shape) < 2:
        why = f"of shape {site.shape}, which is not a matrix"
        if better := _suggest_pattern(rule, site, sites):
            narrow += f" (did you mean {better!r}?)"
    elif site.unsupported_uses:
        why = f"of shape {site.shape}, which the model uses only in "
        why += "; ".join(site.unsupported_uses)
        remedy = ", train the leaf in full with jlora.Full"
        remedy += ", or give LoRA(..., materialize=True), which forms W + ΔW"
    else:
        why = f"of shape {site.shape}, which the traced call does not use, or only behind "
        why += "stop_gradient"
        remedy = ", or give `init` the arguments of a call that uses it"
    return f"{rule_name(rule)} matches {site.name} {why}. {narrow}{remedy}."


def _suggest_pattern(rule: Rule, site: Site, sites: Sites) -> str | None:
    """Finds a pattern similar to the rule's that matches only sites, such as siblings of `site`."""
    if rule.pattern is None or not site.parts:
        return None
    beside = [s for s in sites if s.parts[:-1] == site.parts[:-1] or matches(rule, s.path)]
    mine = rf"\b{re.escape(site.parts[-1])}\b"
    for name in dict.fromkeys(re.escape(s.parts[-1]) for s in beside if s.parts):
        renamed = re.sub(mine, lambda _, name=name: name, rule.pattern)
        below = (
            f"{p}/{way}{name}" for way in ("", ".*") for p in (rule.pattern, f"({rule.pattern})")
        )
        for pattern in (renamed, *below):
            if _matches_only_sites(pattern, sites):
                return pattern
    return None


def _matches_only_sites(pattern: str, sites: Sites) -> bool:
    """Whether `pattern` is a regular expression that matches sites and nothing else."""
    try:
        hits = [s for s in sites.leaves if compile_pattern(pattern).search(s.path)]
    except re.error:
        return False
    return bool(hits) and all(s.kind is not None for s in hits)


def _raise_idle(rule: Rule, sites: Sites) -> None:
    """Raises for a rule that matches no leaf."""
    if rule.pattern is None:
        missed = [f"  {s.path or '(root)'}: used in {s.unsupported_uses[0]}" for s in sites.missed]
        why = (
            "LoRA() without a pattern adapts every dense and conv site, but the model has none. "
            "Name leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites."
        )
        listed = ["These have no factored form:", *missed] if missed else []
        raise ValueError("\n".join([why, *listed]))
    if [s.parts for s in sites.leaves] == [()]:
        raise InputError(
            f"{rule_name(rule)} matches no leaf of `params`, which is one array of shape "
            f"{sites.leaves[0].shape}. Are the arguments in the wrong order? The parameters come "
            "first: init(key, params, *args), and apply_fn(params, *args)."
        )
    leaves = ([] if isinstance(rule, Full) else list(sites)) or sites.leaves
    raise InputError(
        f"{rule_name(rule)} matches no leaf of `params`. "
        + explain_no_match(rule.pattern, [s.path for s in leaves])
    )
