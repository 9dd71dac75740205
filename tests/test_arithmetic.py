"""`jlora.arithmetic`: what each function means for ΔW, in float64, at sites of all kinds."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_methods import GainNode
from small import each_refusal, exactly, some

import jlora
from jlora import _linalg, arithmetic
from jlora.types import Layout, LowRank

# The shape of W, and the layouts that adapters of it may have.
PLAIN = Layout((), (0,), (1,))
SITES = {
    "plain": ((12, 9), [PLAIN]),
    "turned": ((12, 9), [Layout((), (1,), (0,))]),
    "stacked": ((3, 12, 9), [Layout((0,), (1,), (2,))]),
    "stacked in between": ((12, 3, 9), [Layout((1,), (0,), (2,))]),
    "heads": ((12, 3, 5), [Layout((), (0,), (1, 2))]),
    "conv": ((3, 4, 9), [Layout((), (0, 1), (2,))]),
    "experts": ((2, 3, 12, 9), [Layout((0, 1), (2,), (3,))]),
    "slots": ((12, 18), [PLAIN._replace(slots=(3, (0, 2), 1))]),
    "slots of two kinds": (
        (12, 18),
        [PLAIN._replace(slots=(3, (0, 2), 1)), PLAIN._replace(slots=(2, (1,), 1)), PLAIN],
    ),
}
RANKS, SCALES, WEIGHTS = (2, 3, 1), (2.0, 0.5, 2.0), (0.7, -1.0, 0.4)


def draw(seed: int, shape: tuple[int, ...], layout: Layout, rank: int, scale: float) -> LowRank:
    rng = np.random.default_rng(seed)
    a, b = jlora._adapters.factor_shapes(layout, shape, rank)
    a, b = (jnp.asarray(np.float32(rng.standard_normal(x)), jnp.float32) for x in (a, b))
    return LowRank(a, b, scale, layout)


@functools.cache
def adapters(site: str) -> tuple[Any, ...]:
    """Three adapters with ranks, scales and slots of their own; the last has one site more."""
    shape, layouts = SITES[site]
    nodes = [
        draw(i, shape, layouts[i % len(layouts)], rank, scale)
        for i, (rank, scale) in enumerate(zip(RANKS, SCALES, strict=True))
    ]
    other = draw(9, (5, 4), PLAIN, 2, 1.0)
    return {"w": nodes[0]}, {"w": nodes[1]}, {"w": nodes[2], "more": {"x": other}}


merge = jax.jit(jlora.merge)


def delta(node: LowRank, shape: tuple[int, ...]) -> np.ndarray:
    """ΔW in float64, by `merge`, with (stack…, slots…, inputs, outputs) left as W has them."""
    with jax.enable_x64(True):
        wide = node._replace(a=np.asarray(node.a, np.float64), b=np.asarray(node.b, np.float64))
        return np.asarray(merge({"w": np.zeros(shape)}, {"w": wide})["w"])


def matrices(x: np.ndarray, layout: Layout) -> np.ndarray:
    """(matrices, inputs, outputs) of a ΔW; those of slots apart."""
    stack, inputs, outputs, slots = layout
    x = np.transpose(x, (*stack, *inputs, *outputs))
    n, m = len(stack), len(stack) + len(inputs)
    x = x.reshape(int(np.prod(x.shape[:n])), int(np.prod(x.shape[n:m])), -1)
    if slots is None:
        return x
    parts = np.split(x, slots[0], -1)
    return np.concatenate([parts[i] for i in slots[1]])


def regauged(node: LowRank, seed: int = 0) -> LowRank:
    """Other factors of the same ΔW: A·G and G⁻¹·B."""
    r = node.a.shape[-1]
    g = np.random.default_rng(seed).standard_normal((r, r)) + 2 * np.eye(r)
    n = len(node.layout.stack) + (node.layout.slots is not None)
    b = np.moveaxis(np.tensordot(np.linalg.inv(g), np.asarray(node.b), ([1], [n])), 0, n)
    return node._replace(a=jnp.asarray(node.a @ g, jnp.float32), b=jnp.asarray(b, jnp.float32))


slow = lambda *x: pytest.param(*x, marks=pytest.mark.slow)  # noqa: E731
DAILY = ("experts", "slots of two kinds")
every_site = pytest.mark.parametrize("site", [s if s in DAILY else slow(s) for s in SITES])


@every_site
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_add_is_the_sum(site: str, weights: tuple[float, ...] | None) -> None:
    trees, (shape, _) = adapters(site), SITES[site]
    found = arithmetic.add(trees, weights)
    w = weights or (1.0,) * 3
    expected = sum(v * delta(t["w"], shape) for v, t in zip(w, trees, strict=True))
    np.testing.assert_allclose(delta(found["w"], shape), expected, atol=3e-6)
    expected = w[2] * delta(trees[2]["more"]["x"], (5, 4))
    np.testing.assert_allclose(delta(found["more"]["x"], (5, 4)), expected, atol=1e-6)


def test_add_keeps_the_factors_to_the_bit() -> None:
    """Of one scale, without weights: A and B stand beside one another."""
    one, two = (draw(i, (12, 9), PLAIN, 2, 0.3) for i in (0, 1))
    found = arithmetic.add([{"w": one}, {"w": two}])["w"]
    np.testing.assert_array_equal(found.a, np.concatenate([one.a, two.a], 1))
    np.testing.assert_array_equal(found.b, np.concatenate([one.b, two.b], 0))
    assert (found.scale, arithmetic.add([{}])) == (0.3, {})


def test_scale_and_difference() -> None:
    one, two, _ = adapters("stacked")
    shape, _ = SITES["stacked"]
    half = arithmetic.scale(one, 0.5)
    assert jax.tree.structure(half) == jax.tree.structure(one)
    np.testing.assert_array_equal(half["w"].a, one["w"].a)
    np.testing.assert_allclose(delta(half["w"], shape), delta(one["w"], shape) / 2, rtol=1e-6)
    found = delta(arithmetic.difference(one, two)["w"], shape)
    np.testing.assert_allclose(found, delta(one["w"], shape) - delta(two["w"], shape), atol=3e-6)


@pytest.mark.parametrize(
    ("rank", "site"),
    [(rank, s) if s in DAILY and rank == 1 else slow(rank, s) for rank in (1, 2, 3) for s in SITES],
)
def test_truncate_is_the_best_approximation(site: str, rank: int) -> None:
    """The dense SVD's, of each matrix of a stack and each slot."""
    shape, _ = SITES[site]
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


