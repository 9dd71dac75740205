"""What is computed from the factors is what NumPy finds in ΔW, formed densely in float64."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import nodes
import numpy as np
import pytest
from small import some

from jlora import analysis
from jlora.types import Layout, LowRank

SLOTS = (Layout((0,), (1,), (2,), (3, (0, 2), 2)), Layout((0, 2), (1,), (3,)))
SITES = nodes.SITES | {
    "stacked slots": ((2, 6, 12), SLOTS[0]),
    "stacked twice": ((2, 6, 3, 4), SLOTS[1]),
    "rank above shape": ((3, 4), nodes.PLAIN),
}
# A stack of slots every day.
EACH = pytest.mark.parametrize("name", some(SITES, "stacked slots"))


def site(name: str, seed: int = 0, rank: int | None = None, scale: float = 1.5) -> LowRank:
    """Random factors."""
    shape, layout = SITES[name]
    return nodes.draw(seed, shape, layout, rank or (7 if name == "rank above shape" else 3), scale)


def matrices(w: np.ndarray, name: str) -> np.ndarray:
    """A weight as (stack…, inputs, outputs) in float64."""
    return nodes.matrices(w.astype(np.float64), SITES[name][1]._replace(slots=None))


def dense(x: LowRank, name: str) -> np.ndarray:
    """ΔW as (stack…, inputs, outputs) in float64."""
    return matrices(nodes.delta(x, SITES[name][0]), name)


@EACH
def test_sizes(name: str) -> None:
    """All r values, zeros beyond what the shape allows; norms; distances of two adapters."""
    x, y = site(name), site(name, seed=1, rank=2, scale=0.5)
    one, two = dense(x, name), dense(y, name)
    expected = np.linalg.svd(one, compute_uv=False)
    values, size, far, near = jax.jit(
        lambda x, y: (
            analysis.delta_spectrum(x),
            analysis.norm(x),
            analysis.distance(x, y),
            analysis.distance(x, x),
        )
    )(x, y)
    assert values.dtype == jnp.float32
    n = min(values.shape[-1], expected.shape[-1])
    slots = len(x.layout.slots[1]) if x.layout.slots else 1
    assert values.shape == (*expected.shape[:-1], slots * x.a.shape[-1])
    np.testing.assert_allclose(values[..., :n], expected[..., :n], atol=1e-5 * expected.max())
    assert not values[..., n:].any()
    np.testing.assert_allclose(size, np.linalg.norm(one, axis=(-2, -1)), rtol=1e-5)
    np.testing.assert_allclose(far, np.linalg.norm(one - two, axis=(-2, -1)), rtol=1e-5)
    assert np.all(near < 1e-5 * size)


def test_norms_at_the_limits() -> None:
    """Of ΔW whose squares float32 has not; with slots and without; of another weight."""
    x = site("slots")
    for size in (2.0**-70, 2.0**70):
        scaled = analysis.norm(x._replace(scale=size * x.scale))
        np.testing.assert_allclose(scaled / size, analysis.norm(x), rtol=1e-5)
    (shape, layout), delta = SITES["slots"], jnp.asarray(dense(x, "slots"), jnp.float32)
    whole = LowRank(jnp.eye(shape[0]), delta, 1.0, layout._replace(slots=None))
    assert analysis.distance(x, whole) < 1e-5 * analysis.norm(x)
    with pytest.raises(ValueError, match=r"must be for one weight; got .*\(0,\).*\(1,\)"):
        analysis.distance(site("plain"), site("turned"))


def test_precision_and_keys() -> None:
    """bfloat16 factors are computed with in float32, float64 ones in float64, keys play no part."""
    x = site("stacked")
    half = x._replace(a=x.a.astype(jnp.bfloat16), b=x.b.astype(jnp.bfloat16))
    assert analysis.norm(half).dtype == jnp.float32
    noisy = x._replace(key=jax.random.split(jax.random.key(0), 3))
    values, expected = map(analysis.delta_spectrum, (noisy, x))
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        wide = x._replace(a=np.asarray(x.a, np.float64), b=np.asarray(x.b, np.float64))
        exact = np.linalg.svd(dense(x, "stacked"), compute_uv=False)
        np.testing.assert_allclose(analysis.delta_spectrum(wide), exact[..., :3], rtol=1e-12)


def test_ranks() -> None:
    """By hand, also at sizes whose squares float32 cannot hold."""
    table = [
        ([0.0, 0.0, 0.0], 0, 0),
        ([3.0, 0.0, 0.0], 1, 1),
        ([2.0, 2.0, 2.0], 3, 3),
        ([2.0, 1.0, 0.0], 1.25, 3 / 2 ** (2 / 3)),
        ([1e-30, 1e-30, 0.0], 2, 2),
        ([1e30, 1e30, 0.0], 2, 2),
    ]
    values, stable, effective = zip(*table, strict=True)
    np.testing.assert_allclose(analysis.stable_rank(jnp.array(values)), stable, rtol=1e-6)
    np.testing.assert_allclose(analysis.effective_rank(jnp.array(values)), effective, rtol=1e-6)


# ---- directions ---------------------------------------------------------------------------------


def directions(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `n` singular vectors among inputs and outputs; zeros beyond the rank."""
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    held = (values > 1e-6 * values[..., :1])[..., None, :n]
    return u[..., :n] * held, vt.swapaxes(-2, -1)[..., :n] * held


