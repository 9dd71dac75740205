"""Which rule each leaf gets, and the errors of rules that do nothing or cannot apply."""

import dataclasses
import re
from collections.abc import Sequence

import jax.numpy as jnp

from ._rules import Full, LoRA, Rule, matches, near, rule_name
from ._sites import Site, Sites
from ._tree import name_of
from ._types import Layout


def match(sites: Sites, rules: Sequence[Rule]) -> Sites:
    """Gives each leaf the first rule that it matches; raises where one does nothing or cannot."""
    matched = tuple(_match(site, rules, sites) for site in sites.leaves)
    for i, rule in enumerate(rules):
        if rule in rules[:i] or not any(s.rule is rule for s in matched):
            _raise_idle(rule, sites, matched)
    return Sites(matched)


def is_named(rules: Sequence[Rule], path: str) -> bool:
    """Whether some `LoRA` may take the leaf at `path`."""
    return any(isinstance(r, LoRA) and (r.pattern is None or matches(r, path)) for r in rules)


def _takes(rule: Rule, site: Site) -> bool:
    if rule.pattern is None:
        return site.kind in ("dense", "conv")
    return matches(rule, site.path)


def _match(site: Site, rules: Sequence[Rule], sites: Sites) -> Site:
    rule = next((r for r in rules if _takes(r, site)), None)
    if rule is None:
        return site
    if isinstance(rule, Full):
        if not jnp.issubdtype(site.dtype, jnp.inexact):
            raise ValueError(
                f"{rule_name(rule)} matches {_name(site)} of dtype {site.dtype}, which cannot be "
                "trained. Narrow the pattern to floating-point leaves."
            )
        return dataclasses.replace(site, rule=rule)
    if site.layout is None and rule.materialize and site.formed is not None:
        site = dataclasses.replace(site, kind="formed", layout=site.formed)
    if site.layout is None:
        raise ValueError(_not_linear(rule, site, sites))
    if site.others and not rule.materialize:
        raise NotImplementedError(
            f"{rule_name(rule)} matches {_name(site)}, which the model also uses where W + s·A·B "
            f"has no factored form: {'; '.join(site.others)}. Leave it out of the rules, or "
            "let W + ΔW be formed there with LoRA(..., materialize=True): exact, but at full "
            "memory and time."
        )
    layout = site.layout if rule.slots is None else _slotted(rule, site)
    site = dataclasses.replace(site, rule=rule, layout=layout)
    smaller = min(site.inputs, site.outputs // (rule.slots.count if rule.slots else 1))
    if rule.rank > smaller:
        raise ValueError(
            f"`rank` of {rule_name(rule)} is {rule.rank}, above min(inputs, outputs) = {smaller} "
            f"of {_name(site)} with shape {site.shape}. Lower the rank, or put a rule of its own "
            f"for this leaf first, such as jlora.Full({re.escape(site.path)!r})."
        )
    return site


def _slotted(rule: LoRA, site: Site) -> Layout:
    assert rule.slots is not None and site.layout is not None
    outputs, slots = site.layout.outputs, rule.slots
    if not 0 <= slots.axis < len(outputs):
        raise ValueError(
            f"`axis` of Slots is {slots.axis}, but {_name(site)} has {len(outputs)} output axes; "
            f"it must lie in [0, {len(outputs)})."
        )
    axis = outputs[slots.axis]
    if site.shape[axis] % slots.count:
        raise ValueError(
            f"`count` of Slots is {slots.count}, which does not divide the {site.shape[axis]} "
            f"outputs of {_name(site)} with shape {site.shape}."
        )
    return site.layout._replace(slots=(slots.count, slots.chosen, axis))


def _name(site: Site) -> str:
    return repr(site.path) if site.parts else name_of(site.parts)


def _not_linear(rule: LoRA, site: Site, sites: Sites) -> str:
    remedy = "Narrow the pattern, or train the leaf in full with jlora.Full."
    if not jnp.issubdtype(site.dtype, jnp.floating):
        why, remedy = f"is not floating-point ({site.dtype})", "Narrow the pattern."
    elif len(site.shape) < 2:
        why = f"is no matrix (shape {site.shape})"
        if better := _better(rule, site, sites):
            remedy = (
                f"Narrow the pattern (did you mean {better!r}?), or train the leaf in full with "
                "jlora.Full."
            )
    elif site.others:
        why = "is used only by " + "; ".join(site.others)
        remedy = (
            "Narrow the pattern, train the leaf in full with jlora.Full, or let W + ΔW be formed "
            "with LoRA(..., materialize=True)."
        )
    else:
        why = "is not used by the traced call"
    return (
        f"{rule_name(rule)} matches {_name(site)} of shape {site.shape}, which is used by nothing "
        f"linear: it {why}. {remedy}"
    )


def _better(rule: LoRA, site: Site, sites: Sites) -> str | None:
    """A pattern like that of `rule` for the sites that it matches, or those beside `site`."""
    if rule.pattern is None or not site.parts:
        return None
    beside = [s for s in sites if s.parts[:-1] == site.parts[:-1] or matches(rule, s.path)]
    mine = rf"\b{re.escape(site.parts[-1])}\b"
    for name in dict.fromkeys(re.escape(s.parts[-1]) for s in beside if s.parts):
        renamed = re.sub(mine, lambda _, name=name: name, rule.pattern)
        for pattern in (renamed, f"{rule.pattern}/.*{name}", f"{rule.pattern}.*{name}"):
            if _hits_sites(pattern, sites):
                return pattern
    return None


def _hits_sites(pattern: str, sites: Sites) -> bool:
    """Whether `pattern`, which may be no regular expression, matches sites and nothing else."""
    try:
        hits = [s for s in sites.leaves if re.search(pattern, s.path)]
    except re.error:
        return False
    return bool(hits) and all(s.layout is not None for s in hits)


def _raise_idle(rule: Rule, sites: Sites, matched: Sequence[Site]) -> None:
    taken = [s for s in matched if s.rule is not None and _takes(rule, s)]
    if taken:
        earlier = ", ".join(dict.fromkeys(rule_name(s.rule) for s in taken if s.rule is not None))
        raise ValueError(
            f"{rule_name(rule)} is left with no leaf: earlier rules take all {len(taken)} that it "
            f"matches ({earlier}). The first match wins; reorder the rules or drop this one."
        )
    if rule.pattern is None:
        raise ValueError(
            "LoRA() without a pattern adapts every dense and conv site, but the model has none. "
            "Name leaves by a pattern; print(transform(apply_fn).sites(...)) lists the sites."
        )
    wanted = (list(sites) if isinstance(rule, LoRA) else []) or sites.leaves
    raise ValueError(
        f"{rule_name(rule)} matches no leaf of `params`. "
        + near(rule.pattern, [s.path for s in wanted])
    )