@pytest.mark.parametrize("name", ["truncate", "ties"])
def test_a_program_factors_one_matrix_at_a_time(name: str) -> None:
    """On CPUs JAX 0.10 waits for ever where stacks are factored at once, as of several sites."""
    trees = adapters("stacked")[:2]
    compiled = jax.jit(lambda *trees: FUNCTIONS[name](trees)).lower(*trees).compile()
    calls = re.findall(r"= \(?f32\[([\d,]+)\].*custom_call_target=\"lapack", compiled.as_text())
    assert calls
    assert all(dims.count(",") == 1 for dims in calls), calls


@pytest.mark.slow
def test_truncate_by_energy() -> None:
    """The smallest rank that keeps the share in every matrix of the stack."""
    values = np.array([[4.0, 2.0, 1.0], [4.0, 0.0, 0.0]])
    a = np.stack([np.eye(5, 3), np.eye(5, 3)])
    b = values[..., None] * np.stack([np.eye(3, 4)] * 2)
    node = LowRank(jnp.asarray(a), jnp.asarray(b, jnp.float32), 1.0, Layout((0,), (1,), (2,)))
    for energy, rank in ((16 / 21, 1), (0.77, 2), (20 / 21, 2), (0.96, 3), (1.0, 3)):
        found = arithmetic.truncate({"w": node}, energy=energy)["w"]
        assert found.a.shape[-1] == rank, energy


