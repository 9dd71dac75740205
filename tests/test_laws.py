"""The laws of the transform, each over every case of the tables in `cases`.

With random A and B: adapted is merged, in values and in gradients; at B = 0 it is the base model;
`jit`, `vmap`, `checkpoint` and `scan` around `apply` change nothing; only the expected sites are
found, and nothing of a weight's size is trained.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, Problem

import jlora

# For every day, where another law has all cases: a third of a row, of whole models a twelfth.
DAILY = {
    case.name
    for row in {case.row for case in CASES}
    for case in [c for c in CASES if c.row == row and not c.slow][:: 12 if row == 15 else 3]
}


def rarely(*values: Any, when: bool) -> Any:
    """A parameter that is for the long run alone `when` it is so."""
    names = [x.name if isinstance(x, Case) else x.__name__ for x in values]
    return pytest.param(*values, id="-".join(names), marks=[pytest.mark.slow] if when else [])


ALL = [rarely(case, when=case.slow) for case in CASES]
SOME = [rarely(case, when=case.name not in DAILY) for case in CASES]
FLOATS = [
    # Where float64 holds to 1e-10, float32 is the same program.
    rarely(
        case,
        dtype,
        when=case.slow or (dtype is jnp.float32 and case.float64 and case.name not in DAILY),
    )
    for case in CASES
    for dtype in (jnp.float32, jnp.float64)
    if case.float64 or dtype is jnp.float32
]


@contextlib.contextmanager
def precision(case: Case, dtype: Any) -> Iterator[float]:
    """Sets up `dtype`, strict promotion where the model allows it, and gives the tolerance."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == jnp.float64))
        if case.strict:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield 1e-10 if dtype == jnp.float64 else case.tolerance or 1e-5


def prepare(case: Case, dtype: Any) -> tuple[Problem, jlora.Transformed, Any, Any]:
    """The problem, its transform, base, and an adapter with random A, B and full leaves."""
    problem = case.build(dtype)
    lora = jlora.transform(problem.apply, *case.rules)
    base, adapter = lora.init(jax.random.key(0), problem.params, *problem.args, **problem.kwargs)
    return problem, lora, base, randomize(adapter)


def randomize(adapter: Any) -> Any:
    """Every leaf plus noise, so that B is not zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), adapter
    )


def floats(tree: Any) -> list[jax.Array]:
    """The floating-point leaves of a model's outputs."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
    return [jnp.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def scalar(outputs: Any) -> jax.Array:
    """A scalar that depends on every entry of the outputs in its own way."""
    dtype = jnp.result_type(float)
    parts = [x.ravel().real.astype(dtype) for x in floats(outputs)]
    return sum(jnp.vdot(jnp.cos(jnp.arange(x.size, dtype=dtype)), x) for x in parts)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Equal structures; floating leaves within `tolerance` of their largest entry, others equal."""
    chex.assert_trees_all_equal_structs(actual, expected)
    flat, _ = jax.tree_util.tree_flatten_with_path(expected)
    for (path, x), y in zip(flat, jax.tree.leaves(actual), strict=True):
        if not isinstance(x, jax.Array | np.ndarray):
            assert y == x
            continue
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.max(np.abs(x), initial=0.0), 1e-6)
        np.testing.assert_allclose(y / scale, x / scale, rtol=0, atol=tolerance, err_msg=str(path))


@pytest.mark.parametrize("case", ALL)
def test_sites(case: Case) -> None:
    """The expected leaves are adapted, the base is the user's own tree, B is zero."""
    with precision(case, jnp.float32):
        problem = case.build(jnp.float32)
        lora = jlora.transform(problem.apply, *case.rules)
        base, adapter = lora.init(
            jax.random.key(0), problem.params, *problem.args, **problem.kwargs
        )
        found = jax.tree.leaves(adapter, is_leaf=lambda x: isinstance(x, jlora.LowRank))
        low_rank = [x for x in found if isinstance(x, jlora.LowRank)]
        assert len(low_rank) == case.sites
        assert jlora.count(adapter) == case.trainable
        assert jax.tree.structure(base) == jax.tree.structure(problem.params)
        for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(problem.params), strict=True):
            assert x is y
        assert not any(np.any(x.b) for x in low_rank)
        table = lora.sites(problem.params, *problem.args, **problem.kwargs)
        assert table.trainable == case.trainable
        assert table.total == jlora.count(problem.params)


