"""The laws of the transform, each a function of a case that `init` was called on once.

With random A and B: adapted is merged, in values and in gradients; at B = 0 it is the base model;
`jit`, `vmap`, `checkpoint` and `scan` around `apply` change nothing; second derivatives, in forward
and reverse mode, are the merged model's; only the expected sites are found, and nothing of a
weight's size is trained; on a base that is quantized all is as on the weights that its codes stand
for.
"""

import contextlib
import dataclasses
import gc
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, Problem
from own_schemes import Pairs
from small import assert_close as assert_close
from small import randomize as randomize

import jlora
from jlora._tree import adapter_leaves, nest
from jlora.initializers._initializer import dtype_of


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
    lora: jlora.types.Transformed
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

    def merged(self, adapter: Any) -> list[jax.Array]:
        """What `value` must give: the model itself at merged parameters, no argument traced."""
        params = jlora.merge(self.base, adapter)
        return floats(self.problem.apply(params, *self.problem.args, **self.problem.kwargs))

    def compiled(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f` of an adapter and `traced`, one program where the case has programs."""
        return jax.jit(f).lower(self.adapter, *self.traced).compile() if self.case.jit else f


def make(case: Case, dtype: Any, default_start: bool = False) -> Made:
    """Builds the problem and calls `init`, with A as rules have it unless told, or from NumPy."""
    problem = case.build(dtype)
    rules = case.rules if default_start else map(from_numpy, case.rules)
    lora = jlora.transform(problem.apply, *rules)
    with warnings.catch_warnings():  # some cases are there for the weights that are left alone
        warnings.filterwarnings("ignore", r"\w+\(\) does not adapt \d+ weights")
        base, adapter = lora.init(
            jax.random.key(0), problem.params, *problem.args, **problem.kwargs
        )
    return Made(case, problem, lora, base, adapter, randomize(adapter))


# ------------------------------------------------------------------------------------ the laws


def sites_are_the_expected(made: Made) -> None:
    """The expected leaves are adapted, the base is the user's own tree, B is zero."""
    case, problem = made.case, made.problem
    found = jax.tree.leaves(made.initial, is_leaf=lambda x: isinstance(x, jlora.types.LowRank))
    low_rank = [x for x in found if isinstance(x, jlora.types.LowRank)]
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


def frozen_is_left_out(made: Made) -> None:
    """A leaf of `Frozen` has no node, and all else starts as without it; no rule may be idle."""
    problem, call = made.problem, (made.problem.params, *made.problem.args)
    trained = [s for s in made.lora.sites(*call, **problem.kwargs).leaves if s.rule is not None]
    patterns = [s.rule.pattern for s in trained if s.rule is not None]
    shared = [s for s in trained if s.rule and patterns.count(s.rule.pattern) > 1]
    first = [*shared, *trained][0]
    lora = jlora.transform(
        problem.apply, jlora.Frozen(f"^{re.escape(first.path)}$"), *made.lora.rules
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\w+\(\) does not adapt \d+ weights")
        if not shared:
            with pytest.raises(ValueError, match="gets no leaf: other rules take"):
                lora.init(jax.random.key(0), *call, **problem.kwargs)
            return
        base, adapter = lora.init(jax.random.key(0), *call, **problem.kwargs)
    expected = adapter_leaves(made.initial)
    del expected[first.parts]
    assert_close(adapter, nest(expected), 0, "all but what is frozen")
    for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(made.base), strict=True):
        assert x is y or np.array_equal(x, y)


def adapted_is_merged(made: Made, tolerance: float) -> tuple[Callable[..., Any], Any]:
    """Values, and gradients with respect to A, B and full leaves; no tracer outlives its trace.

    Gives the function of an adapter and `traced` that finds both, and what it found.
    """
    merged, adapted = (value_and_slope(f, made.case.grad) for f in (made.merged, made.value))
    with contextlib.nullcontext() if made.case.leaks else leaks_checked():
        program = made.compiled(lambda a, *traced: (adapted(a, *traced), merged(a)))
        actual, expected = program(made.adapter, *made.traced)
    assert_close(actual, expected, tolerance, "adapted is merged")
    assert not made.case.grad or any(np.any(np.asarray(x)) for x in jax.tree.leaves(expected[1]))
    return lambda *args: program(*args)[0], actual


def zero_is_the_base(made: Made, tolerance: float) -> None:
    """At B = 0 the adapted model is the base model: bit for bit where its product is unchanged."""
    args, kwargs = made.problem.args, made.problem.kwargs
    actual = made.lora.apply(made.base, made.initial, *args, **kwargs)
    expected = made.problem.apply(made.problem.params, *args, **kwargs)
    bound = 0.0 if made.case.exact_at_zero else tolerance
    assert_close(actual, expected, bound, "zero is the base")


def transforms_agree(made: Made, program: Any, at_one: Any, tolerance: float) -> None:
    """`checkpoint`, `scan` and `vmap` around `apply` are `apply` itself, all under `jit`."""
    case = made.case
    half = jax.tree.map(lambda x: np.asarray(x) / np.asarray(2, x.dtype), made.adapter)
    two = jax.tree.map(lambda *x: np.stack(x), made.adapter, half)

    def transformed(adapter: Any, two: Any, *traced: Any) -> dict[str, Any]:
        value = made.value
        found = {"scan": jax.lax.scan(lambda _, a: (None, value(a, *traced)), None, two)[1]}
        if case.vmap:
            found["vmap"] = jax.vmap(lambda a: value(a, *traced))(two)
        if case.grad:
            found["checkpoint"] = value_and_slope(jax.checkpoint(value), True)(adapter, *traced)
        return found

    at_half = program(half, *made.traced)
    stacked = jax.tree.map(lambda *xs: np.stack(xs), at_one[0], at_half[0])
    expected = {"scan": stacked, "vmap": stacked, "checkpoint": at_one}
    for name, actual in jax.jit(transformed)(made.adapter, two, *made.traced).items():
        assert_close(actual, expected[name], tolerance, name)


def derivatives_are_merged(made: Made, tolerance: float) -> None:
    """Derivatives of first and second order, in each mode that the merged model itself has."""
    along = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape), made.adapter)
    adapted, merged = (derivatives(f, along, made.case) for f in (made.value, made.merged))
    program = made.compiled(lambda a, *traced: (adapted(a, *traced), merged(a)))
    actual, expected = program(made.adapter, *made.traced)
    # Some of second order are 0, but for rounding of what is summed.
    sizes = [float(np.max(np.abs(x), initial=0.0)) for x in jax.tree.leaves(expected)]
    least = 0.01 * max(sizes, default=0.0)
    for order, found in actual.items():
        law = f"{order} of adapted is of merged"
        assert_close(found, expected[order], 10 * tolerance, law, least)


def quantized_is_dequantized(made: Made, tolerance: float) -> None:
    """With each matrix quantized, adapted or not, values and gradients as of what it stands for."""
    args, kwargs = made.problem.args, made.problem.kwargs
    sites = made.lora.sites(made.problem.params, *args, **kwargs)
    names = [re.escape(s.path) for s in sites.leaves if is_quantizable(s)]
    if not names:
        return
    base = jlora.quantize(made.base, Pairs(f"^({'|'.join(names)})$"), sites=sites)
    both = [
        value_and_slope(made._replace(base=x).value, made.case.grad)
        for x in (base, jlora.dequantize(base))
    ]
    program = made.compiled(lambda *given: [f(*given) for f in both])
    actual, expected = program(made.adapter, *made.traced)
    assert_close(actual, expected, tolerance, "quantized is dequantized")


def is_quantizable(site: jlora.types.Site) -> bool:
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


def hold(made: Made, tolerance: float, every_law: bool) -> None:
    """Adapted is merged; or every law but those of sites and of quantized bases."""
    program, found = adapted_is_merged(made, tolerance)
    if every_law:
        transforms_agree(made, program, found, tolerance)
        zero_is_the_base(made, tolerance)
        derivatives_are_merged(made, tolerance)


# ------------------------------------------------------------------------------ what they share


def start(
    key: jax.Array, w: Any, site: jlora.types.Site, rule: Any, of_b: float = 0.0
) -> tuple[Any, Any, Any]:
    """An initializer that compiles nothing: A and `of_b` times B drawn by NumPy, always alike."""
    del key
    rng, dtype = np.random.default_rng(1), dtype_of(site, rule)
    a, b = (rng.uniform(-1, 1, shape) for shape in rule.factor_shapes(site))
    a = a / max(site.inputs, 1) ** 0.5
    return w, *(jnp.asarray(np.asarray(x, dtype), dtype) for x in (a, of_b * b))


def from_numpy(rule: Any) -> Any:
    """The rule, from `start` where it has no initializer of its own."""
    draws = isinstance(rule, jlora.LoRA | jlora.DoRA) and rule.init is None
    return dataclasses.replace(rule, init=start) if draws else rule


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


def derivatives(f: Callable[..., Any], along: Any, case: Case) -> Callable[..., dict[str, Any]]:
    """The function that finds directional derivatives of the floats that `f` gives.

    Those of second order are of their `scalar`, by forward and reverse mode in each order.
    """

    def of_each_order(adapter: Any, *args: Any) -> dict[str, Any]:
        t = jax.tree.map(lambda x, d: jnp.asarray(d, x.dtype), adapter, along)

        def forward(g: Callable[[Any], Any]) -> Callable[[Any], Any]:
            return lambda a: jax.jvp(g, (a,), (t,))[1]

        def reverse(g: Callable[[Any], Any]) -> Callable[[Any], Any]:
            return lambda a: sum(map(jnp.vdot, *map(jax.tree.leaves, (jax.grad(g)(a), t))))

        def loss(a: Any) -> jax.Array:
            return scalar(f(a, *args))

        found: dict[str, Any] = {}
        if case.forward:
            found["jvp"] = forward(lambda a: floats(f(a, *args)))(adapter)
            found["jvp of jvp"] = forward(forward(loss))(adapter)
        if case.grad and case.twice:
            found["grad of grad"] = jax.grad(reverse(loss))(adapter)
        if case.grad and case.forward:
            found["jvp of grad"] = forward(jax.grad(loss))(adapter)
            found["grad of jvp"] = jax.grad(forward(loss))(adapter)
        return found

    return of_each_order


def assert_same_codes(actual: Any, expected: Any) -> None:
    """Codes of one weight by two programs: other ones only where rounding decides, one in 1,000."""
    chex.assert_trees_all_equal_structs(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if x.dtype.itemsize == 1:
            assert np.mean(x.view(np.uint8) != y.view(np.uint8)) <= 1e-3
        else:
            np.testing.assert_allclose(x, y, rtol=1e-4)
