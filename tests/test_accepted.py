"""Right uses that look odd: names, numbers and joins that must work, and be exact."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import (
    KEY,
    PARAMS,
    SQUARE,
    W,
    X,
    array,
    assert_same,
    dense,
    init,
    model,
    randomize,
    use_sin,
)

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


def test_field_named_value() -> None:
    """A field `value` of a NamedTuple is a path of its own, not an NNX variable."""
    base, adapter = init(LoRA(rank=2), apply=attend, params=ATTENTION)
    assert jlora.count(adapter) == 3 * (4 * 2 + 2 * 4)
    assert sorted(adapter["attention"]) == ["key", "query", "value"]
    assert_same(jlora.merge(base, adapter), ATTENTION)
    adapter = randomize(adapter)
    actual = jlora.transform(attend).apply(base, adapter, X)
    assert_same(actual, attend(jlora.merge(base, adapter), X))


def test_pattern_of_a_field_named_value() -> None:
    """The quickstart's own pattern finds both of its leaves."""
    table = jlora.transform(attend, LoRA("query|value", rank=2)).sites(ATTENTION, X)
    assert sum(site.rule is not None for site in table) == 2


def test_sites_need_no_rules() -> None:
    """`sites` of a transform without rules lists the model, as its errors advise."""
    table = jlora.transform(model).sites(PARAMS, X)
    assert [site.path for site in table] == ["fused", "layer/kernel", "vocabulary"]


def test_unused_result_is_no_use() -> None:
    """What the model computes and drops stands in no rule's way."""

    def dropped(p: Any, x: jax.Array) -> jax.Array:
        jnp.sin(p["w"])
        return x @ p["w"]

    _, adapter = init(LoRA("w", rank=2), apply=dropped, params=SQUARE)
    assert list(adapter) == ["w"]


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


def test_python_leaves_that_are_not_read() -> None:
    """Numbers among the parameters are leaves like others, as long as JAX alone uses them."""
    params = W | {"scale": 0.5}
    base, adapter = init(
        LoRA("w", rank=2), apply=lambda p, x: x @ p["w"] * p["scale"], params=params
    )
    assert base["scale"] == 0.5
    assert list(adapter) == ["w"]


def test_merge_of_python_numbers() -> None:
    """A Python number that is trained in full, merged and checked."""
    rules = LoRA("w", rank=2), Full("scale")
    base, adapter = init(
        *rules, apply=lambda p, x: x @ p["w"] * p["scale"], params=W | {"scale": 0.5}
    )
    assert jlora.merge(base, adapter)["scale"] == 0.5


def test_merge_check_of_python_numbers() -> None:
    """A Python number beside the adapted weight."""
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=W | {"layers": 3})
    assert jlora.merge(base, adapter, check=True)["layers"] == 3


def test_numpy_float64_is_quiet() -> None:
    """NumPy's default dtype gives no warnings: JAX takes such an array as float32 silently."""
    params = {"w": np.random.default_rng(0).standard_normal((4, 6))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base, adapter = init(LoRA("w", rank=2), apply=dense, params=params)
        assert jlora.transform(dense).apply(base, adapter, X).dtype == jnp.float32


def test_weakly_typed_weight() -> None:
    """`jnp.full` gives a weakly typed array, which does not widen a bfloat16 activation."""
    params, x = {"w": jnp.full((4, 6), 0.5)}, X.astype(jnp.bfloat16)
    base, adapter = jlora.transform(dense, LoRA("w", rank=2)).init(KEY, params, x)
    assert dense(params, x).dtype == jnp.bfloat16
    assert jlora.transform(dense).apply(base, adapter, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("call", ["init", "apply", "refusal"])
def test_tracers_do_not_leak(call: str) -> None:
    """Nothing that is traced outlives its trace, whether the call succeeds or is refused."""
    base, adapter = init(LoRA("w", rank=2), apply=dense, params=SQUARE)
    with jax.checking_leaks():
        if call == "init":
            init(LoRA("w", rank=2), apply=dense, params=SQUARE)
        elif call == "apply":
            jlora.transform(dense).apply(base, adapter, X)
        else:
            with pytest.raises(ValueError, match="used only by `sin`"):
                init(LoRA("w", rank=2), apply=use_sin, params=SQUARE)
