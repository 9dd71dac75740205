"""The laws of the transform, each a function of a case that `init` was called on once.

With random A and B: adapted is merged, in values and in gradients; at B = 0 it is the base model;
`jit`, `vmap`, `checkpoint` and `scan` around `apply` change nothing; only the expected sites are
found, and nothing of a weight's size is trained; on a base that is quantized all is as on the
weights that its codes stand for.
"""

import contextlib
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orders
from cases import Case, Problem
from own_schemes import Pairs

import jlora


@contextlib.contextmanager
def precision(case: Case, dtype: Any) -> Iterator[float]:
    """Sets up `dtype`, strict promotion where the model allows it, and gives the tolerance."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.enable_x64(dtype == jnp.float64))
        if case.strict:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield 1e-10 if dtype == jnp.float64 else case.tolerance or 1e-5


class Made(NamedTuple):
    """A case under its rules.

    Attributes:
        case: the case.
        problem: the model, its parameters and one call.
        lora: the transform.
        base: what `init` gave.
        initial: the adapter that `init` gave.
        adapter: the same with noise on every leaf, so that B is not zero.
    """

    case: Case
    problem: Problem
    lora: jlora.Transformed
    base: Any
    initial: Any
    adapter: Any

    @property
    def traced(self) -> tuple[Any, ...]:
        """The arguments that `jit` traces: all of them, or none."""
        return self.problem.args if self.case.jit else ()

    def value(self, adapter: Any, *traced: Any) -> list[jax.Array]:
        """The floating-point outputs of `apply`."""
        args = traced or self.problem.args
        return floats(self.lora.apply(self.base, adapter, *args, **self.problem.kwargs))

    def adapted(self) -> Callable[..., Any]:
        """`value` and its slope, to be called with an adapter and `traced`."""
        f = value_and_slope(self.value, self.case.grad)
        return jax.jit(f) if self.case.jit else f

    def merged(self) -> Any:
        """What `adapted` must give: the model itself at merged parameters, no argument traced."""

        def value(adapter: Any) -> list[jax.Array]:
            params = jlora.merge(self.base, adapter)
            return floats(self.problem.apply(params, *self.problem.args, **self.problem.kwargs))

        f = value_and_slope(value, self.case.grad)
        return (jax.jit(f) if self.case.jit else f)(self.adapter)


def make(case: Case, dtype: Any) -> Made:
    """Builds the problem and calls `init`."""
    problem = case.build(dtype)
    lora = jlora.transform(problem.apply, *case.rules)
    with warnings.catch_warnings():  # some cases are there for the weights that are left alone
        warnings.filterwarnings("ignore", r"\w+\(\) leaves \d+ weights as they are")
        base, adapter = lora.init(
            jax.random.key(0), problem.params, *problem.args, **problem.kwargs
        )
    return Made(case, problem, lora, base, adapter, randomize(adapter))


# ------------------------------------------------------------------------------------ the laws


def sites_are_the_expected(made: Made) -> None:
    """The expected leaves are adapted, the base is the user's own tree, B is zero."""
    case, problem = made.case, made.problem
    found = jax.tree.leaves(made.initial, is_leaf=lambda x: isinstance(x, jlora.LowRank))
    low_rank = [x for x in found if isinstance(x, jlora.LowRank)]
    assert len(low_rank) == case.sites
    assert jlora.count(made.initial) == case.trainable
    assert jax.tree.structure(made.base) == jax.tree.structure(problem.params)
    for x, y in zip(jax.tree.leaves(made.base), jax.tree.leaves(problem.params), strict=True):
        assert x is y
    assert not any(np.any(np.asarray(x.b)) for x in low_rank)


def table_is_that_of_init(made: Made) -> None:
    """`sites` counts what `init` made, and all parameters."""
    problem = made.problem
    table = made.lora.sites(problem.params, *problem.args, **problem.kwargs)
    assert table.trainable == made.case.trainable
    assert table.total == jlora.count(problem.params)


def zero_is_the_base(made: Made, tolerance: float) -> None:
    """At B = 0 the adapted model is the base model: bit for bit where its product is unchanged."""
    problem = made.problem
    actual = made.lora.apply(made.base, made.initial, *problem.args, **problem.kwargs)
    expected = problem.apply(problem.params, *problem.args, **problem.kwargs)
    assert_close(actual, expected, 0.0 if made.case.exact_at_zero else tolerance)


def adapted_is_merged(made: Made, adapted: Any, expected: Any, tolerance: float) -> None:
    """Values, and gradients with respect to A, B and full leaves; no tracer outlives its trace."""
    with contextlib.nullcontext() if made.case.leaks else leaks_checked():
        actual = adapted(made.adapter, *made.traced)
    assert_close(actual, expected, tolerance, "adapted is merged")
    assert not made.case.grad or any(np.any(np.asarray(x)) for x in jax.tree.leaves(expected[1]))


