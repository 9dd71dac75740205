"""`allocate`: ranks within a budget, by the gains of a sketch."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import KEY, array, each_refusal, some

import jlora
from jlora import DoRA, Full, LoRA, Slots, checkpoint, peft
from jlora.initializers import eva
from jlora.types import Allocation, Layout, Sketch, Spectrum

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


def spent(allocation: Allocation) -> int:
    return sum(allocation.parameters.values())


@hypothesis.given(SITES, KINDS, st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_laws(sites: dict[str, Site], kind: str, data: Any) -> None:
    cost, rule = costs(sites), LoRA("kernel", rank=2)
    budgets = sorted(
        data.draw(st.lists(st.integers(max(cost.values()), 900), min_size=2, max_size=2))
    )
    sketch = of(sites, kind)
    less, more = (jlora.allocate(sketch, rule, budget=n, max_rank=4) for n in budgets)
    for allocation, budget in zip((less, more), budgets, strict=True):
        ranks = allocation.ranks
        most = {path: min(4, len(values)) for path, (_, _, values) in sites.items()}
        assert all(0 <= ranks[path] <= most[path] for path in sites)
        assert spent(allocation) == sum(cost[path] * ranks[path] for path in sites) <= budget
        open_ = [cost[path] for path in sites if ranks[path] < most[path]]
        assert not open_ or budget - spent(allocation) < max(open_)
        assert Allocation.from_json(allocation.to_json(), rule) == allocation
    assert all(less.ranks[path] <= more.ranks[path] for path in sites)
    turned = of(dict(reversed(sites.items())), kind)
    assert jlora.allocate(turned, rule, budget=budgets[0], max_rank=4).ranks == less.ranks


@hypothesis.given(SITES, KINDS, st.integers(40, 400))
@hypothesis.example({"layer0/kernel": (1, (2, 2), (2.5e-22,))}, "inputs", 40)  # squares are tiny
@hypothesis.settings(max_examples=40, deadline=None)
def test_no_other_ranks_have_more_gain(sites: dict[str, Site], kind: str, budget: int) -> None:
    sites = dict(list(sites.items())[:3])
    cost, sketch = costs(sites), of(sites, kind)
    hypothesis.assume(max(cost.values()) <= budget)
    found = jlora.allocate(sketch, LoRA("kernel", rank=2), budget=budget, max_rank=3)

    def gain(ranks: Sequence[int]) -> float:
        each = zip(sketch.sites.values(), ranks, strict=True)
        parts = [np.asarray(s.ratios if kind == "inputs" else s.values**2)[:, :r] for s, r in each]
        return float(sum(p.sum(dtype=np.float64) for p in parts))

    most = [range(min(3, len(values)) + 1) for _, _, values in sites.values()]
    others = [
        gain(ranks)
        for ranks in itertools.product(*most)
        if sum(map(np.prod, zip(cost.values(), ranks, strict=True))) <= spent(found)
    ]
    assert gain(list(found.ranks.values())) >= max(others) * (1 - 1e-6)


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
    assert jlora.allocate(of(sites, kind), rule, **given).ranks == dict(
        zip("ab", ranks, strict=True)
    )


# ----------------------------------------------------------------------------------------- as rules


SCAN: dict[str, Site] = {"up": (3, (6, 5), (4, 3, 2, 1)), "down": (3, (5, 6), (4, 3, 2, 1))}
RULES = [LoRA(rank=2, alpha=6), LoRA(rank=2, rslora=True), DoRA(rank=2)]


def scan(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["up"]) @ p["down"], None), x, p)[0]


@pytest.mark.parametrize("rule", some(RULES, RULES[2]))
def test_its_rules_give_those_ranks(rule: LoRA, tmp_path: Any) -> None:
    """And the scale of the rule; what is trained is what the table says; a checkpoint takes it."""
    params, x = {path: array(3, *lengths) for path, (_, lengths, _) in SCAN.items()}, array(2, 6)
    sketch = of(SCAN, "inputs")
    rule = dataclasses.replace(rule, init=eva(sketch))
    allocation = jlora.allocate(sketch, rule, budget=170).with_ranks({"up": 1, "down": 3})
    base, adapter = jlora.transform(scan, *allocation).init(KEY, params, x)
    assert {path: node.a.shape[-1] for path, node in adapter.items()} == allocation.ranks
    for path, node in adapter.items():
        np.testing.assert_allclose(node.scale, rule.scale)
        np.testing.assert_array_equal(node.a, sketch.sites[path].inputs[..., : node.a.shape[-1]])
    assert jlora.count(adapter) == spent(allocation)
    dropped = jlora.transform(scan, *allocation.with_ranks({"up": 0}))
    assert list(dropped.init(KEY, params, x)[1]) == ["down"]

    checkpoint.save(tmp_path / "a", adapter, allocation, base=base)
    rules = checkpoint.read(tmp_path / "a").rules
    assert [(r.pattern, r.rank) for r in rules] == [(r.pattern, r.rank) for r in allocation]
    assert "eva" in rules[0].init.name  # whose sketch a checkpoint has not


def test_other_rules_keep_their_places() -> None:
    """Paths are no patterns: each is escaped."""
    sites = {"a[0]/kernel": (1, (4, 4), (3.0, 2.0)), "b/kernel": (1, (4, 4), (1.0, 0.5))}
    given = (
        Full("norm"),
        LoRA("a.*/kernel", rank=1),
        Full("bias"),
        LoRA("kernel", rank=3, alpha=3),
    )
    allocation = jlora.allocate(of(sites), given, budget=24)
    assert list(allocation) == [
        Full("norm"),
        LoRA(r"^a\[0\]/kernel$", rank=2, alpha=64),
        Full("bias"),
        LoRA("^b/kernel$", rank=1, alpha=1),
    ]
    assert len(allocation) == 4
    assert allocation[3:] == (LoRA("^b/kernel$", rank=1, alpha=1),)


def test_pefts_files_have_the_ranks(tmp_path: Any) -> None:
    """As patterns, and alpha / r stays."""
    params = {f"layer{i}": array(6, 6) for i in range(3)}
    sketch = of(dict.fromkeys(params, (1, (6, 6), (4, 3, 2, 1))))
    ranks = {"layer0": 0, "layer1": 1, "layer2": 4}
    allocation = jlora.allocate(sketch, LoRA(rank=2, alpha=3)).with_ranks(ranks)
    lora = jlora.transform(lambda p, x: [x @ w for w in p.values()], *allocation)
    base, adapter = lora.init(KEY, params, array(12, 6))
    names = [peft.Name(r"layer(\d)", r"layers.\1", "io")]
    peft.save(tmp_path / "a", base, adapter, names)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())

    def of_modules(patterns: str, default: str) -> list[float]:
        """As PEFT reads them."""
        found = config[patterns].items()
        match = lambda k, m: re.match(rf"(.*\.)?({k})$", m)  # noqa: E731
        modules = ("layers.1", "layers.2")
        return [next((v for k, v in found if match(k, m)), config[default]) for m in modules]

    assert of_modules("rank_pattern", "r") == [1, 4]
    assert of_modules("alpha_pattern", "lora_alpha") == [1.5, 6]
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path / "a", base, names), adapter)


# ---------------------------------------------------------------------------------------- refusals

TWO: dict[str, Site] = {"a": (1, (4, 4), (3.0, 2.0)), "head": (1, (4, 4), (0.5,))}


def refused(rules: Any = LoRA(".*"), **given: Any) -> Any:  # noqa: B008
    return lambda: jlora.allocate(of(TWO), rules, **given)


def edited(**ranks: int) -> Any:
    return lambda: jlora.allocate(of(TWO), LoRA(".*", rank=1)).with_ranks(ranks)


def read(text: str | None = None, rules: Any = LoRA(".*"), **changed: Any) -> Any:  # noqa: B008
    """Reads JSON; by default that of an allocation, its first site changed."""

    def provoke() -> Allocation:
        fields = json.loads(jlora.allocate(of(TWO), LoRA(".*", rank=1)).to_json())
        fields["sites"][0] |= changed
        return Allocation.from_json(json.dumps(fields) if text is None else text, rules)

    return provoke


REFUSED: dict[type[Exception], dict[str, Any]] = {
    ValueError: {
        "`budget` must be at least 8, .* the first rank; got 7": refused(budget=7),
        "at least 16, the parameters of `min_rank` 1; got 9": refused(budget=9, min_rank=1),
        r"`max_rank` must .* at least 2": refused(min_rank=2, max_rank=1),
        r"LoRA\('b'\) matches no site of `sketch`. Near misses: ": refused(LoRA("b")),
        r"'head' has rank 0, so Full\('head'\) would match it. Narrow": refused(
            (LoRA(".*", rank=1), Full("head")), budget=8
        ),
        r"has the slots \(0,\) of 2, but the sketch of 'a' has \(0,\) of 1": refused(
            LoRA(".*", slots=Slots(2, (0,)))
        ),
        r"`ranks` has 'b', which is not a site. Near misses: ": edited(b=1),
        r"the rank of 'a' must be an integer in \[0, 4\]; got 5": edited(a=5),
        r"`text` is not valid JSON: maximum recursion": read("[" * 10**5),
        r"`text` is not valid JSON: Exceeds the limit": read("9" * 10**5),
        "must be a JSON object whose `format` is 1": read("{}"),
        "`sites` of `text` must be a list": read('{"format": 1, "sites": {}}'),
        "site 0 of `text` must be an object with path, rank": read('{"format": 1, "sites": [3]}'),
        "has 16777217 characters; at most 16777216 are read": read(" " * (2**24 + 1)),
        "site 0 of `text` must be an object with path": read(more=1),
        "`path` of site 0 of `text` must be a string; got 3": read(path=3),
        "`rank` of site 0 of `text` must be an integer; got True": read(rank=True),
        "`score` of site 0 of `text` must be a finite .* got nan": read(score=float("nan")),
        r"`shape` of .* must be a list of lengths; got \[1, 4, 118": read(shape=[1, 4, 2**70]),
        "outputs` of site 0 of `text` must have each axis once": read(shape=[4, 4]),
        "of site 0 of `text` must have each axis once": read(inputs=[0]),
        r"`slots` of .* that `count` divides; got \[3, \[0\], 2\]": read(slots=[3, [0], 2]),
        r"`slots` of .* that `count` divides; got \[2, \[0\], 1\]": read(slots=[2, [0], 1]),
        "`chosen` of Slots must be in": read(slots=[2, [2], 2]),
        "`shares` must have each site once": read(path="head"),
        "no LoRA or DoRA of `rules` matches 'head'": read(rules=LoRA("^a")),
    },
    TypeError: {
        r"`rules` must be rules, such as jlora.LoRA\(\); got 3\.": refused(3),
        r"`sketch` must be one from jlora.sketch; got {}": lambda: jlora.allocate(
            {},  # pyright: ignore[reportArgumentType]
            LoRA(".*"),
        ),
        "`text` must be a string of JSON": read(3),  # pyright: ignore[reportArgumentType]
    },
}


@each_refusal(REFUSED)
def test_refused(provoke: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        provoke()
