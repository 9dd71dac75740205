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
from sketch_models import MODELS, normal
from small import some

import jlora
from jlora import DoRA, Full, LoRA, Slots, checkpoint, peft
from jlora.initializers import eva
from jlora.types import Allocation, Layout, Sketch, Spectrum

Site = tuple[int, tuple[int, int], tuple[float, ...]]  # layers, inputs and outputs, values


def spectrum(site: Site) -> Spectrum:
    layers, (inputs, outputs), values = site
    values = np.tile(sorted(values, reverse=True), (layers, 1)).astype(np.float32)
    vectors = np.zeros((layers, inputs, values.shape[-1]), np.float32)
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


def test_by_gain_for_each_parameter() -> None:
    """Of one gain the smaller site comes first, of one site the layers count together."""
    sites = {"a": (1, (4, 4), (3.0, 2.0)), "b": (1, (8, 8), (3.0, 2.9)), "c": (3, (4, 4), (2, 1))}
    order = []
    for budget in range(8, 120):
        ranks = jlora.allocate(of(sites), LoRA(".*", rank=1), budget=budget).ranks
        order += [path for path, r in ranks.items() for _ in range(r - order.count(path))]
    # 9/8, 9/16, 8.41/16, 4/8, 12/24 and 3/24
    assert order == ["a", "b", "b", "a", "c", "c"]


def test_of_inputs_it_is_by_explained_variance() -> None:
    """Whatever their size."""
    sites = {"a": (1, (4, 4), (3.0, 2.0, 1.0)), "b": (1, (4, 4), (300.0, 100.0, 1.0))}
    f = lambda kind: jlora.allocate(of(sites, kind), LoRA(".*", rank=2), budget=24)  # noqa: E731
    assert f("inputs").ranks == {"a": 2, "b": 1}
    assert f("gradient").ranks == {"a": 1, "b": 2}


def test_all_linear_rules_train_no_more_than_a_weight_has() -> None:
    """Rank 4 of 16 × 4 would train 80 parameters for 64; a rule with a pattern may."""
    sketch = of({"a": (1, (16, 4), (4.0, 3.0, 2.0, 1.0)), "b": (2, (4, 16), (4.0, 3.0, 2.0, 1.0))})
    for rule, rank in ((LoRA(), 3), (LoRA(".*"), 4)):
        assert jlora.allocate(sketch, rule, budget=1000).ranks == {"a": rank, "b": rank}
        assert jlora.allocate(sketch, rule).ranks == {"a": rank, "b": rank}


def test_limits() -> None:
    sites = {"a": (1, (8, 8), tuple(range(9, 1, -1))), "b": (1, (8, 8), (0.1, 0.1, 0.1))}
    f = lambda **given: jlora.allocate(of(sites), LoRA(".*", rank=2), **given).ranks  # noqa: E731
    assert f() == {"a": 4, "b": 0}  # as many parameters as by the rules, twice the rank at most
    assert f(budget=999) == {"a": 4, "b": 3}
    assert f(budget=999, max_rank=6) == {"a": 6, "b": 3}
    assert f(budget=48, min_rank=1) == {"a": 2, "b": 1}
    assert f(budget=33, min_rank=1) == {"a": 1, "b": 1}


# ----------------------------------------------------------------------------------------- as rules


@pytest.mark.parametrize(
    "rule", some([LoRA(rank=2, alpha=6), LoRA(rank=2, rslora=True), DoRA(rank=2)], DoRA(rank=2))
)
def test_its_rules_give_those_ranks(rule: LoRA) -> None:
    """And the scale of the rule; what is trained is what the table says."""
    model = MODELS["scan"]()
    batch = model.batch(1)
    sketch = jlora.sketch(model.loss, model.params, rule, [batch], kind="inputs")
    rule = dataclasses.replace(rule, init=eva(sketch))
    allocation = jlora.allocate(sketch, rule, budget=170).with_ranks({"up": 1, "down": 3})
    lora = jlora.transform(model.apply, *allocation)
    _, adapter = lora.init(jax.random.key(0), model.params, batch)
    assert {path: node.a.shape[-1] for path, node in adapter.items()} == allocation.ranks
    for path, node in adapter.items():
        np.testing.assert_allclose(node.scale, rule.scale)
        np.testing.assert_array_equal(node.a, sketch.sites[path].inputs[..., : node.a.shape[-1]])
    assert jlora.count(adapter) == spent(allocation)
    dropped = jlora.transform(model.apply, *allocation.with_ranks({"up": 0}))
    assert list(dropped.init(jax.random.key(0), model.params, batch)[1]) == ["down"]