def transforms_agree(made: Made, adapted: Any, tolerance: float) -> None:
    """`checkpoint`, `scan` and `vmap` around `apply` are `apply` itself, all under `jit`."""
    case = made.case
    two = jax.tree.map(lambda x: np.stack([x, np.asarray(x) / 2]), made.adapter)

    def transformed(adapter: Any, two: Any, *traced: Any) -> dict[str, Any]:
        value = made.value
        found = {"scan": jax.lax.scan(lambda _, a: (None, value(a, *traced)), None, two)[1]}
        if case.vmap:
            found["vmap"] = jax.vmap(lambda a: value(a, *traced))(two)
        if case.grad:
            found["checkpoint"] = value_and_slope(jax.checkpoint(value), True)(adapter, *traced)
        return found

    found = jax.jit(transformed)(made.adapter, two, *made.traced)
    one_by_one = [adapted(jax.tree.map(lambda x, i=i: x[i], two), *made.traced) for i in range(2)]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *(outputs for outputs, _ in one_by_one))
    expected = {"scan": stacked, "vmap": stacked, "checkpoint": one_by_one[0]}
    for name, actual in found.items():
        assert_close(actual, expected[name], tolerance, name)


def quantized_is_dequantized(made: Made, tolerance: float) -> None:
    """With each matrix quantized, adapted or not, values and gradients as of what it stands for."""
    args, kwargs = made.problem.args, made.problem.kwargs
    sites = made.lora.sites(made.problem.params, *args, **kwargs)
    names = [re.escape(s.path) for s in sites.leaves if is_quantizable(s)]
    if not names:
        return
    base = jlora.quantize(made.base, Pairs(f"^({'|'.join(names)})$"), sites=sites)
    actual, expected = (
        made._replace(base=x).adapted()(made.adapter, *made.traced)
        for x in (base, jlora.dequantize(base))
    )
    assert_close(actual, expected, tolerance, "quantized is dequantized")


def is_quantizable(site: jlora.Site) -> bool:
    """Whether a leaf is a matrix that the traced call uses, and not trained in full."""
    matrix = len(site.shape) >= 2 and 0 not in site.shape and site.used is not False
    floating = jnp.issubdtype(site.dtype, jnp.floating)
    return matrix and floating and not isinstance(site.rule, jlora.Full)


@contextlib.contextmanager
def leaks_checked() -> Iterator[None]:
    """`jax.checking_leaks`, whose search through all objects is limited to those made since."""
    gc.disable()  # a collection while all is frozen would make the next ones search everything
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()
        gc.enable()


def in_both_orders(made: Made, tolerance: float, every_law: bool) -> None:
    """Adapted is merged, or every law but that of sites, with each order of the product forced."""
    expected = made.merged()
    for order in (orders.APART, orders.SUMMED):
        with orders.forced(order) as planner:
            adapted = made.adapted()
            adapted_is_merged(made, adapted, expected, tolerance)
            if every_law:
                transforms_agree(made, adapted, tolerance)
                zero_is_the_base(made, tolerance)
        if not planner.called:
            break  # no product allows both orders: the second would be the same program


# ------------------------------------------------------------------------------ what they share


def randomize(adapter: Any) -> Any:
    """Every leaf plus noise, so that B is not zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape), x.dtype), adapter
    )


def floats(tree: Any) -> list[jax.Array]:
    """The floating-point leaves of a model's outputs."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array | np.ndarray)]
    return [jnp.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]


def scalar(outputs: Any) -> jax.Array:
    """A scalar that depends on every entry of the outputs in its own way."""
    dtype = jnp.result_type(float)
    parts = [x.ravel().real.astype(dtype) for x in floats(outputs)]
    return sum(jnp.vdot(np.cos(np.arange(x.size, dtype=dtype)), x) for x in parts)


def value_and_slope(f: Callable[..., Any], grad: bool = True) -> Callable[..., Any]:
    """The floats that `f` gives, and the slope of their `scalar` along its first argument."""

    def loss(adapter: Any, *args: Any) -> tuple[Any, Any]:
        outputs = floats(f(adapter, *args))
        return scalar(outputs), outputs

    def both(adapter: Any, *args: Any) -> tuple[Any, Any]:
        if not grad:
            return loss(adapter, *args)[1], None
        slope, outputs = jax.grad(loss, has_aux=True)(adapter, *args)
        return outputs, slope

    return both


def assert_close(actual: Any, expected: Any, tolerance: float, law: str = "") -> None:
    """Equal structures; floating leaves within `tolerance` of their largest entry, others equal."""
    chex.assert_trees_all_equal_structs(actual, expected)
    flat, _ = jax.tree_util.tree_flatten_with_path(expected)
    for (path, x), y in zip(flat, jax.tree.leaves(actual), strict=True):
        where = f"{law} {jax.tree_util.keystr(path)}"
        if not isinstance(x, jax.Array | np.ndarray):
            assert y == x, where
            continue
        assert y.shape == x.shape, where
        assert y.dtype == x.dtype, where
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = (np.asarray(v, np.result_type(v.dtype, np.float64)) for v in (x, y))
        scale = max(np.max(np.abs(x), initial=0.0), 1e-6)
        np.testing.assert_allclose(y / scale, x / scale, rtol=0, atol=tolerance, err_msg=where)