def similarity(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """φ by its definition, for one pair of matrices of directions."""
    rows, columns = range(1, u.shape[1] + 1), range(1, v.shape[1] + 1)
    size = lambda i, j: np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j)  # noqa: E731
    return np.array([[size(i, j) for j in columns] for i in rows])


def most(x: LowRank, name: str) -> int:
    """The most directions that ΔW can have."""
    slots = len(x.layout.slots[1]) if x.layout.slots else 1
    return min(*dense(x, name).shape[-2:], slots * x.a.shape[-1])


def weight(name: str, seed: int = 3) -> np.ndarray:
    """A random weight for a site."""
    return np.random.default_rng(seed).normal(size=SITES[name][0]).astype(np.float32)


@EACH
def test_similarity_of_sites(name: str) -> None:
    """Of ΔW of two adapters, whatever the axes and slots."""
    x, y = site(name), site(name, seed=1, rank=2, scale=0.5)
    u, v = (directions(dense(z, name), most(z, name))[0] for z in (x, y))
    n = u.ndim - 2
    pairs = zip(u.reshape(-1, *u.shape[n:]), v.reshape(-1, *v.shape[n:]), strict=True)
    expected = np.array([similarity(*pair) for pair in pairs])
    grid = jax.jit(analysis.subspace_similarity)(x, y)
    assert grid.shape == (*u.shape[:n], u.shape[-1], v.shape[-1])
    np.testing.assert_allclose(grid.reshape(expected.shape), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("r1", "r2"), [(9, 4), (3, 2), (1, 5), (7, 6)])