@pytest.mark.slow
def test_a_checkpoint_takes_it_for_rules(tmp_path: Any) -> None:
    """And says of the start what it was, whose sketch it has not."""
    model = MODELS["scan"]()
    batch, rule = model.batch(1), model.rules[0]
    sketch = jlora.sketch(model.loss, model.params, rule, [batch], kind="inputs")
    allocation = jlora.allocate(sketch, dataclasses.replace(rule, init=eva(sketch)))
    base, adapter = jlora.transform(model.apply, *allocation).init(
        jax.random.key(0), model.params, batch
    )
    checkpoint.save(tmp_path / "a", adapter, allocation, base=base)
    rules = checkpoint.read(tmp_path / "a").rules
    assert [(r.pattern, r.rank) for r in rules] == [(r.pattern, r.rank) for r in allocation]
    assert "eva" in rules[0].init.name
    restored = checkpoint.restore(tmp_path / "a", base=base)
    jax.tree.map(np.testing.assert_array_equal, restored, adapter)


def test_other_rules_keep_their_places() -> None:
    sites = {"a/kernel": (1, (4, 4), (3.0, 2.0)), "b/kernel": (1, (4, 4), (1.0, 0.5))}
    given = (Full("norm"), LoRA("a/kernel", rank=1), Full("bias"), LoRA("kernel", rank=3, alpha=3))
    allocation = jlora.allocate(of(sites), given, budget=24)
    assert list(allocation) == [
        Full("norm"),
        LoRA("^a/kernel$", rank=2, alpha=32),
        Full("bias"),
        LoRA("^b/kernel$", rank=1, alpha=1),
    ]
    assert len(allocation) == 4
    assert allocation[1:2] == (LoRA("^a/kernel$", rank=2, alpha=32),)


def test_paths_are_no_patterns() -> None:
    sites = {"a.b[0]/w": (1, (4, 4), (3.0,)), "aXb0/w": (1, (4, 4), (0.1,))}
    allocation = jlora.allocate(of(sites), LoRA("w", rank=1), budget=8)
    model = lambda p, x: x @ p["a.b[0]"]["w"] @ p["aXb0"]["w"]  # noqa: E731
    params = {"a.b[0]": {"w": jnp.eye(4)}, "aXb0": {"w": jnp.eye(4)}}
    _, adapter = jlora.transform(model, *allocation).init(jax.random.key(0), params, jnp.eye(4))
    assert list(adapter) == ["a.b[0]"]


def test_pefts_files_have_the_ranks(tmp_path: Any) -> None:
    """As patterns, and alpha / r stays."""
    params = {f"layer{i}": normal(i, 6, 6) * 4**-i for i in range(3)}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        for i in range(3):
            x = jnp.tanh(x @ p[f"layer{i}"])
        return x

    loss = lambda p, x: jnp.sum(apply(p, x) ** 2)  # noqa: E731
    x, rule = normal(9, 12, 6), LoRA(rank=2, alpha=3)
    sketch = jlora.sketch(loss, params, rule, [x], kind="gradient")
    allocation = jlora.allocate(sketch, rule).with_ranks({"layer0": 0, "layer1": 1, "layer2": 4})
    lora = jlora.transform(apply, *allocation)
    base, adapter = lora.init(jax.random.key(0), params, x)
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


def test_table() -> None:
    sites = {"a": (1, (40, 60), (3.0, 2.0)), "b": (1, (40, 60), (1.0, 0.5))}
    assert str(jlora.allocate(of(sites), LoRA(".*", rank=1), budget=201)).splitlines() == [
        "site  score  rank  parameters",
        "─────────────────────────────",
        "a        13     2         200",
        "b      1.25     0           0",
        "─────────────────────────────",
        "1 of 2 sites; 200 parameters",
    ]


# ---------------------------------------------------------------------------------------- refusals

TWO: dict[str, Site] = {"a": (1, (4, 4), (3.0, 2.0)), "head": (1, (4, 4), (0.5,))}


