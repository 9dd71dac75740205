"""Norms, spectra and distances from the factors are those of ΔW formed densely in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import Layout, LowRank, analysis, merge
from jlora._tree import factor_shapes, weight_shape

# Shape of W, its layout, r.
SITES = {
    "dense": ((6, 4), Layout((), (0,), (1,)), 3),
    "transposed": ((4, 6), Layout((), (1,), (0,)), 3),
    "heads": ((6, 2, 3), Layout((), (0,), (1, 2)), 3),
    "conv": ((3, 2, 4, 5), Layout((), (0, 1, 2), (3,)), 4),
    "stacked": ((3, 6, 4), Layout((0,), (1,), (2,)), 2),
    "stacked_twice": ((2, 6, 3, 4), Layout((0, 2), (1,), (3,)), 2),
    "slots": ((6, 12), Layout((), (0,), (1,), (3, (0, 2), 1)), 2),
    "stacked_slots": ((2, 6, 12), Layout((0,), (1,), (2,), (3, (0, 2), 2)), 2),
    "rank_above_shape": ((3, 4), Layout((), (0,), (1,)), 7),
    "rank_one": ((6, 4), Layout((), (0,), (1,)), 1),
}


def site(name: str, seed: int = 0, rank: int | None = None, scale: float = 1.5) -> LowRank:
    """Random factors."""
    shape, layout, r = SITES[name]
    shapes = factor_shapes(layout, shape, rank or r)
    keys = jax.random.split(jax.random.key(seed))
    a, b = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return LowRank(a, b, scale, layout)


def dense(x: LowRank, name: str) -> np.ndarray:
    """ΔW as (stack…, inputs, outputs) in float64, by way of merging into zeros."""
    shape, layout, _ = SITES[name]
    with jax.enable_x64(True):
        wide = x._replace(a=np.asarray(x.a, np.float64), b=np.asarray(x.b, np.float64))
        w = np.asarray(merge({"w": jnp.zeros(shape)}, {"w": wide})["w"])
    w = w.transpose(*layout.stack, *layout.inputs, *layout.outputs)
    inputs = int(np.prod([shape[d] for d in layout.inputs]))
    return w.reshape(*(shape[d] for d in layout.stack), inputs, -1)


@pytest.mark.parametrize("name", SITES)
def test_spectrum(name: str) -> None:
    """All r values, zeros beyond what the shape allows; also under jit."""
    x = site(name)
    expected = np.linalg.svd(dense(x, name), compute_uv=False)
    for values in (analysis.delta_spectrum(x), jax.jit(analysis.delta_spectrum)(x)):
        slots = len(x.layout.slots[1]) if x.layout.slots else 1
        assert values.shape == (*expected.shape[:-1], slots * x.a.shape[-1])
        assert values.dtype == jnp.float32
        n = min(values.shape[-1], expected.shape[-1])
        np.testing.assert_allclose(values[..., :n], expected[..., :n], atol=1e-5 * expected.max())
        assert not values[..., n:].any()


@pytest.mark.parametrize("name", SITES)
def test_norm_and_shape(name: str) -> None:
    """The Frobenius norm, one a matrix, and the shape of W."""
    x = site(name)
    np.testing.assert_allclose(
        analysis.norm(x), np.linalg.norm(dense(x, name), axis=(-2, -1)), rtol=1e-5
    )
    assert weight_shape(x) == SITES[name][0]


@pytest.mark.parametrize("name", SITES)
def test_distance(name: str) -> None:
    """Of adapters of two ranks and scales; zero from itself."""
    x, y = site(name), site(name, seed=1, rank=2, scale=0.5)
    expected = np.linalg.norm(dense(x, name) - dense(y, name), axis=(-2, -1))
    np.testing.assert_allclose(analysis.distance(x, y), expected, rtol=1e-5)
    np.testing.assert_allclose(analysis.distance(y, x), expected, rtol=1e-5)
    assert np.all(analysis.distance(x, x) < 1e-5 * analysis.norm(x))


def test_distance_of_slots_and_whole() -> None:
    """The same ΔW with slots and without has no distance."""
    x = site("slots")
    (shape, layout, _), delta = SITES["slots"], jnp.asarray(dense(x, "slots"), jnp.float32)
    whole = LowRank(jnp.eye(shape[0]), delta, 1.0, layout._replace(slots=None))
    assert analysis.distance(x, whole) < 1e-5 * analysis.norm(x)


def test_distance_of_other_weights() -> None:
    """Shapes and axes must agree."""
    with pytest.raises(ValueError, match=r"must be for one weight; got .*\(6, 4\).*\(4, 6\)"):
        analysis.distance(site("dense"), site("transposed"))


def test_precision_and_keys() -> None:
    """bfloat16 factors are computed with in float32, float64 ones in float64, keys play no part."""
    x = site("stacked")
    half = x._replace(a=x.a.astype(jnp.bfloat16), b=x.b.astype(jnp.bfloat16))
    assert analysis.norm(half).dtype == jnp.float32
    noisy = x._replace(key=jax.random.split(jax.random.key(0), 3))
    np.testing.assert_array_equal(analysis.delta_spectrum(noisy), analysis.delta_spectrum(x))
    with jax.enable_x64(True):
        wide = x._replace(a=np.asarray(x.a, np.float64), b=np.asarray(x.b, np.float64))
        exact = np.linalg.svd(dense(x, "stacked"), compute_uv=False)
        np.testing.assert_allclose(analysis.delta_spectrum(wide), exact[..., :2], rtol=1e-12)


def test_vmap() -> None:
    """Many adapters of one site at once."""
    many = jax.tree.map(lambda *x: jnp.stack(x), *(site("dense", seed) for seed in range(3)))
    each = jnp.stack([analysis.delta_spectrum(site("dense", seed)) for seed in range(3)])
    np.testing.assert_allclose(jax.vmap(analysis.delta_spectrum)(many), each, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "stable", "effective"),
    [
        ([0.0, 0.0], 0, 0),
        ([3.0, 0.0], 1, 1),
        ([2.0, 2.0, 2.0], 3, 3),
        ([2.0, 1.0, 0.0], 1.25, 1.8898815748423097),  # 3 / 2^(2/3)
        ([1e-30, 1e-30], 2, 2),
        ([1e30, 1e30], 2, 2),
    ],
)
def test_ranks(values: list[float], stable: float, effective: float) -> None:
    """By hand, also at sizes whose squares float32 cannot hold."""
    x = jnp.array([values, values])
    np.testing.assert_allclose(analysis.stable_rank(x), [stable] * 2, rtol=1e-6)
    np.testing.assert_allclose(analysis.effective_rank(x), [effective] * 2, rtol=1e-6)
