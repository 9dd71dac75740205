"""`jlora.arithmetic`: what each function means for ΔW, in float64, at sites of all kinds."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import nodes
import numpy as np
import pytest
from messages import all_refused, refused
from nodes import PLAIN, delta, draw, matrices
from own_methods import GainNode
from small import as_jax, assert_close, some

import jlora
from jlora import _linalg, arithmetic
from jlora.types import LowRank

# The shape of W, and the layouts that adapters of it may have.
LAYOUTS = {name: (shape, [layout]) for name, (shape, layout) in nodes.SITES.items()}
OTHER_SLOTS = [PLAIN._replace(slots=(2, (1,), 1)), PLAIN]
LAYOUTS["slots of two kinds"] = ((12, 18), [nodes.SITES["slots"][1], *OTHER_SLOTS])
RANKS, SCALES, WEIGHTS = (2, 3, 1), (2.0, 0.5, 2.0), (0.7, -1.0, 0.4)


@functools.cache
def adapters(site: str) -> tuple[Any, ...]:
    """Three adapters with ranks, scales and slots of their own; the last has one site more."""
    shape, layouts = LAYOUTS[site]
    nodes = [
        draw(i, shape, layouts[i % len(layouts)], rank, scale)
        for i, (rank, scale) in enumerate(zip(RANKS, SCALES, strict=True))
    ]
    other = draw(9, (5, 4), PLAIN, 2, 1.0)
    return {"w": nodes[0]}, {"w": nodes[1]}, {"w": nodes[2], "more": {"x": other}}


def regauged(node: LowRank, seed: int) -> LowRank:
    """Other factors of the same ΔW: A·G and G⁻¹·B."""
    r = node.a.shape[-1]
    g = np.random.default_rng(seed).standard_normal((r, r)) + 2 * np.eye(r)
    n = len(node.layout.stack) + (node.layout.slots is not None)
    b = np.moveaxis(np.tensordot(np.linalg.inv(g), np.asarray(node.b), ([1], [n])), 0, n)
    return node._replace(a=as_jax(node.a @ g, np.float32), b=as_jax(b, np.float32))


DAILY = ("experts", "slots of two kinds")


def sites(*daily: str, without: str = "") -> Any:
    """Every kind of site, those that are not `daily` in the long run."""
    return pytest.mark.parametrize("site", some([s for s in LAYOUTS if s != without], *daily))


@sites(*DAILY)
def test_sums(site: str) -> None:
    """With weights, without, and traced; where an adapter has no site, its part is 0."""
    trees, (shape, _) = adapters(site), LAYOUTS[site]
    deltas = [delta(t["w"], shape) for t in trees]
    more = delta(trees[2]["more"]["x"], (5, 4))

    @jax.jit
    def combined(trees: Any, weights: Any) -> list[Any]:
        one, _, three = trees
        return [
            arithmetic.add(trees, weights),
            arithmetic.add(trees, WEIGHTS),
            arithmetic.add(trees),
            arithmetic.difference(one, three),
            arithmetic.scale(three, 0.5),
        ]

    found = combined(trees, jnp.array(WEIGHTS))
    for tree, w in zip(found, (WEIGHTS, WEIGHTS, (1, 1, 1), (1, 0, -1), (0, 0, 0.5)), strict=True):
        expected = sum(v * x for v, x in zip(w, deltas, strict=True))
        np.testing.assert_allclose(delta(tree["w"], shape), expected, atol=3e-6)
        np.testing.assert_allclose(delta(tree["more"]["x"], (5, 4)), w[2] * more, atol=1e-6)


def test_factors_stay_to_the_bit() -> None:
    """In sums of one scale A and B stand beside one another; what need not change is the same."""
    one, two = (draw(i, (12, 9), PLAIN, 2, 0.3) for i in (0, 1))
    found = arithmetic.add([{"w": one}, {"w": two}])["w"]
    np.testing.assert_array_equal(found.a, np.concatenate([one.a, two.a], 1))
    np.testing.assert_array_equal(found.b, np.concatenate([one.b, two.b], 0))
    assert (found.scale, arithmetic.add([{}])) == (0.3, {})
    tree = {"w": one, "b": jnp.ones(3)}
    half = arithmetic.scale({"w": one}, 0.5)
    assert half["w"].a is one.a and jax.tree.structure(half) == jax.tree.structure({"w": one})
    small = arithmetic.truncate(tree, rank=2)
    assert arithmetic.add([tree])["w"].b is one.b
    assert small["w"].a is one.a and small["b"] is tree["b"]


@sites("experts")
@pytest.mark.parametrize("rank", some([1, 2, 3], 1))
def test_truncate_is_the_best_approximation(site: str, rank: int) -> None:
    """The dense SVD's, of each matrix of a stack and each slot."""
    shape, _ = LAYOUTS[site]
    full = arithmetic.add(adapters(site))["w"]
    small = arithmetic.truncate({"w": full}, rank=rank)["w"]
    assert small.a.shape[-1] == rank
    assert small.layout == full.layout
    of = matrices(delta(full, shape), full.layout)
    u, s, vt = np.linalg.svd(of, full_matrices=False)
    best = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
    got = matrices(delta(small, shape), full.layout)
    # Rounding turns the subspace that is kept the more the nearer the next singular value is.
    next_one = s[..., rank] if rank < s.shape[-1] else 0
    bound = 1e-6 * s[..., 0] * np.maximum(1, s[..., 0] / (s[..., rank - 1] - next_one))
    assert (np.abs(got - best).max((-2, -1)) < bound).all()
    # By energy: the smallest rank that keeps the share in every matrix.
    kept = (s**2).cumsum(-1) / (s**2).sum(-1, keepdims=True)
    least = 1 + int((kept < 0.9).sum(-1).max())
    assert arithmetic.truncate({"w": full}, energy=0.9)["w"].a.shape[-1] == least