def test_truncate_leaves_alone_what_is_small_enough() -> None:
    tree = {"w": draw(0, (12, 9), PLAIN, 2, 3.0), "b": jnp.ones(3)}
    found = arithmetic.truncate(tree, rank=2)
    assert found["w"].a is tree["w"].a
    assert found["b"] is tree["b"]


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
few_sites = pytest.mark.parametrize("site", ["heads", slow("experts"), slow("slots of two kinds")])


def close(found: Any, expected: np.ndarray, shape: tuple[int, ...]) -> None:
    np.testing.assert_allclose(delta(found, shape), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("site", [s if s == DAILY[-1] else slow(s) for s in SITES])
def test_the_factors_do_not_matter(site: str) -> None:
    """Other factors of the same ΔW give the same ΔW, where PEFT's `ties` changes by its size."""
    shape, _ = SITES[site]
    trees = adapters(site)[:2]
    others = [{"w": regauged(t["w"], i)} for i, t in enumerate(trees)]
    for f in COMPILED.values():
        close(f(others)["w"], delta(f(trees)["w"], shape), shape)
    ranks = [arithmetic.truncate(t, energy=0.8)["w"].a.shape for t in (trees[0], others[0])]
    assert ranks[0] == ranks[1]


@few_sites
@every_function
def test_of_the_negative_it_is_the_negative(name: str, site: str) -> None:
    f, (shape, _), trees = COMPILED[name], SITES[site], adapters(site)[:2]
    negative = [arithmetic.scale(t, -1) for t in trees]
    close(f(negative)["w"], -delta(f(trees)["w"], shape), shape)
    for x, y in zip(trees, (arithmetic.scale(t, -1) for t in negative), strict=True):
        np.testing.assert_array_equal(x["w"].b, y["w"].b)


@few_sites
@every_function
def test_under_jit_and_vmap(name: str, site: str) -> None:
    """Of many pairs at once what it is of each."""
    f, (shape, layouts) = FUNCTIONS[name], SITES[site]
    pairs = [
        [{"w": draw(10 * i + j, shape, layouts[j % len(layouts)], 2, 0.5)} for j in range(2)]
        for i in range(3)
    ]
    expected = [delta(COMPILED[name](pair)["w"], shape) for pair in pairs]
    close(f(pairs[0])["w"], expected[0], shape)
    many = jax.jit(jax.vmap(f))(jax.tree.map(lambda *x: jnp.stack(x), *pairs))
    for i, x in enumerate(expected):
        close(jax.tree.map(lambda y, i=i: y[i], many)["w"], x, shape)


def test_where_an_adapter_has_no_site_it_has_no_part() -> None:
    """There the result is that of the others."""
    one, two, three = adapters("plain")
    alone = {"more": three["more"]}
    for f in (
        lambda t: arithmetic.ties(t, density=0.4),
        lambda t: arithmetic.dare(t, key=KEY, density=1.0),
        arithmetic.add,
    ):
        found = jax.jit(f)([three, one, two])
        close(found["more"]["x"], delta(jax.jit(f)([alone])["more"]["x"], (5, 4)), (5, 4))
        assert found.keys() == {"w", "more"}
    found = arithmetic.difference(one, three)["more"]["x"]
    close(found, -delta(three["more"]["x"], (5, 4)), (5, 4))


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


@pytest.mark.parametrize(
    "site",
    [s if s in ("experts", "slots") else slow(s) for s in SITES if s != "slots of two kinds"],
)
def test_ties_is_that_on_dense_coordinates(site: str) -> None:
    shape, [layout] = SITES[site]
    trees = [{"w": t["w"]} for t in adapters(site)]
    found = jax.jit(lambda t: arithmetic.ties(t, WEIGHTS, density=0.4))(trees)["w"]
    each = [w * matrices(delta(t["w"], shape), layout) for w, t in zip(WEIGHTS, trees, strict=True)]
    expected = np.stack([dense_ties(list(x), 0.4) for x in np.stack(each, 1)])
    got = matrices(delta(found, shape), layout)
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert found.a.shape[-1] <= sum(RANKS)


@every_site
def test_dare_drops_by_its_seed_and_is_the_sum_on_average(site: str) -> None:
    shape, _ = SITES[site]
    trees, key = adapters(site)[:2], KEY
    everything = jax.jit(lambda t: arithmetic.dare(t, key=key, density=1.0))(trees)["w"]
    summed = delta(arithmetic.add(trees)["w"], shape)
    np.testing.assert_allclose(delta(everything, shape), summed, atol=1e-4 * np.abs(summed).max())
    drop = jax.jit(lambda t: arithmetic.dare(t, key=key))
    one, same = (drop(trees)["w"] for _ in range(2))
    np.testing.assert_array_equal(one.b, same.b)


def test_dare_on_average() -> None:
    shape, _ = SITES["plain"]
    trees = adapters("plain")[:2]
    draw_one = jax.jit(jax.vmap(lambda key: arithmetic.dare(trees, key=key, density=0.5)["w"]))
    many = draw_one(jax.random.split(jax.random.key(0), 4000))
    mean = np.einsum("nir,nro->io", many.a, many.b) / 4000
    summed = delta(arithmetic.add(trees)["w"], shape)
    assert np.abs(mean - summed).max() < 0.05 * np.abs(summed).max()
    dropped = np.einsum("ir,ro->io", many.a[0], many.b[0])
    assert np.abs(dropped - summed).max() > 0.1 * np.abs(summed).max()


def test_weights_that_are_traced() -> None:
    trees = adapters("stacked")[:2]
    shape, _ = SITES["stacked"]
    for f in (arithmetic.add, arithmetic.ties):
        expected = delta(jax.jit(lambda t, f=f: f(t, [0.3, 0.6]))(trees)["w"], shape)
        found = jax.jit(f)(trees, jnp.array([0.3, 0.6]))["w"]
        np.testing.assert_allclose(delta(found, shape), expected, atol=1e-5)
    many = jax.vmap(lambda c: arithmetic.scale(trees[0], c))(jnp.arange(3.0))["w"]
    assert many.b.shape == (3, *trees[0]["w"].b.shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16), slow(jnp.float32)])
