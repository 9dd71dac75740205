r"""Sums, differences and merges of adapters, on what they mean: ΔW, never on A and B apart.

The sum of two ΔW has their factors side by side, $[A_1, A_2] [B_1; B_2]$: exact, and of the sum of
the ranks. A·G and G⁻¹·B are other factors of the same ΔW, for which nothing here gives another ΔW.

Leaves that are trained in full count as the change W' - W of the base, which must then be given.
All functions are pure, and work under `jax.jit` and `jax.vmap` but where they say otherwise.

On a mesh `add`, `scale` and `difference` move nothing. The others factor A and B by blocks of rows,
whose triangles of r columns are gathered: about r rows for each part of A or B in all, or A or B
itself where its parts have fewer than 4·r rows. Of leaves in full `ties` adds up counts. Nothing of
W's size is moved, and the result lies as A and B do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._alike import alike, joined, leaves_of, misfit, of_other_methods, refuse
from ._linalg import qr, svd, svd_of, times
from ._tree import adapter_leaves, check_fits, fold, is_empty, leaves_by_path, nest
from ._types import Path, PyTree
from .adapters import LowRank, is_node
from .core import explicit

Weights = Sequence[Any] | jax.Array | None


def add(adapters: Sequence[PyTree], weights: Weights = None, *, base: PyTree = None) -> PyTree:
    r"""The exact sum $\Delta W = \sum_i w_i \, \Delta W_i$.

    At each site A is $[A_1, A_2, \ldots]$ and B is $[w_1 B_1; w_2 B_2; \ldots]$. The rank is the
    sum of the ranks; see `truncate` for a smaller one. Adapters may differ in ranks, scales, slots
    and sites: where one has no site, its ΔW is 0.

    Args:
        adapters: adapters of one base, `{}` among them if need be.
        weights: $w_i$, numbers or an array of shape (adapters,); 1 unless told.
        base: the parameters that the adapters are for. Needed where leaves are trained in full:
            these become $W + \sum_i w_i (W_i - W)$. One that a single adapter has, of weight 1,
            stays as it is without.

    Returns:
        An adapter. Its dropout is that of the sites where all agree, else 0.

    Raises:
        TypeError: if `adapters` are none.
        ValueError: if sites do not fit one another, or cannot be added; all paths are named.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.Layout((), (0,), (1,))
        >>> one = {"w": jlora.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> arithmetic.add([one, one], [1.0, -0.5])
        {'w': LowRank(a=float32[4,4], b=float32[4,3], scale=1.0)}
    """
    return _summed(_checked(adapters, weights, base, "`adapters` cannot be combined"))


def scale(adapter: PyTree, factor: float | jax.Array, *, base: PyTree = None) -> PyTree:
    r"""The adapter of $c \cdot \Delta W$: B times c, A as it is. The negation is that by -1.

    Args:
        adapter: an adapter.
        factor: c.
        base: the parameters that the adapter is for, needed for leaves trained in full.

    Returns:
        An adapter of the same structure.

    Raises:
        TypeError: if `adapter` is none.
        ValueError: if it cannot be scaled; all paths are named.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.Layout((), (0,), (1,))
        >>> one = {"w": jlora.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> float(arithmetic.scale(one, -0.5)["w"].b[0, 0])
        -0.5
    """
    _check_finite("factor", [factor])
    return _summed(_checked([adapter], [factor], base, "`adapter` cannot be scaled"))


def difference(adapter: PyTree, other: PyTree, *, base: PyTree = None) -> PyTree:
    r"""The exact difference $\Delta W = \Delta W_1 - \Delta W_2$, of the sum of the ranks.

    Where an initializer changed the base to $W - \Delta W_2$ this is the adapter of W itself.

    Args:
        adapter: the first.
        other: what is taken away.
        base: the parameters that both are for, needed for leaves trained in full.

    Returns:
        An adapter.

    Raises:
        TypeError: if one is no adapter.
        ValueError: if sites do not fit one another; all paths are named.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import analysis, arithmetic
        >>> layout = jlora.Layout((), (0,), (1,))
        >>> one = {"w": jlora.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> round(float(analysis.norm(arithmetic.difference(one, one)["w"])), 5)
        0.0
    """
    what = "`other` cannot be subtracted from `adapter`"
    return _summed(_checked([adapter, other], [1.0, -1.0], base, what), cancels=True)


def truncate(adapter: PyTree, rank: int | None = None, *, energy: float | None = None) -> PyTree:
    r"""The best approximation of each ΔW by one of a smaller rank (Eckart and Young, 1936).

    With $A = Q_1 R_1$ and $B^\top = Q_2 R_2$, and the singular values of the small
    $R_1 R_2^\top = U \Sigma V^\top$, the result is $A' = Q_1 U \sqrt{\Sigma}$ and
    $B' = \sqrt{\Sigma}\, V^\top Q_2^\top$, cut to the rank. ΔW is never formed. Each matrix of a
    stack and each slot is approximated for itself. Computed in float32 or better. On a mesh A and B
    stay where they lie, but for the triangles of blocks of their rows, which are gathered.

    Args:
        adapter: an adapter. Leaves trained in full stay as they are.
        rank: the rank, at least 1; a site of at most this rank stays as it is.
        energy: instead of `rank`, the share of $\sum_i \sigma_i^2$ to keep, in (0, 1]: each site
            gets the smallest rank that keeps it in all its matrices. Needs values, so not under
            `jit` and not along explicit axes of a mesh.

    Returns:
        An adapter, whose scales are 1 where a rank was cut.

    Raises:
        TypeError: if `adapter` is none.
        ValueError: if `rank` or `energy` is out of range, or a site is of another method.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import analysis, arithmetic
        >>> layout = jlora.Layout((), (0,), (1,))
        >>> site = jlora.LowRank(jnp.eye(4, 3), jnp.diag(jnp.array([5.0, 4.0, 1.0])), 1.0, layout)
        >>> small = arithmetic.truncate({"w": site}, rank=2)
        >>> [round(float(x), 4) for x in analysis.delta_spectrum(small["w"])]
        [5.0, 4.0]
        >>> arithmetic.truncate({"w": site}, energy=0.9)["w"].a.shape  # 41 of 42
        (4, 2)
    """
    if (rank is None) == (energy is None):
        raise ValueError("truncate takes one of `rank` and `energy`.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"`rank` must be an integer of at least 1; got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"`energy` must lie in (0, 1]; got {energy!r}.")
    found = {} if is_empty(adapter) else adapter_leaves(adapter)
    _refuse_others([found], "`adapter` cannot be truncated")

    def cut(nodes: Sequence[LowRank]) -> tuple[jax.Array, jax.Array]:
        u, values, v = svd(*_matrices(nodes[0]))
        kept = rank if rank is not None else _enough(values, energy)
        root = jnp.sqrt(values[..., :kept])
        return u[..., :kept] * root[..., None, :], root[..., None] * v[..., :kept].mT

    def is_small(x: Any) -> bool:
        return not is_node(x) or (rank is not None and x.a.shape[-1] <= rank)

    return nest({path: x if is_small(x) else _made(cut, [x]) for path, x in found.items()})


def ties(
    adapters: Sequence[PyTree],
    weights: Weights = None,
    *,
    density: float = 0.2,
    base: PyTree = None,
) -> PyTree:
    r"""TIES merging: of each adapter what is largest, and where signs differ, what most agree on.

    Of the weighted changes $M_i = w_i \Delta W_i$ the entries of largest magnitude are kept, a
    share `density`; the others become 0. The sign of an entry is that of $\sum_i M_i$. The result
    is the mean over the adapters whose entry has that sign.

    The entries are those in the *core space* of the adapters: coordinates along the singular
    vectors of all ΔW side by side, and of all ΔW one above the other, in which a ΔW is a matrix of
    at most Σr × Σr. Nothing is lost, and the result has a rank of at most Σr: on the entries of ΔW
    themselves it would have full rank, and be no adapter. Leaves trained in full are merged by
    their own entries.

    Args:
        adapters: adapters of one base.
        weights: $w_i$, numbers or an array of shape (adapters,); 1 unless told.
        density: the share of entries to keep, in (0, 1]; of each matrix.
        base: the parameters that the adapters are for, needed for leaves trained in full.

    Returns:
        An adapter; see `truncate` for a smaller rank.

    Raises:
        TypeError: if `adapters` are none.
        ValueError: if `density` is out of range, or sites do not fit one another; all paths are
            named.

    Source: Yadav et al., arXiv 2306.01708; the core space: Panariello et al., arXiv 2509.17786.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.Layout((), (0,), (1,))
        >>> one = {"w": jlora.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, layout)}
        >>> merged = arithmetic.ties([one, one], density=1.0)["w"]
        >>> round(float((merged.a @ merged.b)[0, 0]), 5)  # a mean, not a sum
        1.0
    """
    _check_density(density)
    given = _checked(adapters, weights, base, "`adapters` cannot be combined")

    def merge(deltas: Sequence[jax.Array], matrix: int = 2) -> jax.Array:
        kept = jnp.stack([_largest(x, density, matrix) for x in deltas])
        agrees = (kept * jnp.sign(sum(kept)) > 0).astype(kept.dtype)
        return (kept * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)

    return _each(
        given,
        lambda nodes, w, _: _in_core_space(nodes, w, merge),
        lambda deltas, _: merge(deltas, deltas[0].ndim),
    )


def dare(
    adapters: Sequence[PyTree],
    weights: Weights = None,
    *,
    key: jax.Array,
    density: float = 0.5,
    base: PyTree = None,
) -> PyTree:
    r"""DARE merging: the sum of changes of which entries are dropped and the others rescaled.

    $\Delta W = \sum_i w_i \, m_i \odot \Delta W_i / p$ where an entry of the mask $m_i$ is 1 with
    probability p, the `density`, and else 0. Its expectation is `add`. As in `ties` the entries are
    those in the core space.

    Args:
        adapters: adapters of one base.
        weights: $w_i$, numbers or an array of shape (adapters,); 1 unless told.
        key: a PRNG key; it is folded with each path and adapter.
        density: p, in (0, 1].
        base: the parameters that the adapters are for, needed for leaves trained in full.

    Returns:
        An adapter; see `truncate` for a smaller rank.

    Raises:
        TypeError: if `adapters` are none.
        ValueError: if `density` is out of range, or sites do not fit one another; all paths are
            named.

    Source: Yu et al., arXiv 2311.03099.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import analysis, arithmetic
        >>> layout = jlora.Layout((), (0,), (1,))
        >>> one = {"w": jlora.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, layout)}
        >>> same = arithmetic.dare([one], key=jax.random.key(0), density=1.0)["w"]
        >>> round(float(analysis.distance(same, one["w"])), 5)
        0.0
    """
    _check_density(density)
    given = _checked(adapters, weights, base, "`adapters` cannot be combined")

    def keys(path: Path) -> jax.Array:
        return jax.random.split(fold(key, path), len(given.trees))

    def dropped(x: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, density, x.shape) * x / density

    def merge(deltas: Sequence[jax.Array], keys: jax.Array) -> jax.Array:
        return sum(map(dropped, deltas, keys), start=jnp.zeros(()))

    return _each(
        given,
        lambda nodes, w, path: _in_core_space(nodes, w, merge, keys(path)),
        lambda deltas, path: merge(deltas, keys(path)),
    )


# ------------------------------------------------------------------------------------- the trees


class _Given(NamedTuple):
    """What a function was given.

    Attributes:
        trees: the leaves of each adapter by path.
        weights: a weight for each.
        base: the parameters, or None.
        refusal: how its errors begin.
    """

    trees: list[dict[Path, Any]]
    weights: list[Any]
    base: PyTree
    refusal: str


def _checked(adapters: Sequence[PyTree], weights: Weights, base: PyTree, refusal: str) -> _Given:
    trees = leaves_of(adapters)
    w = [1.0] * len(adapters) if weights is None else list(weights)
    if len(w) != len(adapters):
        raise ValueError(
            f"`weights` must be one for each of the {len(adapters)} adapters; got {len(w)}."
        )
    _check_finite("weights", w)
    _refuse_others(trees, refusal)
    if base is not None:
        for tree in trees:
            check_fits(base, tree)
    return _Given(trees, w, base, refusal)


def _check_finite(argument: str, values: Sequence[Any]) -> None:
    if wrong := [x for x in values if isinstance(x, int | float) and not np.isfinite(x)]:
        raise ValueError(f"`{argument}` must be finite; got {wrong[0]!r}.")


def _refuse_others(trees: Sequence[Mapping[Path, Any]], refusal: str) -> None:
    """Raises for nodes of other methods, whose sum is no node of theirs."""
    wrong = of_other_methods(leaf for tree in trees for leaf in tree.items())
    refuse(refusal, wrong, "Merge these with the base.")


def _each(
    given: _Given,
    low_rank: Callable[[list[LowRank], list[Any], Path], LowRank],
    full: Callable[[list[Any], Path], Any],
    keeps_one: bool = False,
) -> PyTree:
    """What `low_rank` makes of the nodes at each path, and `full` of the changes of leaves.

    If it `keeps_one`, a leaf in full of one adapter alone, of weight 1, stays as it is.
    """
    trees, weights, base, refusal = given
    paths = list(dict.fromkeys(path for tree in trees for path in tree))
    held = {p: [(t[p], w) for t, w in zip(trees, weights, strict=True) if p in t] for p in paths}
    wrong = {p: why for p, pairs in held.items() if (why := misfit([x for x, _ in pairs]))}
    refuse(refusal, wrong, "Adapters that are combined must be of one base.")
    kept = {
        path: x
        for path, [(x, w), *more] in held.items()
        if keeps_one and not (is_node(x) or more) and _is_one(w)
    }
    changed = [p for p, [(x, _), *_] in held.items() if not is_node(x) and p not in kept]
    if base is None:
        needed = "is trained in full, so that its change is known from the base alone"
        remedy = "Give `base`, the parameters that they are for."
        refuse(refusal, dict.fromkeys(changed, needed), remedy)
    params = dict(leaves_by_path(base)) if changed else {}

    def one(path: Path) -> Any:
        leaves, w = (list(x) for x in zip(*held[path], strict=True))
        if path in kept:
            return kept[path]
        if is_node(leaves[0]):
            return low_rank(alike(leaves), w, path)
        start = jnp.asarray(params[path])
        wide = jnp.promote_types(start.dtype, jnp.float32)
        start, dtype = start.astype(wide), leaves[0].dtype
        changes = [v * (x.astype(wide) - start) for x, v in zip(leaves, w, strict=True)]
        return (start + full(changes, path)).astype(dtype)

    return nest({path: one(path) for path in paths}) if paths else {}


def _summed(given: _Given, cancels: bool = False) -> PyTree:
    """The exact sum, of factors side by side; what a start took from the base may cancel in it."""

    def low_rank(nodes: list[LowRank], w: list[Any], _: Path) -> LowRank:
        scale = nodes[0].scale or 1.0
        n = len(nodes[0].layout.stack) + (nodes[0].layout.slots is not None)
        b = [_times(x.b, v, x.scale / scale) for x, v in zip(nodes, w, strict=True)]
        a = jnp.concatenate([x.a for x in nodes], -1)
        node = joined(nodes, a, jnp.concatenate(b, n), scale)
        return node._replace(residual=False) if cancels and len(nodes) > 1 else node

    return _each(given, low_rank, lambda deltas, _: sum(deltas), keeps_one=True)


def _is_one(w: Any) -> bool:
    return isinstance(w, int | float) and w == 1


# ----------------------------------------------------------------------------------- the matrices


def _times(b: jax.Array, *factors: Any) -> jax.Array:
    """B times numbers, in B's dtype; as it is where all are 1."""
    for x in factors:
        b = b if _is_one(x) else (b * x).astype(b.dtype)
    return b


def _matrices(node: LowRank) -> tuple[jax.Array, jax.Array]:
    """s·A as (stack and slots…, inputs, r) and B as (stack and slots…, r, outputs)."""
    wide = jnp.promote_types(jnp.result_type(node.a, node.b), jnp.float32)
    a, b = (jnp.asarray(x, wide) for x in (node.a, node.b))
    n = len(node.layout.stack) + (node.layout.slots is not None)
    lead, rank = a.shape[:n], a.shape[-1]
    return node.scale * a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1)