@pytest.mark.parametrize("name", some(["truncate", "ties"], "truncate"))
def test_a_program_factors_one_matrix_at_a_time(name: str) -> None:
    """On CPUs JAX 0.10 waits for ever where stacks are factored at once, as of several sites."""
    trees = adapters("stacked")[:2]
    compiled = jax.jit(lambda *trees: FUNCTIONS[name](trees)).lower(*trees).compile()
    calls = re.findall(r"= \(?f32\[([\d,]+)\].*custom_call_target=\"lapack", compiled.as_text())
    assert calls
    assert all(dims.count(",") == 1 for dims in calls), calls


# ------------------------------------------------------------------------- laws of all functions

KEY = jax.random.key(3)
FUNCTIONS: dict[str, Any] = {
    "add": lambda t: arithmetic.add(t, WEIGHTS[:2]),
    "scale": lambda t: arithmetic.scale(t[0], -0.7),
    "difference": lambda t: arithmetic.difference(*t),
    "truncate": lambda t: arithmetic.truncate(arithmetic.add(t), rank=2),
    "ties": lambda t: arithmetic.ties(t, WEIGHTS[:2], density=0.4),
    "dare": lambda t: arithmetic.dare(t, WEIGHTS[:2], key=KEY, density=0.6),
}
COMPILED = {name: jax.jit(f) for name, f in FUNCTIONS.items()}
every_function = pytest.mark.parametrize("name", some(FUNCTIONS, "ties"))


def close(found: Any, expected: np.ndarray, shape: tuple[int, ...]) -> None:
    np.testing.assert_allclose(delta(found, shape), expected, atol=2e-4 * np.abs(expected).max())


@sites("slots")
@every_function
def test_the_factors_do_not_matter(name: str, site: str) -> None:
    """Other factors of the same ΔW give the same ΔW, where PEFT's `ties` changes by its size."""
    f, (shape, _), trees = COMPILED[name], LAYOUTS[site], adapters(site)[:2]
    others = [{"w": regauged(t["w"], i)} for i, t in enumerate(trees)]
    expected = delta(f(trees)["w"], shape)
    close(f(others)["w"], expected, shape)
    ranks = [arithmetic.truncate(t, energy=0.8)["w"].a.shape for t in (trees[0], others[0])]
    assert ranks[0] == ranks[1]
    negative = [arithmetic.scale(t, -1) for t in trees]
    close(f(negative)["w"], -expected, shape)