@pytest.mark.parametrize(
    ("rules", "given", "error", "message"),
    [
        (LoRA(".*"), {"budget": 7}, ValueError, "`budget` is 7; the first rank takes 8 parameters"),
        (LoRA(".*"), {"budget": 9, "min_rank": 1}, ValueError, "`min_rank` 1 takes 16 parameters"),
        (LoRA(".*"), {"budget": 1.5}, ValueError, "`budget` must be an integer of at least 1"),
        (LoRA(".*"), {"min_rank": None}, ValueError, "`min_rank` must be an integer of at least 0"),
        (LoRA(".*"), {"min_rank": 2, "max_rank": 1}, ValueError, r"`max_rank` must .* at least 2"),
        (LoRA("b"), {}, ValueError, r"LoRA\('b'\) takes no site of `sketch`. Near misses: "),
        ((LoRA(".*"), LoRA("a")), {}, ValueError, r"LoRA\('a'\) takes no site of `sketch`"),
        (3, {}, TypeError, r"`rules` must be rules, such as jlora.LoRA\(\); got 3\."),
        (
            (LoRA(".*", rank=1), Full("head")),
            {"budget": 8},
            ValueError,
            r"'head' has rank 0, which would leave it to Full\('head'\). Narrow",
        ),
        (
            LoRA(".*", slots=Slots(2, (0,))),
            {},
            ValueError,
            r"has other slots than 'a' had in the sketch: \(0,\) of 2, not \(0,\) of 1",
        ),
    ],
)
def test_refused(rules: Any, given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        jlora.allocate(of(TWO), rules, **given)


def test_edits_are_checked() -> None:
    allocation = jlora.allocate(of(TWO), LoRA(".*", rank=1))
    with pytest.raises(ValueError, match=r"`ranks` has 'b'. Near misses: "):
        allocation.with_ranks({"b": 1})
    with pytest.raises(ValueError, match=r"the rank of 'a' must be an integer in \[0, 4\]; got 5"):
        allocation.with_ranks({"a": 5})
    with pytest.raises(TypeError, match=r"`sketch` must be one from jlora.sketch; got {}"):
        jlora.allocate({}, LoRA(".*"))  # pyright: ignore[reportArgumentType]


def edited(**changed: Any) -> str:
    """The JSON of an allocation, its first site changed."""
    fields = json.loads(jlora.allocate(of(TWO), LoRA(".*", rank=1)).to_json())
    fields["sites"][0] |= changed
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no valid JSON"),
        ("[" * 10**5, "is no valid JSON"),
        ("9" * 10**5, "is no valid JSON"),
        ("{}", "must be a JSON object whose `format` is 1"),
        ('{"format": 1, "sites": {}}', "`sites` of `text` must be a list"),
        ('{"format": 1, "sites": [3]}', "site 0 of `text` must be an object with path, rank"),
        (" " * (2**24 + 1), "has 16777217 characters; at most 16777216 are read"),
        (edited(more=1), "site 0 of `text` must be an object with path"),
        (edited(path=3), "`path` of site 0 of `text` is 3"),
        (edited(rank=True), "`rank` of site 0 of `text` is True"),
        (edited(rank=10**9), r"the rank of 'a' must be an integer in \[0, 4\]; got 1000000000"),
        (edited(rank=-1), r"the rank of 'a' must be an integer in \[0, 4\]; got -1"),
        (edited(score=float("nan")), "`score` of site 0 of `text` is nan"),
        (edited(shape=[1, 4, 4.0]), "`shape` of site 0 of `text` is"),
        (edited(shape=[1, 4, 2**70]), "`shape` of site 0 of `text` is"),
        (edited(shape=[4, 4]), "of site 0 of `text` must have each axis once"),
        (edited(inputs=[0]), "of site 0 of `text` must have each axis once"),
        (edited(slots=[3, [0], 2]), r"`slots` of site 0 of `text` is \[3, \[0\], 2\]"),
        (edited(slots=[2, [0], 1]), r"`slots` of site 0 of `text` is \[2, \[0\], 1\]"),
        (edited(slots=[2, [2], 2]), "`chosen` of Slots must lie in"),
        (edited(path="head"), "`shares` has a site twice"),
    ],
)
def test_json_is_checked(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allocation.from_json(text, LoRA(".*", rank=1))


def test_json_is_of_a_string_and_of_rules_that_take_its_sites() -> None:
    with pytest.raises(TypeError, match="`text` must be a string of JSON; got b''"):
        Allocation.from_json(b"", LoRA(".*"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no LoRA or DoRA of `rules` takes 'head'"):
        Allocation.from_json(edited(), LoRA("^a"))