def test_similarity_of_factors(r1: int, r2: int) -> None:
    """Of A, stacked, up to more columns than inputs; the transpose the other way round."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 7, r1)), rng.normal(size=(2, 7, r2))
    expected = [
        similarity(directions(x, r1)[0], directions(y, r2)[0]) for x, y in zip(a, b, strict=True)
    ]
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    grid = analysis.subspace_similarity(a, b)
    assert grid.shape == (2, min(r1, 7), min(r2, 7))
    np.testing.assert_allclose(grid, expected, atol=1e-4)
    np.testing.assert_allclose(analysis.subspace_similarity(b, a), grid.mT, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(analysis.subspace_similarity)(a, b), grid, atol=1e-6)


def test_similarity_with_itself() -> None:
    """1 wherever one space holds the other, so everywhere; bfloat16 is computed with in float32."""
    a = jax.random.normal(jax.random.key(0), (8, 3), jnp.bfloat16)
    grid = analysis.subspace_similarity(a, a)
    assert grid.dtype == jnp.float32
    np.testing.assert_allclose(grid, np.ones((3, 3)), rtol=1e-5)


@pytest.mark.slow
def test_similarity_of_what_is_not_there() -> None:
    """Directions beyond the rank overlap with none; with B = 0 there are none at all."""
    a = jax.random.normal(jax.random.key(0), (8, 2))
    twice = jnp.concatenate([a, a], axis=1)  # (8, 4) of rank 2
    grid = analysis.subspace_similarity(twice, twice)
    np.testing.assert_allclose(jnp.diag(grid), [1, 1, 2 / 3, 1 / 2], rtol=1e-5)
    x = site("stacked")
    start = x._replace(b=jnp.zeros_like(x.b))
    assert not analysis.subspace_similarity(start, x).any()
    assert not analysis.subspace_similarity(start, start).any()
    assert not analysis.subspace_similarity(jnp.zeros((8, 3)), a).any()


@pytest.mark.parametrize("shapes", [((6, 2), (5, 2)), ((2, 6, 2), (3, 6, 2)), ((6,), (6,))])
def test_similarity_of_other_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"`a1` and `a2` must have shapes .* differ in r alone"):
        analysis.subspace_similarity(*map(jnp.ones, shapes))


@EACH
def test_amplification(name: str) -> None:
    """For one direction and for all, from a site and from ΔW."""
    x, w = site(name), weight(name)
    delta, wide = dense(x, name), matrices(w, name)
    function = jax.jit(analysis.amplification, static_argnums=2)
    pair, full = (wide.astype(np.float32), delta.astype(np.float32)), most(x, name)
    for *given, rank in ((w, x, 1), (w, x, full), (*pair, full)):
        u, v = directions(delta, rank)
        within = np.linalg.norm(u.swapaxes(-2, -1) @ wide @ v, axis=(-2, -1))
        expected = np.linalg.norm(delta, axis=(-2, -1)) / within
        np.testing.assert_allclose(function(*given, rank), expected, rtol=1e-3)


@pytest.mark.slow
def test_amplification_at_the_limits() -> None:
    """0 for ΔW = 0, infinite for W = 0; directions beyond the rank of ΔW add nothing."""
    x, w = site("plain"), weight("plain")
    start = x._replace(b=jnp.zeros_like(x.b))
    with jax.debug_nans(True):
        assert analysis.amplification(w, start, 3) == 0
        assert analysis.amplification(w, jnp.zeros_like(w), 4) == 0
    assert analysis.amplification(jnp.zeros_like(w), x, 3) == jnp.inf
    single = x._replace(b=x.b.at[1:].set(0))  # rank 1
    expected = analysis.amplification(w, single, 1)
    np.testing.assert_allclose(analysis.amplification(w, single, 3), expected, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 10, -1])
@pytest.mark.parametrize(
    ("function", "limit"), [("intruder_dimensions", 9), ("amplification", 3)]
)  # the smaller side of W, and that of A and B
def test_more_directions_than_there_are(function: str, limit: int, count: int) -> None:
    argument, of = ("k", "W + ΔW") if limit == 9 else ("rank", "ΔW")
    message = f"`{argument}` must be from 1 to {limit}, the most directions that {of} can have"
    with pytest.raises(ValueError, match=re.escape(message) + f".*; got {count}"):
        getattr(analysis, function)(weight("plain"), site("plain"), **{argument: count})


ONES = (jnp.ones((4, 6)), jnp.ones((6, 4)), jnp.ones(6))
OTHERS: dict[str, Any] = {
    r"`w` must be .* of shape \(12, 9\); got shape \(4, 6\)": (ONES[0], site("plain")),
    r"must have the same shape .* \(4, 6\) and \(6, 4\)": ONES[:2],
    r"must have the same shape .* \(6,\) and \(6,\)": (ONES[2], ONES[2]),
}


@pytest.mark.parametrize("message", OTHERS)
@pytest.mark.parametrize("function", [analysis.amplification, analysis.intruder_dimensions])
def test_weights_of_other_shapes(function: Any, message: str) -> None:
    """W must be that of the site, or of the shape of ΔW."""
    with pytest.raises(ValueError, match=message):
        function(*OTHERS[message], 1)


@EACH
def test_intruders(name: str) -> None:
    """Against the definition at several thresholds, from a site and from ΔW; under jit."""
    with jax.enable_x64(True):
        x = site(name, scale=3.0)
        x = x._replace(a=np.asarray(x.a, np.float64), b=np.asarray(x.b, np.float64))
        w = weight(name).astype(np.float64)
        wide, delta = matrices(w, name), dense(x, name)
        k = min(wide.shape[-2:]) - 1
        v, after = (np.linalg.svd(y, full_matrices=False)[2] for y in (wide, wide + delta))
        cosines = np.abs(after[..., :k, :] @ v.swapaxes(-2, -1)).max(-1)
        jitted = jax.jit(analysis.intruder_dimensions, static_argnums=2)
        for threshold in (0.5, 0.7, 0.9):
            for pair in ((w, x), (wide, delta)):
                np.testing.assert_array_equal(jitted(*pair, k, threshold), cosines < threshold)


@pytest.mark.slow
def test_intruders_at_the_limits() -> None:
    """None for ΔW = 0; all directions that there are for W = 0, or where W has nothing."""
    x, w = site("plain"), weight("plain")
    assert not analysis.intruder_dimensions(w, x._replace(b=jnp.zeros_like(x.b)), 4).any()
    found = analysis.intruder_dimensions(jnp.zeros_like(w), x, 4)
    assert found.tolist() == [True, True, True, False]  # ΔW has rank 3
    assert not analysis.intruder_dimensions(jnp.zeros((6, 4)), jnp.zeros((6, 4)), 4).any()
    w = jnp.diag(jnp.array([2.0, 1.0, 0.0]))
    delta = jnp.zeros((3, 3)).at[2, 2].set(5.0)
    assert analysis.intruder_dimensions(w, delta, 3).tolist() == [True, False, False]
