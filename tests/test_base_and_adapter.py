"""What an adapter is beside its base: none at all, of other types, forgotten, merged, scaled."""

from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax.core import FrozenDict
from messages import refused
from small import set_up

import jlora
from jlora import Full, LoRA

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (3, 4))


def model(params: Any, x: jax.Array) -> jax.Array:
    """A product under a head that is trained in full."""
    return jnp.tanh(x @ params["body"]["w"]) @ params["head"]


PARAMS = {
    "body": {"w": jax.random.normal(jax.random.key(2), (4, 6))},
    "head": jax.random.normal(jax.random.key(3), (6, 2)),
}
LORA = jlora.transform(model, LoRA("body", rank=2), Full("head"))


def setup() -> tuple[Any, Any]:
    """Base and adapter, whose every leaf has moved."""
    base, adapter = LORA.init(KEY, PARAMS, X)
    return base, jax.tree.map(lambda x: x + 0.3, adapter)


# ------------------------------------------------------------------------------ the empty adapter


@pytest.mark.parametrize("empty", [{}, FrozenDict()], ids=["dict", "frozen"])
def test_empty_adapter_is_the_base_model(empty: Any) -> None:
    """Adapters off: for evaluation, or a reference policy."""
    expected = model(PARAMS, X)
    laws.assert_close(LORA.apply(PARAMS, empty, X), expected, 1e-6)
    laws.assert_close(jax.jit(LORA.apply)(PARAMS, empty, X), expected, 1e-6)
    laws.assert_close(jlora.wrap(model)(jlora.bind(PARAMS, empty), X), expected, 1e-6)
    for tree in (jlora.merge(PARAMS, empty), jlora.unmerge(PARAMS, empty)):
        assert jax.tree.all(jax.tree.map(lambda x, y: x is y, tree, PARAMS))
    assert jlora.dropout(empty, KEY) == empty
    assert jlora.merge(PARAMS, empty, check=True)["head"] is PARAMS["head"]


def test_empty_adapter_still_needs_a_base() -> None:
    """An adapter in the place of the base is as wrong as ever."""
    with refused(TypeError, "", "Are two arguments swapped"):
        LORA.apply(setup()[1], {}, X)


def test_gradient_with_respect_to_the_base() -> None:
    """Without an adapter `apply` is the model, also to be differentiated."""
    loss = lambda base: LORA.apply(base, {}, X).sum()  # noqa: E731
    laws.assert_close(jax.grad(loss)(PARAMS), jax.grad(lambda p: model(p, X).sum())(PARAMS), 1e-6)


# ------------------------------------------------------------------------------ the forgotten one

BATCH = {"ids": jnp.ones((2, 3), jnp.int32), "mask": jnp.ones((2, 3))}
FORGOTTEN = {
    "array": (X, "the root: float32[3,4]"),
    "numpy": (np.ones((2,), np.int32), "the root: int32[2]"),
    "batch": (BATCH, "ids: int32[2,3], mask: float32[2,3]"),
    "tuple": ((X, X), "0: float32[3,4], 1: float32[3,4]"),
}


@pytest.mark.parametrize("case", list(FORGOTTEN))
@pytest.mark.parametrize("jit", [False, True])
def test_forgotten_adapter(case: str, jit: bool) -> None:
    """`apply(base, x)`: the argument, what was got, and what should be."""
    given, got = FORGOTTEN[case]
    with refused(TypeError, "adapter", f"got {got}.", "apply(base, adapter, x)?", case=case):
        (jax.jit(LORA.apply) if jit else LORA.apply)(PARAMS, given)


# ------------------------------------------------------------------------------------ other types

CALLS = {
    "apply": lambda base, adapter: LORA.apply(base, adapter, X),
    "bind": jlora.bind,
    "merge": jlora.merge,
    "unmerge": jlora.unmerge,
}


@pytest.mark.parametrize("call", list(CALLS))
def test_integers_are_no_adapter(call: str) -> None:
    """As of a file that was cast: every leaf is named, with its dtype."""
    base, adapter = setup()
    with refused(ValueError, "adapter", "body/w", "got int32", "Use the adapter"):
        CALLS[call](base, jax.tree.map(lambda x: x.astype(jnp.int32), adapter))


@pytest.mark.parametrize("dtype", [jnp.complex64, bool])
def test_factors_are_real_numbers(dtype: Any) -> None:
    """Nothing computes with a complex or a boolean B."""
    base, adapter = setup()
    node = adapter["body"]["w"]
    wrong = {"body": {"w": node._replace(b=node.b.astype(dtype))}}
    with pytest.raises(ValueError, match=r"body/w: `b` must be floating-point, got (complex|bool)"):
        jlora.bind(base, wrong)


def test_complex_leaf_in_full() -> None:
    """A complex leaf can be trained in full."""
    params = {"w": jnp.ones((4, 3)), "phase": jnp.full(3, 1j)}
    fn = lambda p, x: x @ p["w"] * p["phase"]  # noqa: E731
    lora, base, adapter = set_up(fn, (LoRA("w", rank=2), Full("phase")), params, X)
    laws.assert_close(lora.apply(base, adapter, X), fn(params, X), 1e-6)
    assert jlora.merge(base, adapter)["phase"].dtype == jnp.complex64


# ---------------------------------------------------------------------------------- keys of paths


def draws(params: Any, rule: LoRA, get: Any) -> tuple[Any, Any]:
    """A and the dropout key of the one site."""
    *_, adapter = set_up(lambda p, x: x @ get(p), rule, params, X)
    node = get(jlora.dropout(adapter, KEY))
    return np.asarray(node.a), jax.random.key_data(node.key)


W = jnp.ones((4, 4))
NAMED = {  # trees of one weight, whose paths join to a/b/c
    "abc": ({"a": {"b": {"c": W}}}, lambda p: p["a"]["b"]["c"]),
    "ab, c": ({"a/b": {"c": W}}, lambda p: p["a/b"]["c"]),
    "a, bc": ({"a": {"b/c": W}}, lambda p: p["a"]["b/c"]),
    "whole": ({"a/b/c": W}, lambda p: p["a/b/c"]),
}


def test_names_with_slashes_have_keys_of_their_own() -> None:
    """`{"a/b": w}` is not `{"a": {"b": w}}`: other draws, other dropout masks."""
    rule = LoRA("a/b/c", rank=2, dropout=0.5)
    found = [draws(params, rule, get) for params, get in NAMED.values()]
    for draw in zip(*found, strict=True):
        assert len({np.asarray(x).tobytes() for x in draw}) == len(NAMED)


def test_names_without_slashes_keep_their_draw() -> None:
    """Keys are folded with the CRC-32 of the path, so that a seed keeps its adapter."""
    _, adapter = LORA.init(KEY, PARAMS, X)
    key = jax.random.fold_in(KEY, 0xDC850017)  # zlib.crc32(b"body/w")
    expected = jax.random.uniform(key, (4, 2), jnp.float32, -0.5, 0.5)
    laws.assert_close(adapter["body"]["w"].a, expected, 1e-6)