@sites("heads")
@every_function
def test_under_vmap(name: str, site: str) -> None:
    """Of many pairs at once what it is of each."""
    f, (shape, layouts) = FUNCTIONS[name], LAYOUTS[site]
    pairs = [
        [{"w": draw(10 * i + j, shape, layouts[j % len(layouts)], 2, 0.5)} for j in range(2)]
        for i in range(3)
    ]
    many = jax.jit(jax.vmap(f))(jax.tree.map(lambda *x: np.stack(x), *pairs))
    for i, pair in enumerate(pairs):
        expected = delta(COMPILED[name](pair)["w"], shape)
        close(jax.tree.map(lambda y, i=i: y[i], many)["w"], expected, shape)


@pytest.mark.parametrize("name", some(["ties", "dare"], "ties"))
def test_where_an_adapter_has_no_site_it_has_no_part(name: str) -> None:
    """There the result of a merge is that of the others."""
    options = {"ties": {"density": 0.4}, "dare": {"key": KEY, "density": 1.0}}[name]
    f = jax.jit(lambda trees: getattr(arithmetic, name)(trees, **options))
    more = {"more": adapters("plain")[2]["more"]}
    found, alone = (f(trees)["more"]["x"] for trees in ([more, {"w": NODE}], [more]))
    close(found, delta(alone, (5, 4)), (5, 4))


def dense_ties(deltas: list[np.ndarray], density: float) -> np.ndarray:
    """TIES on the coordinates of matrices, written densely."""
    rank = min(sum(np.linalg.matrix_rank(x) for x in deltas), *deltas[0].shape)
    u = np.linalg.svd(np.concatenate(deltas, 1))[0][:, :rank]
    v = np.linalg.svd(np.concatenate(deltas, 0))[2][:rank].T
    kept = []
    for x in deltas:
        m = u.T @ x @ v
        least = np.sort(np.abs(m).ravel())[-max(1, round(density * m.size))]
        kept.append(np.where(np.abs(m) >= least, m, 0))
    sign = np.sign(sum(kept))
    agrees = np.stack([m * sign > 0 for m in kept])
    return u @ ((np.stack(kept) * agrees).sum(0) / np.maximum(agrees.sum(0), 1)) @ v.T


@sites("slots", without="slots of two kinds")
def test_ties_is_that_on_dense_coordinates(site: str) -> None:
    shape, [layout] = LAYOUTS[site]
    trees = [{"w": t["w"]} for t in adapters(site)]
    found = jax.jit(lambda t: arithmetic.ties(t, WEIGHTS, density=0.4))(trees)["w"]
    each = [w * matrices(delta(t["w"], shape), layout) for w, t in zip(WEIGHTS, trees, strict=True)]
    each = [x.reshape(-1, *x.shape[-2:]) for x in each]
    expected = np.stack([dense_ties(list(x), 0.4) for x in np.stack(each, 1)])
    got = matrices(delta(found, shape), layout).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert found.a.shape[-1] <= sum(RANKS)


@sites("slots of two kinds")
def test_dare_drops_by_its_seed(site: str) -> None:
    (shape, _), trees = LAYOUTS[site], adapters(site)[:2]
    dare = jax.jit(
        lambda t, density: arithmetic.dare(t, key=KEY, density=density), static_argnums=1
    )
    summed = delta(arithmetic.add(trees)["w"], shape)
    everything = delta(dare(trees, 1.0)["w"], shape)
    np.testing.assert_allclose(everything, summed, atol=1e-4 * np.abs(summed).max())
    one, same = (dare(trees, 0.5)["w"].b for _ in range(2))
    np.testing.assert_array_equal(one, same)