def test_dtypes_stay(dtype: Any) -> None:
    trees = jax.tree.map(lambda x: x.astype(dtype), adapters("plain")[:2])
    key = jax.random.key(0)
    for f in (
        lambda t: arithmetic.add(t, WEIGHTS[:2]),
        lambda t: arithmetic.truncate(t[0], rank=1),
        arithmetic.ties,
        lambda t: arithmetic.dare(t, key=key),
    ):
        found = jax.jit(f)(trees)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


# --------------------------------------------------------------------------- leaves in full


def test_leaves_in_full_are_changes_of_the_base() -> None:
    base = {"head": jnp.array([1.0, 2.0, 3.0, 4.0])}
    one, two = {"head": jnp.array([2.0, 2.0, 3.0, 0.0])}, {"head": jnp.array([3.0, 0.0, 3.0, 5.0])}
    found = arithmetic.add([one, two], [1.0, 0.5], base=base)
    np.testing.assert_allclose(found["head"], [3.0, 1.0, 3.0, 0.5])
    found = arithmetic.difference(one, two, base=base)
    np.testing.assert_allclose(found["head"], [0.0, 4.0, 3.0, -1.0])
    found = arithmetic.ties([one, two], density=0.5, base=base)
    # Changes (1, 0, 0, -4) and (2, -2, 0, 1), of which two each are kept: no sign for no entry.
    np.testing.assert_allclose(found["head"], [2.5, 0.0, 3.0, 0.0])
    found = arithmetic.dare([one], key=jax.random.key(0), density=1.0, base=base)
    np.testing.assert_allclose(found["head"], one["head"])


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
def test_ties_keeps_the_largest_entries(density: float) -> None:
    """As many as sorting finds, equal ones together; of float32 to the last bit."""
    x = np.float32(np.random.default_rng(0).standard_normal((7, 11)) * 10.0 ** np.arange(-5, 6))
    x[3] = x[0] = 0.25
    base, one = {"w": jnp.zeros((7, 11))}, {"w": jnp.asarray(x)}
    least = np.sort(np.abs(x).ravel())[-max(1, round(density * x.size))]
    found = arithmetic.ties([one], density=density, base=base)["w"]
    np.testing.assert_array_equal(found, np.where(np.abs(x) >= least, x, 0))