def _made(
    make: Callable[..., tuple[jax.Array, jax.Array]], nodes: Sequence[LowRank], *operands: Any
) -> LowRank:
    """The node of such matrices that `make` makes, of scale 1, in the dtypes of `nodes`.

    Along explicit axes of a mesh its A and B lie as those of the first node.
    """
    like = nodes[0]
    n = len(like.layout.stack) + (like.layout.slots is not None)

    def shaped(nodes: Sequence[LowRank], *operands: Any) -> tuple[jax.Array, jax.Array]:
        a, b = make(nodes, *operands)
        rank = a.shape[-1]
        a = a.reshape(*like.a.shape[:-1], rank).astype(jnp.result_type(*(x.a for x in nodes)))
        b = b.reshape(*like.b.shape[:n], rank, *like.b.shape[n + 1 :])
        return a, b.astype(jnp.result_type(*(x.b for x in nodes)))

    places = explicit(like.a), explicit(like.b)
    in_place: Any = shaped
    if None not in places:
        in_place = jax.sharding.auto_axes(shaped, out_sharding=places)
    a, b = in_place(nodes, *operands)
    return joined(nodes, a, b, 1.0)._replace(frozen=())


def _enough(values: jax.Array, energy: float | None) -> int:
    """The smallest rank that keeps a share of the sum of squares, in all matrices of a stack."""
    if isinstance(values, jax.core.Tracer):  # pyright: ignore
        raise ValueError(
            "`energy` of truncate needs values, which jit and explicit axes of a mesh do not have; "
            "give `rank`."
        )
    squares = np.asarray(values, np.float64) ** 2
    needed = (energy or 1) * squares.sum(-1, keepdims=True) * (1 - 1e-12)
    missing = (np.cumsum(squares, -1) < needed).sum(-1)
    return int(min(missing.max(initial=0) + 1, values.shape[-1]))