def test_dare_on_average() -> None:
    shape, _ = LAYOUTS["plain"]
    trees = adapters("plain")[:2]
    draw_one = jax.jit(jax.vmap(lambda key: arithmetic.dare(trees, key=key, density=0.5)["w"]))
    many = draw_one(jax.random.split(jax.random.key(0), 4000))
    mean = np.einsum("nir,nro->io", many.a, many.b) / 4000
    summed = delta(arithmetic.add(trees)["w"], shape)
    assert np.abs(mean - summed).max() < 0.05 * np.abs(summed).max()
    dropped = np.einsum("ir,ro->io", many.a[0], many.b[0])
    assert np.abs(dropped - summed).max() > 0.1 * np.abs(summed).max()


@every_function
def test_dtypes_stay(name: str) -> None:
    for dtype in (jnp.bfloat16, jnp.float16):
        trees = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), adapters("plain")[:2])
        found = jax.eval_shape(FUNCTIONS[name], trees)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


def test_dtypes_may_differ() -> None:
    """The wider one holds the result, under strict promotion too; products are rounded once."""
    one = adapters("plain")[0]["w"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), one)
    head = {"head": jnp.ones(3, jnp.bfloat16)}
    narrow, wide = {"w": half} | head, {"w": one, "head": jnp.ones(3)}
    options = {"base": {"w": jnp.zeros((12, 9)), "head": jnp.zeros(3)}, "weights": WEIGHTS[:2]}
    with jax.numpy_dtype_promotion("strict"):
        for f in (arithmetic.add, arithmetic.ties, functools.partial(arithmetic.dare, key=KEY)):
            for trees in ([narrow, wide], [wide, narrow]):
                found = jax.eval_shape(functools.partial(f, **options), trees)
                assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
        weights = jnp.array([0.3, 1.0])
        summed = arithmetic.add([narrow, wide], weights, base=options["base"])["w"]
        b = arithmetic.scale({"w": half}, 0.3)["w"].b
    np.testing.assert_array_equal(summed.b[:2], np.float32(half.b) * np.float32(0.3))
    np.testing.assert_array_equal(b, (np.float32(half.b) * np.float32(0.3)).astype(b.dtype))


def test_float8_in_full() -> None:
    one = {"w": jnp.ones(3, jnp.float8_e4m3fn)}
    assert arithmetic.add([one, one], base=one)["w"].dtype == jnp.float8_e4m3fn


def test_rank_0_stays() -> None:
    """Also where columns are factored in blocks of rows."""
    nothing = {"w": draw(0, (64, 9), PLAIN, 0, 1.0)}
    for found in (
        arithmetic.truncate(nothing, energy=0.5),
        arithmetic.ties([nothing, {}]),
        arithmetic.dare([nothing], key=KEY),
    ):
        assert (found["w"].a.shape, found["w"].b.shape) == ((64, 0), (0, 9))


# --------------------------------------------------------------------------- leaves in full


def test_leaves_in_full_are_changes_of_the_base() -> None:
    base = {"head": jnp.array([1.0, 2.0, 3.0, 4.0])}
    one, two = {"head": jnp.array([2.0, 2.0, 3.0, 0.0])}, {"head": jnp.array([3.0, 0.0, 3.0, 5.0])}

    @jax.jit
    def combined(one: Any, two: Any) -> Any:
        return [
            arithmetic.add([one, two], [1.0, 0.5], base=base),
            arithmetic.difference(one, two, base=base),
            # Of changes (1, 0, 0, -4) and (2, -2, 0, 1) two each are kept: no sign for no entry.
            arithmetic.ties([one, two], density=0.5, base=base),
            arithmetic.dare([one], key=KEY, density=1.0, base=base),
        ]

    expected = [[3.0, 1.0, 3.0, 0.5], [0.0, 4.0, 3.0, -1.0], [2.5, 0.0, 3.0, 0.0], one["head"]]
    np.testing.assert_allclose([x["head"] for x in combined(one, two)], expected)


