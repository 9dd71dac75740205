"""Right uses that look odd: names, numbers and joins that must work, and be exact."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_close, leaks_checked
from messages import refused
from small import KEY, SQUARE, W, X, array, dense, init, randomize, use_sin

import jlora
from jlora import Full, LoRA


class Projections(NamedTuple):
    """Three weights under the names of an attention layer."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def attend(p: Any, x: jax.Array) -> jax.Array:
    """Three products."""
    w = p["attention"]
    return (x @ w.query) * (x @ w.key) + x @ w.value


ATTENTION = {"attention": Projections(array(4, 4), array(4, 4) + 1, array(4, 4) + 2)}


def drop(p: Any, x: jax.Array) -> jax.Array:
    """A result that is not used stands in no rule's way."""
    jnp.sin(p["w"])
    return x @ p["w"]


def scale(p: Any, x: jax.Array) -> jax.Array:
    """A product with a number."""
    return x @ p["w"] * p["scale"]


ONE, NUMBER = (LoRA("w", rank=2),), W | {"scale": 0.5}
DOUBLE = {"w": np.random.default_rng(0).standard_normal((4, 6))}
ODD: dict[str, tuple[Any, Any, tuple[Any, ...], list[str]]] = {
    "a field named value": (attend, ATTENTION, (LoRA(rank=2),), ["attention"]),
    "an unused result": (drop, SQUARE, ONE, ["w"]),
    "a Python number": (scale, NUMBER, ONE, ["w"]),
    "a Python number in full": (scale, NUMBER, (*ONE, Full("scale")), ["scale", "w"]),
    "an unused Python number": (dense, W | {"layers": 3}, ONE, ["w"]),
    "NumPy's float64, quietly": (dense, DOUBLE, ONE, ["w"]),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_models(case: str) -> None:
    """They are adapted as any other."""
    f, params, rules, adapted = ODD[case]
    base, adapter = init(*rules, apply=f, params=params)
    assert sorted(adapter) == adapted
    merged = jlora.merge(base, adapter, check=True)
    assert_close(jax.tree.map(jnp.float32, merged), jax.tree.map(jnp.float32, params))
    adapter = randomize(adapter)
    actual = jlora.transform(f).apply(base, adapter, X)
    assert actual.dtype == jnp.float32
    assert_close(actual, f(jlora.merge(base, adapter), X))


def test_pattern_of_a_field_named_value() -> None:
    """The quickstart's own pattern finds both of its leaves, of which each is a path."""
    table = jlora.transform(attend, LoRA("query|value", rank=2)).sites(ATTENTION, X)
    assert sum(site.rule is not None for site in table) == 2
    _, adapter = init(LoRA(rank=2), apply=attend, params=ATTENTION)
    assert sorted(adapter["attention"]) == ["key", "query", "value"]


def test_keyword_arguments_of_the_model() -> None:
    """Models with `key=`, `params=`, `base=` or `adapter=` of their own."""

    def keyed(p: Any, x: jax.Array, *, key: Any, params: Any, base: Any, adapter: Any) -> jax.Array:
        del key, params, base, adapter
        return x @ p["w"]

    own = {"key": KEY, "params": 1, "base": 2, "adapter": 3}
    lora = jlora.transform(keyed, LoRA("w", rank=2))
    assert len(lora.sites(W, X, **own)) == 1
    base, adapter = lora.init(KEY, W, X, **own)
    assert lora.apply(base, adapter, X, **own).shape == (2, 6)


@pytest.mark.parametrize(
    ("field", "number"),
    [("rank", np.int64(4)), ("alpha", np.float32(16)), ("dropout", np.float32(0.1))],
    ids=["rank", "alpha", "dropout"],
)
def test_numpy_numbers(field: str, number: Any) -> None:
    """A sweep over `np.arange` or `np.linspace` gives NumPy's numbers."""
    assert getattr(LoRA("w", **{field: number}), field) == number


def test_weakly_typed_weight() -> None:
    """`jnp.full` gives a weakly typed array, which does not widen a bfloat16 activation."""
    params, x = {"w": jnp.full((4, 6), 0.5)}, X.astype(jnp.bfloat16)
    base, adapter = jlora.transform(dense, LoRA("w", rank=2)).init(KEY, params, x)
    assert dense(params, x).dtype == jnp.bfloat16
    assert jlora.transform(dense).apply(base, adapter, x).dtype == jnp.bfloat16


def test_tracers_do_not_leak() -> None:
    """Nothing that is traced outlives its trace, whether the call succeeds or is refused."""
    with leaks_checked():
        base, adapter = init(*ONE, apply=dense, params=SQUARE)
        jlora.transform(dense).apply(base, adapter, X)
        with refused(NotImplementedError, "", "no factored form: `sin`"):
            init(*ONE, apply=use_sin, params=SQUARE)