def _in_core_space(
    nodes: Sequence[LowRank],
    weights: Sequence[Any],
    merge: Callable[..., jax.Array],
    *operands: Any,
) -> LowRank:
    """The node of what `merge` makes of the coordinates of each weighted ΔW, and of `operands`.

    Along Q U, from the singular vectors of [ΔW_1, ΔW_2, …], and along those of the ΔW above one
    another: bases that follow from the ΔW, and not from how they are factored.
    """

    def make(nodes: Sequence[LowRank], weights: Any, *operands: Any) -> Any:
        pairs = [_matrices(x) for x in nodes]
        ends = np.cumsum([a.shape[-1] for a, _ in pairs])[:-1]
        scaled = [w * a for (a, _), w in zip(pairs, weights, strict=True)]
        q_a, r_a = qr(jnp.concatenate(scaled, -1))
        q_b, r_b = qr(jnp.concatenate([b.mT for _, b in pairs], -1))
        parts = zip(jnp.split(r_a, ends, -1), jnp.split(r_b, ends, -1), strict=True)
        cores = [times(x, y.mT) for x, y in parts]
        u, v = svd_of(jnp.concatenate(cores, -1))[0], svd_of(jnp.concatenate(cores, -2))[2].mT
        core = merge([times(times(u.mT, m), v) for m in cores], *operands)
        a, b = times(q_a, u), times(q_b, v).mT
        # The rank is that of the smaller side of the core.
        return (times(a, core), b) if core.shape[-1] <= core.shape[-2] else (a, times(core, b))

    return _made(make, nodes, weights, *operands)


def _largest(x: jax.Array, density: float, matrix: int) -> jax.Array:
    """`x`, of each matrix of its last axes the largest entries alone, others 0."""
    axes = tuple(range(-matrix, 0))
    count = max(1, round(density * math.prod(x.shape[-matrix:])))
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    # The least that is kept, bit by bit: sorting would bring all entries to one place.
    def with_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        more = least | (jnp.ones_like(least) << (bits.dtype.itemsize * 8 - 1 - i))
        return jnp.where((bits >= more).sum(axes, keepdims=True) >= count, more, least)

    start = jnp.zeros_like(bits.max(axes, keepdims=True))
    least = jax.lax.fori_loop(0, 8 * bits.dtype.itemsize, with_bit, start)
    return jnp.where(bits >= least, x, 0)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"`density` must lie in (0, 1]; got {density!r}.")