@pytest.mark.parametrize("density", some([0.01, 0.3, 0.5, 1.0], 0.3))
def test_ties_keeps_the_largest_entries(density: float) -> None:
    """As many as sorting finds, equal ones together; of float32 to the last bit."""
    x = np.float32(np.random.default_rng(0).standard_normal((7, 11)) * 10.0 ** np.arange(-5, 6))
    x[3] = x[0] = 0.25
    least = np.sort(np.abs(x).ravel())[-max(1, round(density * x.size))]
    ties = jax.jit(lambda t: arithmetic.ties([t], density=density, base={"w": 0 * x}))
    np.testing.assert_array_equal(ties({"w": x})["w"], np.where(np.abs(x) >= least, x, 0))


def test_ties_compiles_once_for_a_shape(caplog: pytest.LogCaptureFixture) -> None:
    """Though there are hundreds of sites of one shape."""
    arithmetic.ties([{"v": NODE}])
    with jax.log_compiles():
        arithmetic.ties([{f"w{i}": NODE for i in range(2)}])
    assert not [x.getMessage() for x in caplog.records if "Compiling" in x.getMessage()]


def test_one_leaf_in_full() -> None:
    """That of one adapter alone needs no base in a sum; merges trim and drop it all the same."""
    head = jnp.ones(64)
    found = arithmetic.add([{"w": NODE, "head": head}, {"w": NODE}])
    assert found["head"] is head
    base, one = {"head": jnp.zeros(64)}, {"head": head}
    dropped = arithmetic.dare([one], key=KEY, density=0.5, base=base)["head"]
    assert set(dropped.tolist()) == {0.0, 2.0}
    for merge in (arithmetic.ties, lambda t: arithmetic.dare(t, key=KEY)):
        with refused(ValueError, "", "is trained in full, so its change depends on the"):
            merge([one])


# ------------------------------------------------------------------------------------ refused


NODE = draw(0, (12, 9), PLAIN, 2, 1.0)
GAIN = GainNode(jnp.ones(9), PLAIN)
FULL = {"b": jnp.ones(3)}
KEYED = {"w": NODE._replace(dropout=0.5, key=KEY)}
REFUSED: dict[type[Exception], dict[str, Any]] = {
    ValueError: {
        "`weights` ... got 2.": lambda: arithmetic.add([{"w": NODE}], [1, 2]),
        "`weights` ... got nan.": lambda: arithmetic.add([{"w": NODE}], jnp.array([jnp.nan])),
        "`weights` ... got float32[2].": lambda: arithmetic.add([{"w": NODE}], jnp.ones((1, 2))),
        "`adapters` ... w ... ((12, 8), (), (0,), (1,)) ... belong to one base.": lambda: (
            arithmetic.add([{"w": NODE}, {"w": draw(0, (12, 8), PLAIN, 2, 1.0)}])
        ),
        "`adapters` ... b ... is trained in full ... Give": lambda: arithmetic.add([FULL] * 2),
        "`other` ... b ... is trained in full ... Give `base`": lambda: arithmetic.difference(
            {"w": NODE}, FULL
        ),
        "`adapters` ... deep/w ... is a GainNode ... Merge these": lambda: arithmetic.dare(
            [{"deep": {"w": GAIN}, "w": NODE}, {"v": GAIN}], key=KEY
        ),
        "`adapter` ... deep/w ... is a GainNode ... Merge these": lambda: arithmetic.truncate(
            {"v": GAIN, "w": NODE, "deep": {"w": GAIN}}, 1
        ),
        "`factor` ... got inf.": lambda: arithmetic.scale({"w": NODE}, float("inf")),
        "`factor` ... got float32[9].": lambda: jax.jit(arithmetic.scale)({"w": NODE}, jnp.ones(9)),
        "`adapters` ... b ... has the shapes [(3,), (2,)]": lambda: arithmetic.add(
            [{"w": NODE, **FULL}, {"w": jnp.ones((12, 9)), "b": jnp.ones(2)}]
        ),
        **{
            f"`adapters` ... must be single adapters{end}": lambda f=f: f(
                [jlora.many.stack([{"w": NODE}])]
            )
            for end, f in {"": arithmetic.add, " ... w ... leading axis": jlora.many.stack}.items()
        },
        "got `rank` 1, `energy` 0.5.": lambda: arithmetic.truncate({"w": NODE}, rank=1, energy=0.5),
        "`rank` ... got 0.": lambda: arithmetic.truncate({"w": NODE}, rank=0),
        "`energy` ... got 0.0.": lambda: arithmetic.truncate({"w": NODE}, energy=0.0),
        "`energy` ... needs concrete values ... Give `rank`.": lambda: jax.jit(
            lambda t: arithmetic.truncate(t, energy=0.5)
        )({"w": NODE}),
        "`energy` ... got '1'.": lambda: arithmetic.truncate({"w": NODE}, energy="1"),  # pyright: ignore
        "`density` ... got 2.": lambda: arithmetic.ties([{"w": NODE}], density=2),
        "`density` ... got '1'.": lambda: arithmetic.ties([{"w": NODE}], density="1"),  # pyright: ignore
        "`factor` ... got '1'.": lambda: arithmetic.scale({"w": NODE}, "1"),  # pyright: ignore
        "`size` ... got 2.5.": lambda: jlora.many.stack([{"w": NODE}], size=2.5),  # pyright: ignore
    },
    TypeError: {
        "`adapters` ... got dict.": lambda: arithmetic.add({"w": NODE}),
        "`adapters` ... got an empty one.": lambda: arithmetic.add([]),
    },
}


