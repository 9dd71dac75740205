"""Rows: the table itself, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from messages import all_refused, each_refusal, refused
from small import normal, raw, set_up_noisy, some

import jlora
from jlora import LoRA, Rows, arithmetic
from jlora.types import Layout, Replaced

IDS = jnp.array([[3, 0, 6], [5, 5, 1]])
NEW = (6, 1, 3)


def model(p: Any, ids: jax.Array) -> jax.Array:
    return jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T


@pytest.fixture(scope="module")
def made() -> tuple[Any, ...]:
    """Transform, base and random adapter of a tied model."""
    params = {"table": normal(0, 7, 4), "w": normal(1, 4, 4)}
    return set_up_noisy(model, Rows("table", NEW), params, IDS)


@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("stack", [(), (3,)])
def test_merged(stack: tuple[int, ...], dtype: Any) -> None:
    """The rows are V to one rounding of the sum, and all others the bits that they were."""
    base = {"table": normal(0, *stack, 7, 4, dtype=dtype).at[..., 0, 0].set(-0.0)}
    n = len(stack)
    node = Replaced(normal(1, *stack, 3, 4), NEW, Layout((*range(n),), (n,), (n + 1,)))
    merged = np.asarray(jlora.merge(base, {"table": node})["table"])
    kept = [i for i in range(7) if i not in NEW]
    assert raw(merged[..., kept, :]) == raw(np.asarray(base["table"])[..., kept, :])
    eps = float(jnp.finfo(dtype).eps)
    new = merged[..., NEW, :].astype(np.float32)
    np.testing.assert_allclose(new, node.v, rtol=eps, atol=4e-7)


@pytest.mark.parametrize("dtype", some([jnp.float32, jnp.bfloat16], jnp.bfloat16))
def test_other_rows_are_looked_up_as_they_are(dtype: Any) -> None:
    base = {"table": normal(0, 64, 4, dtype=dtype).at[0, 0].set(-0.0)}
    lora = jlora.transform(lambda p, ids: p["table"][ids], Rows("table", range(20, 60)))
    _, adapter = lora.init(jax.random.key(0), base, jnp.arange(3))
    adapter, apply = laws.randomize(adapter), jax.jit(lora.apply)
    found = np.asarray(apply(base, adapter, jnp.arange(64)))
    kept = [*range(20), *range(60, 64)]
    assert found[kept].tobytes() == np.asarray(base["table"])[kept].tobytes()
    eps = float(jnp.finfo(dtype).eps)
    new = found[20:60].astype(np.float32)
    np.testing.assert_allclose(new, adapter["table"].v, rtol=eps, atol=1e-6)


def test_beside_all_linear(made: Any) -> None:
    """An embedding has rows, everything else A and B."""
    _, base, _ = made
    rules = (Rows("table", range(5, 7)), LoRA(rank=2))
    lora = jlora.transform(model, *rules)
    sites = lora.sites(base, IDS)
    assert sites["table"].trainable == 2 * 4
    _, adapter = lora.init(jax.random.key(0), base, IDS)
    assert jlora.labels(adapter)["table"].v == "rows"
    assert jlora.count(adapter) == sites.trainable == 2 * 4 + 2 * (4 + 4)


@pytest.mark.parametrize("scheme", some([jlora.Int8, jlora.NF4], jlora.Int8))
def test_of_a_quantized_table_only_the_rows_are_unpacked(scheme: Any) -> None:
    """Whose blocks run along its rows, as they do where `quantize` is told that it is a table."""
    params = {"table": normal(0, 256, 64)}
    lora = jlora.transform(lambda p, ids: p["table"][ids], Rows("table", NEW))
    params = jlora.quantize(params, scheme("table"), sites=lora.sites(params, IDS))
    base, adapter = lora.init(jax.random.key(0), params, IDS)
    rows = jlora.dequantize(params)["table"][jnp.array(NEW)]
    laws.assert_close(adapter["table"].v, rows, 1e-6)
    jaxpr = jax.make_jaxpr(lambda w, node: node.lower(w).deltas[0].b.value)
    assert "f32[256,64]" not in str(jaxpr(base["table"], adapter["table"]))


RULES: dict[type[Exception], dict[str, Any]] = {
    TypeError: {"`rows` ... got '12'.": lambda: "12", "`rows` ... got [1.0].": lambda: [1.0]},
    ValueError: {
        "`rows` ... must be at least one row.": list,
        "`rows` ... got -1.": lambda: [3, -1],
        "`rows` ... got 3 more than once.": lambda: [3, 1, 3],
    },
}


test_rules_are_checked = all_refused(RULES, lambda call: Rows("t", call()))


SITES = {
    "`rows` ... 'table' ... got 7, 9.": lambda: Rows("table", [6, 7, 9]),
    "'w' ... a dense site of shape (4, 4). ... Narrow the pattern, or give": lambda: Rows("w", [1]),
}


@each_refusal({ValueError: SITES})
def test_sites_are_checked(made: Any, error: Any, call: Any, facts: Any) -> None:
    _, base, _ = made
    with refused(error, *facts):
        jlora.transform(model, call()).init(jax.random.key(0), base, IDS)


MISFITS = {
    "in [0, 7); got 7": lambda: {"rows": (6, 1, 7)},
    "it has 2 `rows` but values for 3": lambda: {"rows": (6, 1)},
    "distinct; got 1 more than once": lambda: {"rows": (6, 1, 1)},
    "integers; got 'abc'": lambda: {"rows": "abc"},
    "integers; got [6, 1, 2]": lambda: {"rows": [6, 1, 2]},
    "counted from 0; got -1": lambda: {"rows": (6, 1, -1)},
    "one input axis, got (0, 1)": lambda: {"layout": Layout((), (0, 1), ())},
    "it has 3 `rows` but values for 0": lambda: {"v": jnp.ones(())},
    "needs V (3, 4), got (3, 5)": lambda: {"v": jnp.ones((3, 5))},
}


@each_refusal({ValueError: MISFITS})
def test_misfits_are_named(made: Any, error: Any, call: Any, facts: Any) -> None:
    lora, base, adapter = made
    with refused(error, "adapter", "table", *facts):
        lora.apply(base, {"table": adapter["table"]._replace(**call())}, IDS)


def test_what_is_for_low_rank_alone_is_refused(made: Any) -> None:
    adapter = made[2]
    for f in (
        lambda: jlora.many.stack([adapter]),
        lambda: arithmetic.add([adapter, adapter]),
        lambda: arithmetic.scale(adapter, 2.0),
    ):
        with pytest.raises(ValueError, match=r"(?s):\n  table: is a Replaced"):
            f()
