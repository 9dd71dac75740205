"""Rows: the laws on every embedding, the table itself, and what is refused."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from cases import CASES, Case, Problem
from jax.sharding import PartitionSpec as P

import jlora
from jlora import Full, LoRA, Rows, arithmetic, checkpoint
from jlora.types import Replaced

DAILY = ("row_looked_up_under_vmap",)


def tables(problem: Problem) -> list[jlora.types.Site]:
    """The sites that are embeddings."""
    sites = jlora.transform(problem.apply).sites(problem.params, *problem.args, **problem.kwargs)
    return [s for s in sites if s.kind == "embed" and s.layout and len(s.layout.inputs) == 1]


def with_rows(case: Case) -> Case:
    """A case whose embeddings have rows trained, and which keeps its rules for the rest."""
    found = tables(case.build(jnp.float32))
    rules = []
    for site in found:
        [axis] = site.layout.inputs
        n = site.shape[axis]
        rules.append(Rows(f"^{re.escape(site.path)}$", list(dict.fromkeys((n - 1, 0, n // 2)))))
    rest = [r for r in case.rules if isinstance(r, Full)]
    return dataclasses.replace(case, rules=(*rules, *rest) if rules else ())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[] if c.name in DAILY else [pytest.mark.slow])
        for c in CASES
        if c.sites and c.subject in ("lookup", "model", "no_site")
    ],
)
def test_laws(case: Case) -> None:
    """Those of LoRA itself, at the start exactly the base, of each case with an embedding."""
    case = with_rows(case)
    if not case.rules:
        pytest.skip("no embedding")
    with laws.precision(case, jnp.float32) as tolerance:
        made = laws.make(case, jnp.float32)
        laws.hold(made, tolerance, every_law=True)
        laws.quantized_is_dequantized(made, max(tolerance, 1e-5))


# ------------------------------------------------------------------------------------- the table

IDS = jnp.array([[3, 0, 6], [5, 5, 1]])
NEW = (6, 1, 3)


def model(p: Any, ids: jax.Array) -> jax.Array:
    return jnp.tanh(p["table"][ids] @ p["w"]) @ p["table"].T


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.fixture
def made() -> tuple[Any, ...]:
    """Transform, base and random adapter of a tied model."""
    params = {"table": normal(0, 7, 4), "w": normal(1, 4, 4)}
    lora = jlora.transform(model, Rows("table", NEW))
    base, adapter = lora.init(jax.random.key(0), params, IDS)
    return lora, base, laws.randomize(adapter)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_merged(dtype: Any) -> None:
    """The rows are V to one rounding of the sum, and all others the bits that they were."""
    base = {"table": normal(0, 7, 4, dtype=dtype).at[0, 0].set(-0.0)}
    node = Replaced(normal(1, 3, 4), NEW, jlora.types.Layout((), (0,), (1,)))
    merged = np.asarray(jlora.merge(base, {"table": node})["table"])
    kept = [i for i in range(7) if i not in NEW]
    assert merged[kept].tobytes() == np.asarray(base["table"])[kept].tobytes()
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(merged[list(NEW)].astype(np.float32), node.v, rtol=eps, atol=4e-7)


@pytest.mark.parametrize(
    ("dtype", "jit"),
    [
        (jnp.bfloat16, True),
        pytest.param(jnp.float32, False, marks=pytest.mark.slow),
        pytest.param(jnp.float32, True, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_other_rows_are_looked_up_as_they_are(dtype: Any, jit: bool) -> None:
    base = {"table": normal(0, 64, 4, dtype=dtype).at[0, 0].set(-0.0)}
    lora = jlora.transform(lambda p, ids: p["table"][ids], Rows("table", range(20, 60)))
    _, adapter = lora.init(jax.random.key(0), base, jnp.arange(3))
    adapter, apply = laws.randomize(adapter), jax.jit(lora.apply) if jit else lora.apply
    ids = jnp.array([0, 19, 60, 63])
    found = np.asarray(apply(base, adapter, ids))
    assert found.tobytes() == np.asarray(base["table"][ids]).tobytes()
    new = np.asarray(apply(base, adapter, jnp.arange(20, 60)), np.float32)
    np.testing.assert_allclose(new, adapter["table"].v, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


def test_a_stack_of_tables() -> None:
    """Such as one for each codebook, which a scan goes through."""
    params = {"tables": normal(0, 3, 7, 4)}

    def looked_up(p: Any, ids: jax.Array) -> jax.Array:
        return jax.lax.map(lambda t: t[ids], p["tables"])

    lora = jlora.transform(looked_up, Rows("tables", NEW))
    base, adapter = lora.init(jax.random.key(0), params, IDS)
    adapter = laws.randomize(adapter)
    assert adapter["tables"].v.shape == (3, 3, 4)
    expected = base["tables"].at[:, jnp.array(NEW)].set(adapter["tables"].v)[:, IDS]
    np.testing.assert_allclose(lora.apply(base, adapter, IDS), expected, atol=1e-6)
    np.testing.assert_allclose(jlora.merge(base, adapter)["tables"][:, IDS], expected, atol=1e-6)


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
    adapter = laws.randomize(adapter)
    expected = model(jlora.merge(base, adapter), IDS)
    np.testing.assert_allclose(lora.apply(base, adapter, IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [jlora.Int8, pytest.param(jlora.NF4, marks=pytest.mark.slow)])
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


def test_lies_as_the_base(made: Any) -> None:
    _, _, adapter = made
    found = jlora.sharding.specs({"table": P("vocabulary", "d"), "w": P()}, adapter)["table"]
    assert found.v == P(None, "d")


def test_saved_and_restored(made: Any, tmp_path: Any) -> None:
    _, base, adapter = made
    rules = (Rows("table", range(3, 6)), LoRA(rank=2))
    checkpoint.save(tmp_path / "a", adapter, rules, base=base)
    assert checkpoint.read(tmp_path / "a").rules == rules
    for like in (None, adapter):
        restored = checkpoint.restore(tmp_path / "a", like=like, base=base)
        assert jax.tree.structure(restored) == jax.tree.structure(adapter)
        jax.tree.map(np.testing.assert_array_equal, restored, adapter)


def test_print(made: Any) -> None:
    _, _, adapter = made
    assert repr(adapter["table"]) == "Replaced(v=float32[3,4], rows=(6, 1, 3))"
    many = Replaced(jnp.ones((9, 2, 4)), tuple(range(2, 4)), jlora.types.Layout((0,), (1,), (2,)))
    assert repr(many) == "Replaced(v=float32[9,2,4], rows=(2, 3), stack=(0,))"
    many = many._replace(rows=tuple(range(10, 60)))
    assert repr(many) == "Replaced(v=float32[9,2,4], rows=(10, 11, …, 59), stack=(0,))"


def test_on_shapes(made: Any) -> None:
    lora, base, adapter = made
    shapes = jax.eval_shape(lambda: base)
    found = jax.eval_shape(lora.init, jax.random.key(0), shapes, IDS)[1]
    assert found["table"].v.shape == adapter["table"].v.shape
    with pytest.raises(ValueError, match=r"`params` has a shape at 'table', but Rows\('table'"):
        lora.init(jax.random.key(0), shapes, IDS)


# -------------------------------------------------------------------------------------- refusals

RULES: dict[str, tuple[Any, type[Exception], str]] = {
    "text": ("12", TypeError, "`rows` of Rows('t') must be a list of integers; got '12'."),
    "number": (3, TypeError, "`rows` of Rows('t') must be a list of integers; got 3."),
    "floats": ([1.0], TypeError, "`rows` of Rows('t') must be a list of integers; got [1.0]."),
    "none": ([], ValueError, "`rows` of Rows('t') must be at least one row."),
    "negative": ([3, -1], ValueError, "`rows` of Rows('t') must be counted from 0; got -1."),
    "twice": ([3, 1, 3], ValueError, "`rows` of Rows('t') must be distinct; got 3 more than once."),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_checked(name: str) -> None:
    rows, error, message = RULES[name]
    with pytest.raises(error, match=re.escape(message)):
        Rows("t", rows)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rows("table", [6, 7, 9]),
            "`rows` of Rows('table') must lie in [0, 7), the rows of 'table'; got 7, 9. Grow the "
            "table first, to have rows for new tokens.",
        ),
        (
            Rows("w", [1]),
            "Rows('w') matches 'w', a dense site of shape (4, 4); it needs a table of which rows "
            "are looked up. Narrow the pattern, or give the site a jlora.LoRA or a jlora.Full.",
        ),
    ],
)
def test_sites_are_checked(made: Any, rule: Rows, message: str) -> None:
    _, base, _ = made
    with pytest.raises(ValueError, match=re.escape(message)):
        jlora.transform(model, rule).init(jax.random.key(0), base, IDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": (6, 1, 7)}, "table: its `rows` must lie in [0, 7); got 7"),
        ({"rows": (6, 1)}, "table: it has 2 `rows`, and values for 3"),
        ({"rows": (6, 1, 1)}, "table: its `rows` must be distinct; got 1 more than once"),
        ({"rows": "abc"}, "table: its `rows` must be a tuple of integers; got 'abc'"),
        ({"rows": 3}, "table: its `rows` must be a tuple of integers; got 3"),
        ({"rows": (6, 1, -1)}, "table: its `rows` must be counted from 0; got -1"),
        (
            {"layout": jlora.types.Layout((), (0, 1), ())},
            "table: it must have one axis of inputs, got (0, 1)",
        ),
        ({"v": jnp.ones(())}, "table: it has 3 `rows`, and values for 0"),
        ({"v": jnp.ones((3, 5))}, "table: a weight of shape (7, 4) needs V (3, 4), got (3, 5)"),
    ],
)
def test_misfits_are_named(made: Any, change: dict[str, Any], message: str) -> None:
    lora, base, adapter = made
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.apply(base, {"table": adapter["table"]._replace(**change)}, IDS)


def test_unmerge_is_refused(made: Any) -> None:
    _, base, adapter = made
    message = (
        "`unmerge` cannot take Replaced back at 'table': it depends on the weight before. Keep"
    )
    with pytest.raises(ValueError, match=message):
        jlora.unmerge(jlora.merge(base, adapter), adapter)


def test_a_table_of_adapters_is_refused(made: Any) -> None:
    _, _, adapter = made
    with pytest.raises(
        ValueError, match="a table cannot hold what is at these paths:\n  table: is a R"
    ):
        jlora.many.stack([adapter])


def test_arithmetic_is_refused(made: Any) -> None:
    _, _, adapter = made
    for f in (lambda: arithmetic.add([adapter, adapter]), lambda: arithmetic.scale(adapter, 2.0)):
        with pytest.raises(ValueError, match=r"(?s):\n  table: is a Replaced\n"):
            f()