test_refused = all_refused(REFUSED)


@pytest.mark.parametrize("make", [np.array, jnp.array, np.float32])
def test_numbers_may_be_arrays_without_axes(make: Any) -> None:
    """Such as a share that was computed; of one adapter with itself."""
    half, one = make(0.5), {"w": NODE}
    ranks = [arithmetic.truncate(one, energy=x)["w"].a.shape[-1] for x in (half, 0.5)]
    assert ranks[0] == ranks[1]
    for f in (arithmetic.ties, lambda t, density: arithmetic.dare(t, key=KEY, density=density)):
        assert_close(f([one], density=half), f([one], density=0.5))
    size, rank = (make(n).astype(int) for n in (3, 4))
    assert jlora.many.stack([one], size=size, rank=rank)["w"].a.shape == (3, 12, 4)


def test_keys_are_refused() -> None:
    """By whatever takes adapters; and what is trained in full without a base, by merges too."""
    for provoke in (
        lambda: arithmetic.add([{}, KEYED]),
        lambda: arithmetic.scale(KEYED, 2),
        lambda: arithmetic.truncate(KEYED, 1),
        lambda: jlora.many.stack([KEYED]),
        lambda: jlora.many.insert(jlora.many.stack([{"w": NODE}]), 0, KEYED),
    ):
        with refused(ValueError, "adapters", "w", "has a key", "give the result to jlora.dropout."):
            provoke()
    with refused(ValueError, "adapters", "b", "is trained in full"):
        arithmetic.ties([FULL, {"w": NODE}])


# ------------------------------------------------------------------------- what meshes need of it


def test_qr_by_blocks_of_rows() -> None:
    """Q is orthonormal, R triangular, and Q·R what it was, columns that depend on others too."""
    x = np.random.default_rng(0).standard_normal((2, 96, 5))
    x[..., -1] = x[..., 0]
    x = jnp.asarray(x, jnp.float32)
    q, r = map(np.asarray, jax.jit(_linalg.qr)(x))
    np.testing.assert_allclose(q @ r, x, atol=1e-5)
    np.testing.assert_allclose(
        q.mT @ q, np.broadcast_to(np.eye(q.shape[-1]), r.shape[:-1] + q.shape[-1:]), atol=1e-5
    )
    np.testing.assert_array_equal(r, np.triu(r))
