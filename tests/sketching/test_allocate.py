"""`allocate`: ranks within a budget, by the gains of a sketch."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import all_refused
from small import array, set_up, some

import jlora
from jlora import DoRA, Full, LoRA, Slots, checkpoint
from jlora._rules import matches
from jlora.extend import Rule
from jlora.initializers import eva
from jlora.types import Layout, Sketch, Spectrum

Site = tuple[int, tuple[int, int], tuple[float, ...]]  # layers, inputs and outputs, values


def spectrum(site: Site) -> Spectrum:
    layers, (inputs, outputs), values = site
    values = np.tile(sorted(values, reverse=True), (layers, 1)).astype(np.float32)
    vectors = np.random.default_rng(0).normal(size=(layers, inputs, values.shape[-1]))
    vectors = vectors.astype(np.float32)
    layout = Layout((0,), (1,), (2,))
    total = np.asarray((values**2).sum(-1) * 1.5, np.float32)
    return Spectrum(values, total, vectors, None, (layers, inputs, outputs), layout)


def of(sites: Mapping[str, Site], kind: str = "gradient") -> Sketch:
    return Sketch({path: spectrum(site) for path, site in sites.items()}, kind)


@st.composite
def some_site(draw: Any) -> Site:
    lengths = draw(st.tuples(st.integers(2, 9), st.integers(2, 9)))
    # Ties among sites and zeros are to be drawn often.
    value = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 9, width=32)
    values = draw(st.lists(value, min_size=1, max_size=min(lengths)))
    return draw(st.integers(1, 3)), lengths, tuple(values)


SITES = st.lists(some_site(), min_size=1, max_size=5).map(
    lambda sites: {f"layer{i}/kernel": site for i, site in enumerate(sites)}
)
KINDS = st.sampled_from(["gradient", "inputs"])


def costs(sites: Mapping[str, Site]) -> dict[str, int]:
    """Of one rank."""
    return {path: n * sum(lengths) for path, (n, lengths, _) in sites.items()}


def ranks_of(rules: Sequence[Rule], sites: Mapping[str, Site]) -> dict[str, int]:
    """By path; 0 for a site that no rule matches."""
    own = [rule for rule in rules if isinstance(rule, LoRA)]
    return {p: sum(rule.rank for rule in own if matches(rule, p)) for p in sites}


def spent(ranks: Mapping[str, int], sites: Mapping[str, Site]) -> int:
    return sum(costs(sites)[path] * rank for path, rank in ranks.items())


@hypothesis.given(SITES, KINDS, st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_laws(sites: dict[str, Site], kind: str, data: Any) -> None:
    cost, rule = costs(sites), LoRA("kernel", rank=2)
    budgets = sorted(
        data.draw(st.lists(st.integers(max(cost.values()), 900), min_size=2, max_size=2))
    )
    sketch = of(sites, kind)
    rules = [jlora.allocate(sketch, rule, budget=n, max_rank=4) for n in budgets]
    less, more = (ranks_of(each, sites) for each in rules)
    for ranks, budget in zip((less, more), budgets, strict=True):
        most = {path: min(4, len(values)) for path, (_, _, values) in sites.items()}
        assert all(0 <= ranks[path] <= most[path] for path in sites)
        assert spent(ranks, sites) <= budget
        open_ = [cost[path] for path in sites if ranks[path] < most[path]]
        assert not open_ or budget - spent(ranks, sites) < max(open_)
    assert all(less[path] <= more[path] for path in sites)
    turned = of(dict(reversed(sites.items())), kind)
    again = jlora.allocate(turned, rule, budget=budgets[0], max_rank=4)
    assert set(again) == set(rules[0])


@hypothesis.given(SITES, KINDS, st.integers(40, 400))
@hypothesis.example({"layer0/kernel": (1, (2, 2), (2.5e-22,))}, "inputs", 40)  # squares are tiny
@hypothesis.settings(max_examples=40, deadline=None)
def test_no_other_ranks_have_more_gain(sites: dict[str, Site], kind: str, budget: int) -> None:
    sites = dict(list(sites.items())[:3])
    cost, sketch = costs(sites), of(sites, kind)
    hypothesis.assume(max(cost.values()) <= budget)
    rules = jlora.allocate(sketch, LoRA("kernel", rank=2), budget=budget, max_rank=3)
    found = ranks_of(rules, sites)

    def gain(ranks: Sequence[int]) -> float:
        each = zip(sketch.sites.values(), ranks, strict=True)
        parts = [np.asarray(s.ratios if kind == "inputs" else s.values**2)[:, :r] for s, r in each]
        return float(sum(p.sum(dtype=np.float64) for p in parts))

    most = [range(min(3, len(values)) + 1) for _, _, values in sites.values()]
    others = [
        gain(ranks)
        for ranks in itertools.product(*most)
        if sum(map(np.prod, zip(cost.values(), ranks, strict=True))) <= spent(found, sites)
    ]
    assert gain(list(found.values())) >= max(others) * (1 - 1e-6)


FOURTH = (4.0, 3.0, 2.0, 1.0)
NARROW = {"a": (1, (16, 4), FOURTH), "b": (2, (4, 16), FOURTH)}
STEEP = {"a": (1, (8, 8), tuple(range(9, 1, -1))), "b": (1, (8, 8), (0.1, 0.1, 0.1))}
TWO_OF = LoRA(".*", rank=2)
# The sites and the kind, the rule, limits, and the ranks of a and b.
RANKS: list[Any] = [
    # All-linear rules train no more than a weight has: rank 4 of 16 × 4 would take 80 of 64.
    *((NARROW, "gradient", LoRA(), given, (3, 3)) for given in ({}, {"budget": 1000})),
    *((NARROW, "gradient", LoRA(".*"), given, (4, 4)) for given in ({}, {"budget": 1000})),
    (STEEP, "gradient", TWO_OF, {}, (4, 0)),  # as many as by the rules, twice the rank at most
    (STEEP, "gradient", TWO_OF, {"budget": 999}, (4, 3)),
    (STEEP, "gradient", TWO_OF, {"budget": 999, "max_rank": 6}, (6, 3)),
    (STEEP, "gradient", TWO_OF, {"budget": 48, "min_rank": 1}, (2, 1)),
    (STEEP, "gradient", TWO_OF, {"budget": 33, "min_rank": 1}, (1, 1)),
]


@pytest.mark.parametrize(("sites", "kind", "rule", "given", "ranks"), RANKS)
def test_ranks(sites: Any, kind: str, rule: Any, given: Any, ranks: Any) -> None:
    rules = jlora.allocate(of(sites, kind), rule, **given)
    assert ranks_of(rules, sites) == dict(zip("ab", ranks, strict=True))


# ----------------------------------------------------------------------------------------- as rules


SCAN: dict[str, Site] = {"up": (3, (6, 5), (4, 3, 2, 1)), "down": (3, (5, 6), (4, 3, 2, 1))}
RULES = [LoRA(rank=2, alpha=6), LoRA(rank=2, rslora=True), DoRA(rank=2)]


def scan(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["up"]) @ p["down"], None), x, p)[0]


@pytest.mark.parametrize("rule", some(RULES, RULES[2]))
def test_its_rules_give_those_ranks(rule: LoRA, tmp_path: Any) -> None:
    """And the scale of the rule; a checkpoint keeps them."""
    params, x = {path: array(3, *lengths) for path, (_, lengths, _) in SCAN.items()}, array(2, 6)
    sketch = of(SCAN, "inputs")
    rule = dataclasses.replace(rule, init=eva(sketch))
    rules = jlora.allocate(sketch, rule, budget=170)
    _, base, adapter = set_up(scan, rules, params, x)
    assert {path: node.a.shape[-1] for path, node in adapter.items()} == ranks_of(rules, SCAN)
    for path, node in adapter.items():
        np.testing.assert_allclose(node.scale, rule.scale)
        np.testing.assert_array_equal(node.a, sketch.sites[path].inputs[..., : node.a.shape[-1]])
    least = jlora.allocate(sketch, rule, budget=jlora.count(adapter))
    assert least == rules  # `budget` counts what is trained

    checkpoint.save(tmp_path / "a", adapter, rules, base=base)
    saved = checkpoint.read(tmp_path / "a").rules
    assert [dataclasses.replace(r, init=rule.init) for r in saved] == list(rules)
    assert "eva" in saved[0].init.name  # whose sketch a checkpoint has not


def test_other_rules_keep_their_places() -> None:
    """Paths are no patterns: each is escaped."""
    sites = {"a[0]/kernel": (1, (4, 4), (3.0, 2.0)), "b/kernel": (1, (4, 4), (1.0, 0.5))}
    given = (
        Full("norm"),
        LoRA("a.*/kernel", rank=1),
        Full("bias"),
        LoRA("kernel", rank=3, alpha=3),
    )
    assert jlora.allocate(of(sites), given, budget=24) == (
        Full("norm"),
        LoRA(r"^a\[0\]/kernel$", rank=2, alpha=64),
        Full("bias"),
        LoRA("^b/kernel$", rank=1, alpha=1),
    )


@pytest.mark.parametrize("first", some([0, 1], 1))
def test_all_linear_rules_are_for_no_embedding(first: int) -> None:
    """As in `transform`, whatever sites the sketch has."""
    ids, params = jnp.arange(6), {"embed": array(9, 4), "w": array(4, 5)}
    model = lambda p, ids: p["embed"][ids] @ p["w"]  # noqa: E731
    loss = lambda p, ids: (model(p, ids) ** 2).sum()  # noqa: E731
    each = [LoRA(rank=1), LoRA("embed", rank=2)]
    rules = [each[first], each[1 - first]]
    sketch = jlora.sketch(loss, params, rules, [ids], kind="gradient")
    found = {rule.pattern: rule.scale for rule in jlora.allocate(sketch, rules)}
    assert found == {"^w$": each[0].scale, "^embed$": each[1].scale}
    assert [rule.pattern for rule in jlora.allocate(sketch, each[0])] == ["^w$"]


# ---------------------------------------------------------------------------------------- refusals

TWO: dict[str, Site] = {"a": (1, (4, 4), (3.0, 2.0)), "head": (1, (4, 4), (0.5,))}


def given(rules: Any = LoRA(".*"), **given: Any) -> Any:  # noqa: B008
    return lambda: jlora.allocate(of(TWO), rules, **given)


FEW = LoRA(".*", rank=1), Full("head")
REFUSED: dict[type[Exception], dict[str, Any]] = {
    ValueError: {
        "`budget` ... must be at least 8, ... got 7": given(budget=7),
        "`budget` ... the parameters of `min_rank` 1; got 9": given(budget=9, min_rank=1),
        "`max_rank` ... at least 2": given(min_rank=2, max_rank=1),
        "LoRA('b') matches no site of `sketch`. Near misses:": given(LoRA("b")),
        "'head' has rank 0, so Full('head') would match it": given(FEW, budget=8),
        "slots (0,) of 2, but the sketch of 'a' has (0,) of 1": given(
            LoRA(".*", slots=Slots(2, (0,)))
        ),
    },
    TypeError: {
        "`rules` ... got 3.": given(3),
        "`sketch` ... got {}": lambda: jlora.allocate({}, LoRA(".*")),  # pyright: ignore
    },
}


test_refused = all_refused(REFUSED)
