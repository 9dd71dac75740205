"""DoRA: the laws, the formula itself, and what follows from its norms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from cases import CASES, SUBJECTS, Case
from jax.sharding import PartitionSpec as P
from test_own_methods import NOT_A_GAIN

import jlora
from jlora import DoRA, LoRA, Slots, checkpoint
from jlora import _adapters as adapters
from jlora.types import Decomposed


def decomposed(rule: Any) -> Any:
    """A rule of LoRA as one of DoRA."""
    if not isinstance(rule, LoRA):
        return rule
    return DoRA(**{f.name: getattr(rule, f.name) for f in dataclasses.fields(rule)})


def is_for(case: Case) -> bool:
    """Whether the case has sites, none with dropout, whose gains have a use and a gradient."""
    drops = any(r.dropout for r in case.rules if isinstance(r, LoRA))
    # Where a kernel is divided by its norms, m is of no effect, and its gradient rounding alone.
    no_gain = {*NOT_A_GAIN, "linen_weight_norm"}
    return case.sites > 0 and case.subject != "model" and not drops and case.name not in no_gain


TAKE_M_OUT = ("linen_train", "weight_standardized")
DAILY = ("convolution", "control", "slots", "experts")  # subjects


def table() -> list[Any]:
    """The first of most subjects for every day, all laws for that of experts."""
    rows = []
    for subject in SUBJECTS:
        cases = [c for c in CASES if c.subject == subject and is_for(c)]
        for i, case in enumerate(cases):
            daily = i == 0 and not case.slow and subject in DAILY
            every_law = not daily or subject == "experts"
            marks = [] if daily else [pytest.mark.slow]
            rows.append(pytest.param(case, every_law, id=case.name, marks=marks))
    return rows


@pytest.mark.parametrize(("case", "every_law"), table())
def test_laws(case: Case, every_law: bool) -> None:
    """Those of LoRA itself; at the start the base up to rounding."""
    rules = tuple(map(decomposed, case.rules))
    case = dataclasses.replace(case, rules=rules, exact_at_zero=False)
    with laws.precision(case, jnp.float32) as tolerance:
        made = laws.make(case, jnp.float32)
        # Statistics take m out again: its gradient is what a difference leaves.
        tolerance = max(tolerance, 5e-5) if case.name in TAKE_M_OUT else tolerance
        laws.hold(made, tolerance, every_law)
        if every_law:
            laws.quantized_is_dequantized(made, max(tolerance, 1e-5))


# ----------------------------------------------------------------------------------- the formula


def weight_of(node: Decomposed, w: np.ndarray) -> np.ndarray:
    """W' with W + ΔW formed, in float64; W (stack, inputs, outputs)."""
    a, b, m = (np.asarray(x, np.float64) for x in (node.a, node.b, node.m))
    if node.layout.slots is None:
        new = w + node.scale * a @ b
        return m[:, None] * new / np.linalg.norm(new, axis=1, keepdims=True)
    count, chosen, _ = node.layout.slots
    parts = np.split(np.asarray(w, np.float64), count, axis=2)
    for i, slot in enumerate(chosen):
        part = node._replace(
            a=a[:, i], b=b[:, i], m=m[:, i], layout=node.layout._replace(slots=None)
        )
        parts[slot] = weight_of(part, parts[slot])
    return np.concatenate(parts, axis=2)


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return jax.lax.map(lambda wx: wx[1] @ wx[0], (p["w"], x))


