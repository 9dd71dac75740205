"""What is computed from the factors is what NumPy finds in ΔW, formed densely in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import nodes
import numpy as np
import pytest
from messages import refused
from small import array, some

from jlora import analysis, many
from jlora.types import Decomposed, Layout, LowRank

SLOTS = (Layout((0,), (1,), (2,), (3, (0, 2), 2)), Layout((0, 2), (1,), (3,)))
SITES = nodes.SITES | {
    "stacked slots": ((2, 6, 12), SLOTS[0]),
    "stacked twice": ((2, 6, 3, 4), SLOTS[1]),
    "rank above shape": ((3, 4), nodes.PLAIN),
}


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


def directions(x: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `n` singular vectors among inputs and outputs; zeros beyond the rank."""
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    held = (values > 1e-6 * values[..., :1])[..., None, :n]
    return u[..., :n] * held, vt.swapaxes(-2, -1)[..., :n] * held


def similarity(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """φ by its definition, for matrices of directions, one or a stack."""
    rows, columns = range(1, u.shape[-1] + 1), range(1, v.shape[-1] + 1)
    cosines = u.swapaxes(-2, -1) @ v
    size = lambda i, j: (cosines[..., :i, :j] ** 2).sum((-2, -1)) / min(i, j)  # noqa: E731
    return np.stack([np.stack([size(i, j) for j in columns], -1) for i in rows], -2)


@pytest.mark.parametrize("name", some(SITES, "stacked slots"))
def test_of_two_adapters(name: str) -> None:
    """Sizes, distances, similarities, amplifications and intruders, whatever the axes and slots.

    There are r values, zeros beyond what the shape allows. A site and its ΔW give the same.
    """
    x, y = site(name), site(name, seed=1, rank=2, scale=0.5)
    w = np.random.default_rng(3).normal(size=SITES[name][0]).astype(np.float32)
    one, two, wide = dense(x, name), dense(y, name), matrices(w, name)
    slots = len(x.layout.slots[1]) if x.layout.slots else 1
    full_1, full_2 = (min(*one.shape[-2:], slots * z.a.shape[-1]) for z in (x, y))
    pair = wide.astype(np.float32), one.astype(np.float32)

    @jax.jit
    def found(x: Any, y: Any, w: Any, pair: Any) -> Any:
        distances = analysis.distance(x, y), analysis.distance(x, x)
        strength = [
            analysis.amplification(*given) for given in ((w, x, 1), (w, x, full_1), (*pair, full_1))
        ]
        sizes = analysis.delta_spectrum(x), analysis.norm(x), *distances
        return sizes, analysis.subspace_similarity(x, y), strength

    (values, size, far, near), grid, strength = found(x, y, w, pair)
    expected = np.linalg.svd(one, compute_uv=False)
    assert values.dtype == jnp.float32
    n = min(values.shape[-1], expected.shape[-1])
    assert values.shape == (*expected.shape[:-1], slots * x.a.shape[-1])
    np.testing.assert_allclose(values[..., :n], expected[..., :n], atol=1e-5 * expected.max())
    assert not values[..., n:].any()
    np.testing.assert_allclose(size, np.linalg.norm(one, axis=(-2, -1)), rtol=1e-5)
    np.testing.assert_allclose(far, np.linalg.norm(one - two, axis=(-2, -1)), rtol=1e-5)
    assert np.all(near < 1e-5 * size)

    measured, exact = analysis.measure(x), analysis.delta_spectrum(x)
    np.testing.assert_allclose(measured.spectrum[..., :n], expected[..., :n], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(measured.norm, np.linalg.norm(one, axis=(-2, -1)), rtol=1e-12)
    np.testing.assert_allclose(measured.stable_rank, analysis.stable_rank(exact), rtol=1e-4)
    np.testing.assert_allclose(measured.effective_rank, analysis.effective_rank(exact), rtol=1e-4)

    u, v = directions(one, full_1)[0], directions(two, full_2)[0]
    np.testing.assert_allclose(grid, similarity(u, v), atol=1e-4)

    for actual, rank in zip(strength, (1, full_1, full_1), strict=True):
        u, v = directions(one, rank)
        within = np.linalg.norm(u.swapaxes(-2, -1) @ wide @ v, axis=(-2, -1))
        expected = np.linalg.norm(one, axis=(-2, -1)) / within
        np.testing.assert_allclose(actual, expected, rtol=1e-3)

    with jax.enable_x64(True):
        x = site(name, scale=3.0)
        x = x._replace(a=np.asarray(x.a, np.float64), b=np.asarray(x.b, np.float64))
        w, wide, delta = w.astype(np.float64), matrices(w, name), dense(x, name)
        k = min(wide.shape[-2:]) - 1
        v, after = (np.linalg.svd(y, full_matrices=False)[2] for y in (wide, wide + delta))
        cosines = np.abs(after[..., :k, :] @ v.swapaxes(-2, -1)).max(-1)
        intruders = jax.jit(
            lambda pairs, threshold: [
                analysis.intruder_dimensions(*pair, k, threshold) for pair in pairs
            ]
        )
        for threshold in (0.5, 0.7, 0.9):
            for actual in intruders(((w, x), (wide, delta)), threshold):
                np.testing.assert_array_equal(actual, cosines < threshold)
        exact = np.linalg.svd(delta, compute_uv=False)[..., :full_1]
        spectrum = jax.jit(analysis.delta_spectrum)(x)[..., :full_1]
        np.testing.assert_allclose(spectrum, exact, rtol=1e-11)


def test_norms_at_the_limits() -> None:
    """Of ΔW whose squares float32 has not; with slots and without; of another weight.

    bfloat16 factors are computed with in float32, and keys play no part.
    """
    x = site("slots")
    (shape, layout), delta = SITES["slots"], np.asarray(dense(x, "slots"), np.float32)
    whole = LowRank(np.eye(shape[0], dtype="f"), delta, 1.0, layout._replace(slots=None))
    half = x._replace(a=x.a.astype(jnp.bfloat16), b=x.b.astype(jnp.bfloat16))
    noisy = x._replace(key=jax.random.key(0))

    @jax.jit
    def norms(x: Any, half: Any, noisy: Any) -> Any:
        scaled = [analysis.norm(x._replace(scale=s * x.scale)) / s for s in (2.0**-70, 2.0**70)]
        norm = analysis.norm(x)
        return (
            [norm, analysis.norm(noisy), *scaled],
            analysis.norm(half),
            analysis.distance(x, whole),
        )

    same, of_half, far = norms(x, half, noisy)
    np.testing.assert_allclose(same, same[0], rtol=1e-5)
    assert of_half.dtype == jnp.float32
    np.testing.assert_allclose(of_half, same[0], rtol=1e-2)
    assert far < 1e-5 * same[0]
    with refused(ValueError, "", "must adapt weights with equal", "got", "(0,)", "(1,)"):
        analysis.distance(site("plain"), site("turned"))


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


def test_similarity_of_factors() -> None:
    """Of A, stacked, with more columns than inputs; the transpose the other way round.

    It is 1 with itself, also in bfloat16; directions beyond the rank overlap with none.
    """
    a, b = array(2, 7, 9), array(2, 7, 4)
    narrow = a[0, :, :3].astype(jnp.bfloat16)
    twice = np.concatenate([b[0, :, :2]] * 2, axis=1)  # (7, 4) of rank 2

    @jax.jit
    def grids(a: Any, b: Any, narrow: Any, twice: Any) -> Any:
        f = analysis.subspace_similarity
        zero = (
            f(jnp.zeros((7, 3)), a[0]),
            f(site("plain")._replace(b=jnp.zeros((3, 9))), site("plain")),
        )
        return (f(a, b), f(b, a).mT, jax.vmap(f)(a, b)), f(narrow, narrow), f(twice, twice), zero

    each, same, repeated, zeros = grids(a, b, narrow, twice)
    expected = similarity(directions(np.float64(a), 9)[0], directions(np.float64(b), 4)[0])
    for grid in each:
        np.testing.assert_allclose(grid, expected, atol=1e-4)
    assert same.dtype == jnp.float32
    np.testing.assert_allclose(same, np.ones((3, 3)), rtol=1e-5)
    np.testing.assert_allclose(jnp.diag(repeated), [1, 1, 2 / 3, 1 / 2], rtol=1e-5)
    assert not any(np.any(zero) for zero in zeros)
    for shapes in (((6, 2), (5, 2)), ((2, 6, 2), (3, 6, 2)), ((6,), (6,))):
        with refused(ValueError, "a1", "and `a2` must have shapes", "differ only in r"):
            analysis.subspace_similarity(*map(np.ones, shapes))


@pytest.mark.slow
def test_change_at_the_limits() -> None:
    """Of ΔW = 0 nothing is amplified, and nothing intrudes; of W = 0 all directions that it has."""
    x, w = site("plain"), np.asarray(array(12, 9))
    start, zero = x._replace(b=jnp.zeros_like(x.b)), np.zeros_like(w)
    with jax.debug_nans(True):
        assert analysis.amplification(w, start, 3) == 0
        assert analysis.amplification(w, zero, 4) == 0
    assert analysis.amplification(zero, x, 3) == jnp.inf
    single = x._replace(b=x.b.at[1:].set(0))  # rank 1
    expected = analysis.amplification(w, single, 1)
    np.testing.assert_allclose(analysis.amplification(w, single, 3), expected, rtol=1e-5)
    assert not analysis.intruder_dimensions(w, start, 4).any()
    found = analysis.intruder_dimensions(zero, x, 4)
    assert found.tolist() == [True, True, True, False]  # ΔW has rank 3
    assert not analysis.intruder_dimensions(zero, zero, 4).any()
    w, delta = np.diag([2.0, 1.0, 0.0]), np.diag([0.0, 0.0, 5.0])
    assert analysis.intruder_dimensions(w, delta, 3).tolist() == [True, False, False]


# The argument, the directions that it counts, and the most: the smaller side of W, or that of A
# and B.
MOST = {"intruder_dimensions": ("k", "W + ΔW", 9), "amplification": ("rank", "ΔW", 3)}
ONES = (jnp.ones((4, 6)), jnp.ones((6, 4)), jnp.ones(6))
OTHERS: dict[str, Any] = {
    "of shape (12, 9); got shape (4, 6)": (ONES[0], site("plain")),
    "(4, 6) and (6, 4)": ONES[:2],
    "(6,) and (6,)": (ONES[2], ONES[2]),
}


@pytest.mark.parametrize("name", MOST)
def test_refused(name: str) -> None:
    """More directions than there are; W must be that of the site, or of the shape of ΔW."""
    function, (argument, of, limit) = getattr(analysis, name), MOST[name]
    for count in (0, 10, -1):
        with refused(ValueError, argument, f"from 1 to {limit}", of, f"; got {count}"):
            function(array(12, 9), site("plain"), **{argument: count})
    for other, given in OTHERS.items():
        with refused(ValueError, "", other):
            function(*given, 1)


@pytest.mark.parametrize(
    "name", some(["norm", "delta_spectrum", "distance", "subspace_similarity"], "delta_spectrum")
)
def test_a_table_is_for_vmap(name: str) -> None:
    """Its ΔW would be one matrix, of the rows of all adapters."""
    function = getattr(analysis, name)
    table = many.stack([{"w": site("plain")}] * 2)["w"]
    given = [table] * (1 + (name in ("distance", "subspace_similarity")))
    alone = function(*[site("plain")] * len(given))
    np.testing.assert_allclose(jax.vmap(function)(*given), jnp.stack([alone] * 2), atol=1e-5)
    with refused(TypeError, "", "` must be of one adapter", "Call the function under jax.vmap."):
        function(*given)


@pytest.mark.parametrize("name", [*MOST, "subspace_similarity", "distance"])
def test_nodes_of_other_methods(name: str) -> None:
    """They are no arrays either."""
    x = site("plain")
    dora = Decomposed(x.a, x.b, jnp.ones(9), x.scale, x.layout)
    given = (array(12, 9), dora, 1) if name in MOST else (x, dora)
    argument = "delta" if name in MOST else {"distance": "other"}.get(name, "a2")
    with refused(TypeError, "", f"`{argument}` must be a jlora.types.LowRank", "got Decomposed"):
        getattr(analysis, name)(*given)


@pytest.mark.parametrize("name", ["norm", "delta_spectrum", "distance"])
def test_arrays_are_no_nodes(name: str) -> None:
    given = [array(12, 9)] * (1 + (name == "distance"))
    with refused(TypeError, "", "`node` must be a jlora.types.LowRank", "got"):
        getattr(analysis, name)(*given)


@pytest.mark.parametrize("dtype", some([jnp.bfloat16, jnp.float8_e4m3fn], jnp.float8_e4m3fn))
def test_narrow_weights_are_widened(dtype: Any) -> None:
    """Under strict promotion too, and 8 bits, which JAX never widens by itself."""
    w, node = array(12, 9).astype(dtype), site("plain")
    wide = w.astype(jnp.float32)
    for function in (analysis.amplification, analysis.intruder_dimensions):
        with jax.numpy_dtype_promotion("strict"):
            found = function(w, node, 2)
        np.testing.assert_array_equal(found, function(wide, node, 2))