def test_one_leaf_in_full_needs_no_base() -> None:
    """That of the one adapter that trained it."""
    head = jnp.ones(3)
    low = {"w": draw(0, (12, 9), PLAIN, 2, 1.0)}
    found = arithmetic.add([{**low, "head": head}, low])
    assert found["head"] is head


def test_one_leaf_in_full_is_trimmed_and_dropped_all_the_same() -> None:
    """That one adapter alone has it is no exception from a density."""
    base, one = {"head": jnp.zeros(4)}, {"head": jnp.array([1.0, 2.0, 3.0, 4.0])}
    found = arithmetic.ties([one], density=0.5, base=base)
    np.testing.assert_allclose(found["head"], [0.0, 0.0, 3.0, 4.0])
    base, one, key = {"head": jnp.zeros(64)}, {"head": jnp.ones(64)}, jax.random.key(0)
    found = arithmetic.dare([one], key=key, density=0.5, base=base)["head"]
    assert set(found.tolist()) == {0.0, 2.0}
    for merge in (arithmetic.ties, lambda t: arithmetic.dare(t, key=key)):
        with pytest.raises(ValueError, match="is trained in full, so that its change is known"):
            merge([one])


# ------------------------------------------------------------------------------------ refused


NODE = draw(0, (12, 9), PLAIN, 2, 1.0)
GAIN = GainNode(jnp.ones(9), PLAIN)
OTHERS = " at these paths:\n  deep/w: is a GainNode\n  v: is a GainNode\nMerge these with the base."
FULL = (
    " at these paths:\n  b: is trained in full, so that its change is known from the base alone\n"
    "Give `base`, the parameters that they are for."
)
KEYED = {"w": NODE._replace(dropout=0.5, key=KEY)}
KEYS = (
    "adapters must have no dropout keys, and there are some at these paths:\n  w: has a "
    "key\nGive jlora.dropout what comes out."
)
REFUSED: dict[type[Exception], dict[str, Any]] = {
    ValueError: {
        "`weights` must be finite; got nan.": lambda: arithmetic.add(
            [{"w": NODE}], jnp.array([jnp.nan])
        ),
        "`weights` must be one for each of the 1 adapters; got 2.": lambda: arithmetic.add(
            [{"w": NODE}], [1, 2]
        ),
        "`adapters` cannot be combined at these paths:\n  w: is for weights of (shape, stack, "
        "inputs, outputs) [((12, 9), (), (0,), (1,)), ((12, 8), (), (0,), (1,))]\n"
        "Adapters that are combined must be of one base.": lambda: arithmetic.add(
            [{"w": NODE}, {"w": draw(0, (12, 8), PLAIN, 2, 1.0)}]
        ),
        "`adapters` cannot be combined at these paths:\n  w: is of low rank in one and trained in "
        "full in another\nAdapters that are combined must be of one base.": lambda: arithmetic.add(
            [{"w": NODE}, {"w": jnp.ones((12, 9))}]
        ),
        "`adapters` cannot be combined" + FULL: lambda: arithmetic.add(
            [{"b": jnp.ones(3)}, {"b": jnp.ones(3)}]
        ),
        "`adapter` cannot be scaled" + FULL: lambda: arithmetic.scale(
            {"b": jnp.ones(3), "w": NODE}, 0.5
        ),
        "`other` cannot be subtracted from `adapter`" + FULL: lambda: arithmetic.difference(
            {"w": NODE}, {"b": jnp.ones(3)}
        ),
        "`adapters` cannot be combined" + OTHERS: lambda: arithmetic.dare(
            [{"deep": {"w": GAIN}, "w": NODE}, {"v": GAIN}], key=KEY
        ),
        "`adapter` cannot be truncated" + OTHERS: lambda: arithmetic.truncate(
            {"v": GAIN, "w": NODE, "deep": {"w": GAIN}}, 1
        ),
        "`adapter` cannot be scaled" + OTHERS: lambda: arithmetic.scale(
            {"v": GAIN, "deep": {"w": GAIN}}, 1
        ),
        "`factor` must be finite; got inf.": lambda: arithmetic.scale({"w": NODE}, float("inf")),
        "`adapters` cannot be combined at these paths:\n  b: has the shapes [(3,), (2,)]\n  w: is "
        "of low rank in one and trained in full in another\nAdapters that are combined must be of "
        "one base.": lambda: arithmetic.add(
            [{"w": NODE, "b": jnp.ones(3)}, {"w": jnp.ones((12, 9)), "b": jnp.ones(2)}]
        ),
        "truncate takes one of `rank` and `energy`.": lambda: arithmetic.truncate(
            {"w": NODE}, rank=1, energy=0.5
        ),
        "`rank` must be an integer of at least 1; got 0.": lambda: arithmetic.truncate(
            {"w": NODE}, rank=0
        ),
        "`energy` must lie in (0, 1]; got 0.0.": lambda: arithmetic.truncate(
            {"w": NODE}, energy=0.0
        ),
        "`energy` of truncate needs values, which jit and explicit axes of a mesh do not have; "
        "give `rank`.": lambda: jax.jit(lambda t: arithmetic.truncate(t, energy=0.5))({"w": NODE}),
        "`density` must lie in (0, 1]; got 2.": lambda: arithmetic.ties([{"w": NODE}], density=2),
    },
    TypeError: {
        "`adapters` must be a list of adapters, as `init` returns them; got dict.": lambda: (
            arithmetic.add({"w": NODE})
        ),
        "`adapters` must be a list of adapters, as `init` returns them; got an empty one.": (
            lambda: arithmetic.add([])
        ),
    },
}


