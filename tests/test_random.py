"""The laws over random products: random axes, orders, slices, reshapes and transposes of W."""

import math

import jax
import jax.numpy as jnp
import pytest
from cases.random_einsum import Product, products
from hypothesis import HealthCheck, given, settings
from laws import assert_close, randomize, value_and_slope

import jlora


def check(product: Product) -> None:
    """The layout is the expected one, and adapted is merged."""
    problem = product.problem
    lora = jlora.transform(problem.apply, jlora.LoRA("w", rank=product.rank, alpha=2))
    layout = lora.sites(problem.params, *problem.args)["w"].layout
    assert layout is not None
    for found, expected in zip(
        layout, (product.stack, product.inputs, product.outputs), strict=False
    ):
        assert set(found) - set(product.unclear) == set(expected) - set(product.unclear)
    shape = problem.params["w"].shape
    assert math.prod(shape[d] for d in layout.inputs) >= product.rank
    base, adapter = lora.init(jax.random.key(0), problem.params, *problem.args)
    adapter = randomize(adapter)
    merged = jax.jit(value_and_slope(lambda a: problem.apply(jlora.merge(base, a), *problem.args)))(
        adapter
    )
    f = jax.jit(value_and_slope(lambda a: lora.apply(base, a, *problem.args)))
    assert_close(f(adapter), merged, 1e-5, "adapted is merged")


@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(products(jnp.float32))
def test_random_products(product: Product) -> None:
    """Two of them, the same in every run."""
    check(product)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(products(jnp.float32))
def test_many_random_products(product: Product) -> None:
    """Five hundred new ones."""
    check(product)
