"""A pattern matches whole components of a path, whoever takes it."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from messages import refused
from own_methods import Gain
from small import some_rows

import jlora
from jlora import NF4, DoRA, Frozen, Full, LoRA, Rows
from jlora._rules import compile_pattern, matches, pattern_anywhere

PATHS = (
    "encoder/layers_0/query/kernel",
    "encoder/layers_12/value/kernel",
    "multi_head/q_proj/kernel",
    "embed_tokens/kernel",
    "head/kernel",
)
PARAMS = jlora._tree.nest({tuple(path.split("/")): jnp.ones((32, 64)) for path in PATHS})
X, IDS = jnp.ones((1, 32)), jnp.arange(2)
PATTERNS = {  # and which of the paths it matches
    "head": [4],
    "kernel": [0, 1, 2, 3, 4],
    "kernel$": [0, 1, 2, 3, 4],
    "^encoder": [0, 1],
    "^head/kernel$": [4],
    "layers_[02]": [0],
    "layers_.*/kernel": [0, 1],
    "encoder/.*": [0, 1],
    "(query|value)/kernel": [0, 1],
    "query|head": [0, 4],
    ".*_proj/kernel": [2],
    ".*head": [2, 4],
    "(?:multi_)?head": [2, 4],
    "embed_tokens": [3],
    r"(e)mb\1d_\w+": [3],
    "(?<!query/)kernel": [1, 2, 3, 4],
    "encoder/(?!layers_0).*": [1],
    "(?!head)[^/]+/kernel": [0, 1, 2, 3],
    "^(?!head).*": [0, 1, 2, 3],
    "(?!nothing).*/query|embed_tokens|head": [0, 3, 4],
    ".*[^d]/kernel": [0, 1, 2, 3],
    "(?i)HEAD": [4],
    "(?i)(?s)HEAD|QUERY": [0, 4],
    "(?x) head  # in full": [4],
    "(?x: he ad )": [4],
}


def multiply(params: Any, x: Any) -> Any:
    """A product with each leaf."""
    return sum(x @ w for w in jax.tree.leaves(params))


def loss(params: Any, x: Any) -> Any:
    """Squares of each product."""
    return sum(jnp.sum((x @ w) ** 2) for w in jax.tree.leaves(params))


def take_by_rules(*rules: Any, use: Callable[[Any], Any] = lambda w: X @ w) -> list[str]:
    """The leaves that rules take."""
    lora = jlora.transform(lambda params, x: sum(map(use, jax.tree.leaves(params))), *rules)
    return [site.path for site in lora.sites(PARAMS, X).leaves if site.rule]


def take_by_scheme(pattern: str) -> list[str]:
    """The leaves that a scheme takes."""
    found = jlora.summary(jlora.quantize(PARAMS, NF4(pattern)))
    return ["/".join(entry.path) for entry in found.quantized]


@functools.cache
def sketch(*rules: Any) -> jlora.types.Sketch:
    """That of the sites that rules take."""
    return jlora.sketch(loss, PARAMS, rules, [X], kind="gradient")


def take_by_rank(pattern: str) -> list[str]:
    """The sites that get a rank."""
    rules = jlora.allocate(sketch(LoRA(rank=1)), LoRA(pattern, rank=1), min_rank=1)
    return [path for path in PATHS if any(matches(rule, path) for rule in rules)]


TAKERS: dict[str, Callable[[str], Sequence[str]]] = {
    "LoRA": lambda pattern: take_by_rules(LoRA(pattern, rank=1)),
    "DoRA": lambda pattern: take_by_rules(DoRA(pattern, rank=1)),
    "Rows": lambda pattern: take_by_rules(Rows(pattern, [3]), use=lambda w: w[IDS]),
    "Full": lambda pattern: take_by_rules(Full(pattern)),
    "Frozen": lambda pattern: take_by_rules(Frozen(pattern)),
    "Gain": lambda pattern: take_by_rules(Gain(pattern)),
    "NF4": take_by_scheme,
    "allocate": take_by_rank,
}


def each(patterns: dict[str, Any], *daily: str) -> Any:
    """Each taker with each pattern; every day LoRA with all, and all with the patterns `daily`."""
    rows = [(taker, pattern) for taker in TAKERS for pattern in patterns]
    chosen = [row for row in rows if row[0] == "LoRA" or row[1] in daily]
    return pytest.mark.parametrize(("taker", "pattern"), some_rows(rows, *chosen))


@each(PATTERNS, "(?i)(?s)HEAD|QUERY")
def test_whole_components(taker: str, pattern: str) -> None:
    """Rules, schemes and `allocate` agree."""
    assert sorted(TAKERS[taker](pattern)) == sorted(PATHS[i] for i in PATTERNS[pattern])


def rest_by_rank(*rules: Any) -> list[str]:
    """The sites that get a rank."""
    found = [rule.pattern for rule in jlora.allocate(sketch(LoRA(rank=1)), rules, min_rank=1)]
    return [path for path in PATHS if f"^{re.escape(path)}$" in found]


def rest_by_scheme(*schemes: Any) -> list[str]:
    """The leaves that get 4 bits."""
    sites = jlora.transform(multiply).sites(PARAMS, X)
    found = jlora.summary(jlora.quantize(PARAMS, *schemes, sites=sites)).quantized
    return ["/".join(entry.path) for entry in found if isinstance(entry.scheme, NF4)]


LINEAR = LoRA(rank=1)
REST: dict[str, tuple[Callable[..., Sequence[str]], Any, list[Any]]] = {
    "transform": (
        lambda *rules: [
            site.path
            for site in jlora.transform(multiply, *rules).sites(PARAMS, X)
            if site.is_adapted
        ],
        *(LINEAR, [Full("head"), Frozen("head")]),
    ),
    "sketch": (lambda *rules: list(sketch(*rules).sites), LINEAR, [Full("head"), Frozen("head")]),
    "allocate": (rest_by_rank, LINEAR, [Full("head"), Frozen("head")]),
    "quantize": (rest_by_scheme, NF4(), [jlora.Int8("head")]),
}


@pytest.mark.parametrize("taker", REST)
def test_without_a_pattern(taker: str) -> None:
    """A rule takes what those with a pattern leave, wherever it stands."""
    take, rest, others = REST[taker]
    for other in others:
        assert sorted(take(rest, other)) == sorted(take(other, rest)) == sorted(PATHS[:4])


# A look-ahead that refuses a component, and a leaf within that it does not keep out.
IN_VAIN = ("(?!head).*", "(?!encoder/layers_0).*/kernel", "(?i)(?!HEAD).*|nothing", "(?<!head/).*")


@each(dict.fromkeys(IN_VAIN), IN_VAIN[0])
def test_what_a_pattern_refuses_in_vain(taker: str, pattern: str) -> None:
    """It would be taken from another component on: none is, but an error names leaf and remedy."""
    remedy = "jlora.Frozen('head')"
    path = PATHS[0] if "encoder" in pattern else PATHS[4]
    with refused(ValueError, "pattern", repr(pattern), repr(path), remedy):
        TAKERS[taker](pattern)


def test_a_start_behind_the_first_component() -> None:
    """As of the variables of linen: the error has the pattern with it."""
    for pattern, better in (
        ("^query", "^encoder/query"),
        ("(?i)^Q_PROJ", "(?i)^multi_head/Q_PROJ"),
    ):
        params = PARAMS | {"encoder": PARAMS["encoder"]["layers_0"]}
        for rule in (LoRA(pattern), Full(pattern), Frozen(pattern)):
            with refused(ValueError, "params", f"{pattern!r}", f"Did you mean {better!r}?"):
                jlora.transform(multiply, rule).sites(params, X)
            kept = jlora.transform(multiply, type(rule)(better)).sites(params, X)
            assert sum(site.rule is not None for site in kept.leaves) == 1


def test_the_root_has_the_empty_path() -> None:
    """A tree that is one array."""
    for pattern in ("", "^$", ".*"):
        sites = jlora.transform(lambda w, x: x @ w, LoRA(pattern, rank=1)).sites(X.T, X)
        assert [site.rule is not None for site in sites] == [True]


INSIDE = {  # a pattern, where it is found, and what is advised
    "hea": ("head, multi_head", "head|multi_head"),
    "embed": ("embed_tokens", "embed_tokens"),
    "layers_": ("layers_0, layers_12", "layers_0|layers_12"),
    "_(proj|tokens)": ("embed_tokens, q_proj", "embed_tokens|q_proj"),
    "ern": ("kernel", "kernel"),
    "e": ("embed_tokens, encoder, head, …", ".*e.*"),
    "(?i)E|H": ("embed_tokens, encoder, head, …", "(?i).*(?:E|H).*"),
    "s_0/quer": ("layers_0/query", "layers_0/query"),
    "": ("embed_tokens, encoder, head, …", ".*"),
}


@each(INSIDE, "hea")
def test_a_pattern_inside_of_components(taker: str, pattern: str) -> None:
    """Where it is found, and a pattern that takes those leaves."""
    names, better = INSIDE[pattern]
    rule = f"{'LoRA' if taker == 'allocate' else taker}({pattern!r})"
    with refused(ValueError, "", rule, f"only parts of {names}.", f"Did you mean {better!r}?"):
        TAKERS[taker](pattern)
    assert sorted(TAKERS[taker](better)) == sorted(p for p in PATHS if re.search(pattern, p))


def test_a_pattern_that_also_matches_within_components() -> None:
    """It takes the leaves in whose path the given one is found."""
    inside = ["kernel", "(head|query)/kernel$", "^la", "head/", "/kernel", "", "a|nel$", "y$|em"]
    inside += ["layers_[02]", "layers_[1-3]/.*kernel", "(?i)HEA", "(?x) q u  # of query"]
    inside += [r"(e)r.*\1", "(?<!multi_)head", "query/(?!bias)"]
    for pattern in inside:
        rule = Full(pattern_anywhere(pattern))
        taken = [path for path in PATHS if matches(rule, path)]
        assert taken == [path for path in PATHS if re.search(pattern, path)], pattern


def test_what_a_pattern_may_have() -> None:
    """All that Python's own patterns may have, and nothing that they may not."""
    for pattern in PATTERNS:
        assert compile_pattern(pattern).groups == re.compile(pattern).groups
    with pytest.raises(re.error):
        compile_pattern("a)|(b")