@pytest.fixture(params=[None, Slots(3, (2, 0))], ids=["whole", "slots"], scope="module")
def made(request: Any) -> tuple[Any, ...]:
    """Transform, base, random adapter and input of three matrices in a stack."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((3, 8, 6)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((3, 5, 8)), jnp.float32)
    dora = jlora.transform(scanned, DoRA("w", rank=2, slots=request.param))
    base, adapter = dora.init(jax.random.key(0), params, x)
    return dora, base, laws.randomize(adapter), x


def test_formula(made: Any) -> None:
    dora, base, adapter, x = made
    expected = weight_of(adapter["w"], np.asarray(base["w"]))
    np.testing.assert_allclose(jlora.merge(base, adapter)["w"], expected, rtol=0, atol=3e-6)
    y = jax.jit(dora.apply)(base, adapter, x)
    np.testing.assert_allclose(y, x @ expected, rtol=0, atol=2e-5)


def test_no_gradient_passes_through_the_norm(made: Any) -> None:
    dora, base, adapter, x = made
    node, w = adapter["w"], base["w"]
    if node.layout.slots is not None:
        return
    norm = np.linalg.norm(w + node.scale * np.asarray(node.a @ node.b), axis=1)

    def dense(adapter: Any) -> jax.Array:
        n = adapter["w"]
        return jnp.sin(x @ ((w + n.scale * n.a @ n.b) * (n.m / norm)[:, None])).sum()

    actual = jax.jit(jax.grad(lambda a: jnp.sin(dora.apply(base, a, x)).sum()))(adapter)
    laws.assert_close(actual, jax.jit(jax.grad(dense))(adapter), 1e-5)


@pytest.mark.parametrize("scheme", [jlora.Int8, pytest.param(jlora.NF4, marks=pytest.mark.slow)])
def test_norms_are_those_of_the_quantized_base(made: Any, scheme: Any) -> None:
    dora, base, adapter, x = made
    packed = jlora.quantize(base, scheme("w"))
    plain, apply = jlora.dequantize(packed), jax.jit(dora.apply)
    fresh, of_plain = (dora.init(jax.random.key(0), b, x)[1] for b in (packed, plain))
    for tree in (adapter, fresh):
        actual, expected = (apply(b, tree, x) for b in (packed, plain))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(fresh["w"].m, of_plain["w"].m, rtol=1e-6)


# --------------------------------------------------------------------------- where norms are none


def one(w: Any, **changed: Any) -> tuple[Any, Any]:
    """Transform and adapter of one matrix of 4 × 3, with `changed` in its node."""
    dora = jlora.transform(lambda p, x: x @ p["w"], DoRA("w", rank=2, alpha=2))
    _, adapter = dora.init(jax.random.key(0), {"w": w}, jnp.ones((1, 4)))
    return dora, {"w": adapter["w"]._replace(**changed)}


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_nothing_is_nan_where_the_change_cancels_the_weight(dtype: Any) -> None:
    a, b = jnp.eye(4, 2, dtype=jnp.float32), jnp.ones((2, 3), jnp.float32)
    w = -(a @ b).astype(dtype)
    dora, adapter = one(w, a=a, b=b)
    loss = lambda a: jnp.sum(dora.apply({"w": w}, a, jnp.ones((1, 4), dtype)))  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(adapter)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, grads)))


def test_a_column_of_zeros_stays(made: Any) -> None:
    w = jnp.ones((4, 3)).at[:, 1].set(0)
    dora, adapter = one(w)
    f = jax.jit(lambda a: dora.apply({"w": w}, a, jnp.ones((1, 4))))
    slope = jax.jit(jax.grad(lambda a: f(a).sum()))
    for tree in (adapter, {"w": adapter["w"]._replace(b=jnp.ones((2, 3)))}):
        np.testing.assert_allclose(f(tree)[:, 1], 0, atol=1e-12)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope(tree)))


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]
)
def test_a_gain_of_zero_has_a_gradient(dtype: Any) -> None:
    """Of what it multiplies, which the backward pass has from the result alone."""
    w, x = jnp.eye(4, 3, dtype=dtype), jnp.asarray([[1.0, 2.0, 3.0, 4.0]], dtype)
    dora, adapter = one(w, m=jnp.zeros(3))
    f = lambda a: dora.apply({"w": w}, a, x).sum().astype(jnp.float32)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.grad(f))(adapter)["w"].m, [1, 2, 3], rtol=1e-2)


# --------------------------------------------------------------------------------------- the tree


def test_sites_and_counts(made: Any) -> None:
    dora, base, adapter, x = made
    node, sites = adapter["w"], dora.sites(base, x)
    assert sites["w"].trainable == jlora.count(adapter) == node.a.size + node.b.size + node.m.size
    assert "DoRA('w')" in str(sites)
    assert adapters.weight_shape(node) == (3, 8, 6)


def test_labels_and_a_decay_that_leaves_m(made: Any) -> None:
    """In `Params`, as in Flax's `TrainState`."""
    _, base, adapter, _ = made
    params = jlora.Params(base, adapter)
    assert jlora.labels(params).adapter["w"].m == "m"
    assert jlora.mask(params).adapter["w"].m is True

    def decayed(tree: Any) -> Any:
        return jax.tree.map(lambda label: label != "m", jlora.labels(tree))

    tx = jlora.optimizer(optax.add_decayed_weights(0.5, mask=decayed))
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_array_equal(updates.base["w"], 0)
    np.testing.assert_array_equal(updates.adapter["w"].m, 0)
    np.testing.assert_allclose(updates.adapter["w"].a, 0.5 * adapter["w"].a)


def test_lies_as_the_base(made: Any) -> None:
    _, _, adapter, _ = made
    found = jlora.sharding.specs({"w": P("s", "i", "o")}, adapter)["w"]
    slots = (None,) * (adapter["w"].layout.slots is not None)
    assert found.m == P("s", *slots, "o")
    assert found.a == P("s", *slots, "i", None)


def test_saved_and_restored(made: Any, tmp_path: Any) -> None:
    _, base, adapter, _ = made
    rules = (DoRA("w", rank=2, rslora=True),)
    checkpoint.save(tmp_path / "a", adapter, rules, base=base)
    assert checkpoint.read(tmp_path / "a").rules == rules
    restored = checkpoint.restore(tmp_path / "a", base=base)
    assert jax.tree.structure(restored) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, restored, adapter)


# ---------------------------------------------------------------------------------------- refusals


def test_dropout_is_refused() -> None:
    expected = r"`dropout` of DoRA\('w'\) must be 0, got 0.1: PEFT's DoRA with dropout multiplies W"
    with pytest.raises(ValueError, match=expected):
        DoRA("w", dropout=0.1)


def test_shapes_have_no_norms(made: Any) -> None:
    dora, base, _, x = made
    shapes = jax.eval_shape(lambda: base)
    with pytest.raises(ValueError, match=r"`params` has a shape at 'w', but DoRA\('w'\)"):
        dora.init(jax.random.key(0), shapes, x)
    assert jax.eval_shape(dora.init, jax.random.key(0), shapes, x)[1]["w"].m.ndim >= 2


def test_unmerge_is_refused(made: Any) -> None:
    _, base, adapter, _ = made
    with pytest.raises(ValueError, match=r"`unmerge` cannot take Decomposed back at 'w': "):
        jlora.unmerge(jlora.merge(base, adapter), adapter)


def test_an_m_of_another_shape_is_named(made: Any) -> None:
    dora, base, adapter, x = made
    node = adapter["w"]
    with pytest.raises(ValueError, match=r"w: a weight of shape \(3, 8, 6\) needs A .* and M \(3,"):
        dora.apply(base, {"w": node._replace(m=node.m[..., :1])}, x)