@pytest.mark.parametrize("case", SOME)
def test_base_at_zero(case: Case) -> None:
    """At B = 0 the adapted model is the base model: bit for bit where its product is unchanged."""
    with precision(case, jnp.float32) as tolerance:
        problem = case.build(jnp.float32)
        lora = jlora.transform(problem.apply, *case.rules)
        base, adapter = lora.init(
            jax.random.key(0), problem.params, *problem.args, **problem.kwargs
        )
        actual = lora.apply(base, adapter, *problem.args, **problem.kwargs)
        expected = problem.apply(problem.params, *problem.args, **problem.kwargs)
        assert_close(actual, expected, 0.0 if case.exact_at_zero else tolerance)


@pytest.mark.parametrize(("case", "dtype"), FLOATS)
def test_adapted_is_merged(case: Case, dtype: Any) -> None:
    """Values, and gradients with respect to A, B and full leaves."""
    with precision(case, dtype) as tolerance:
        problem, lora, base, adapter = prepare(case, dtype)

        def adapted(adapter: Any) -> Any:
            return lora.apply(base, adapter, *problem.args, **problem.kwargs)

        def merged(adapter: Any) -> Any:
            return problem.apply(jlora.merge(base, adapter), *problem.args, **problem.kwargs)

        actual, expected = (
            value_and_slope(f, adapter, case.grad, jit=case.jit) for f in (adapted, merged)
        )
        assert_close(actual, expected, tolerance)
        assert not case.grad or any(np.any(x) for x in jax.tree.leaves(expected[1]))


def value_and_slope(
    f: Any, adapter: Any, grad: bool, *args: Any, jit: bool = True
) -> tuple[Any, Any]:
    """Floating-point outputs of `f`, and the gradient of their `scalar`, as one program."""
    program = jax.jit if jit else lambda f: f

    def loss(adapter: Any, *args: Any) -> tuple[Any, Any]:
        outputs = floats(f(adapter, *args))
        return scalar(outputs), outputs

    if not grad:
        return program(lambda *xs: loss(*xs)[1])(adapter, *args), None
    slope, outputs = program(jax.grad(loss, has_aux=True))(adapter, *args)
    return outputs, slope


@pytest.mark.parametrize("case", SOME)
def test_transforms_agree(case: Case) -> None:
    """`checkpoint`, `scan` and `vmap` around `apply`, and arguments traced by `jit`."""
    with precision(case, jnp.float32) as tolerance:
        problem, lora, base, adapter = prepare(case, jnp.float32)
        static, dynamic = ((), problem.args) if case.jit else (problem.args, ())

        def value(adapter: Any, *args: Any) -> list[jax.Array]:
            return floats(lora.apply(base, adapter, *args, *static, **problem.kwargs))

        plain = value_and_slope(value, adapter, case.grad, *dynamic, jit=case.jit)
        if case.grad:
            remat = value_and_slope(jax.checkpoint(value), adapter, True, *dynamic)
            assert_close(remat, plain, tolerance)
        two = jax.tree.map(lambda x: jnp.stack([x, x / 2]), adapter)
        compiled = jax.jit(value) if case.jit else value
        one_by_one = [compiled(jax.tree.map(lambda x, i=i: x[i], two), *dynamic) for i in range(2)]
        assert_close(one_by_one[0], plain[0], tolerance)
        expected = [jnp.stack(xs) for xs in zip(*one_by_one, strict=True)]
        _, scanned = jax.lax.scan(lambda _, a: (None, value(a, *dynamic)), None, two)
        assert_close(scanned, expected, tolerance)
        if case.vmap:
            mapped = jax.jit(jax.vmap(lambda a: value(a, *dynamic)))(two)
            assert_close(mapped, expected, tolerance)