@each_refusal(REFUSED)
def test_refused(provoke: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=exactly(message)):
        provoke()


WITH_KEYS: list[Any] = [
    lambda: arithmetic.add([{}, KEYED]),
    lambda: arithmetic.scale(KEYED, 2),
    lambda: arithmetic.truncate(KEYED, 1),
    lambda: jlora.many.stack([KEYED]),
    lambda: jlora.many.insert(jlora.many.stack([{"w": NODE}]), 0, KEYED),
]


def test_keys_are_refused() -> None:
    """By whatever takes adapters; and what is trained in full without a base, by merges too."""
    for provoke in WITH_KEYS:
        with pytest.raises(ValueError, match=exactly(KEYS)):
            provoke()
    with pytest.raises(ValueError, match=exactly("`adapters` cannot be combined" + FULL)):
        arithmetic.ties([{"b": jnp.ones(3)}, {"w": NODE}])


# ------------------------------------------------------------------------- what meshes need of it


@pytest.mark.parametrize(
    "shape", [(512, 3), slow((2, 96, 5)), slow((64, 16)), slow((40, 60)), slow((128, 1))]
)
def test_qr_by_blocks_of_rows(shape: tuple[int, ...]) -> None:
    """Q is orthonormal, R triangular, and Q·R what it was, columns that depend on others too."""
    x = np.random.default_rng(0).standard_normal(shape)
    x[..., -1] = x[..., 0]
    x = jnp.asarray(x, jnp.float32)
    q, r = map(np.asarray, jax.jit(_linalg.qr)(x))
    np.testing.assert_allclose(q @ r, x, atol=1e-5)
    np.testing.assert_allclose(
        q.mT @ q, np.broadcast_to(np.eye(q.shape[-1]), r.shape[:-1] + q.shape[-1:]), atol=1e-5
    )
    np.testing.assert_array_equal(r, np.triu(r))
