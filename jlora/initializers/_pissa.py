"""PiSSA: moves the largest singular values of W into A and B."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from .._linalg import times
from .._quantized import BaseLeaf
from .._rules import check_int
from .._site import Site
from ._initializer import Initializer, RankRule, Start
from ._split import Factors, factor_qr, split, svd_part, widen

MORE = 8  # directions beyond the rank, so that the iteration converges faster


def pissa(key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    r"""Moves the r largest singular values of W, with their vectors, into A and B.

    With $W = U \Sigma V^\top$, $A = U_r \sqrt{\Sigma_r / s}$, $B = \sqrt{\Sigma_r / s}\, V_r^\top$
    and the base is $W - s \cdot A B$, in float32 and rounded once to W's dtype. The adapted model
    starts as the original model, up to this rounding.

    The base differs from `params`: see the guide "Initialize A and B" for resuming and for files.
    Without the adapter, as in `apply(base, {}, ...)`, it is not the original model. Dropout drops
    parts of W, and weight decay pulls the model away from W. Tune the learning rate again. Do not
    use PiSSA or MiLoRA for reinforcement learning with verifiable rewards, where both were found to
    collapse (arXiv 2512.23165).

    To quantize, give the new base to `jlora.quantize` (QPiSSA), which loses less than quantizing W.
    If `init` gets quantized parameters, the new base is quantized again in the same scheme, and the
    errors add up.

    On large matrices `pissa_niter` is faster, and gathers nothing. `pissa` computes a full SVD of
    each matrix, one entry of the first axis of a stack at a time. It gathers each sharded matrix,
    and a whole stack at once if this is sharded along its first axis.

    Args:
        key: a PRNG key, not used.
        w: W, an array or a `jlora.Quantized`.
        site: the site, with its layout.
        rule: the rule, with its rank, scale and dtype.

    Returns:
        `(w, a, b)`: $W - s \cdot A B$, A and B.

    Raises:
        ValueError: if W is a `jax.ShapeDtypeStruct`, or has values that are not finite.
        NotImplementedError: within a `shard_map` that may shard W.

    Source: Meng et al., PiSSA, arXiv 2404.02948, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rule = jlora.LoRA("w", rank=1, alpha=1, init=jlora.initializers.pissa)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        >>> params, x = {"w": jnp.diag(jnp.array([2.0, 9.0]))}, jnp.ones((1, 2))
        >>> base, adapter = lora.init(jax.random.key(0), params, x)
        >>> base["w"].tolist(), jnp.round(lora.apply(base, adapter, x), 5).tolist()
        ([[2.0, 0.0], [0.0, 0.0]], [[2.0, 9.0]])
    """
    return split(factor_largest, key, w, site, rule)


def factor_largest(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
    """Computes A and B of the largest singular values, by a full SVD."""
    del key
    return make_factors(*svd_part(w, slice(rank)), scale)


def make_factors(u: jax.Array, values: jax.Array, vt: jax.Array, scale: float) -> Factors:
    """Computes A and B from singular vectors; each gets the root of value ÷ scale."""
    root = jnp.sqrt(values / scale)
    return u * root[..., None, :], root[..., :, None] * vt


@dataclasses.dataclass(frozen=True, repr=False)
class pissa_niter(Initializer):
    r"""PiSSA by randomized subspace iteration, for large matrices.

    It computes the r largest singular values of W within the span of $(W W^\top)^n W \Omega$, where
    n is the number of iterations and Ω a Gaussian matrix of r + 8 columns. This needs 2·n + 2
    products with W. All matrices of a stack are factored at once. On a mesh W keeps its sharding,
    and only products of r + 8 columns are communicated.

    The base depends on the key, but less with each iteration.

    Args:
        iterations: n. PEFT's name for n = 16 is `"pissa_niter_16"`.

    Raises:
        ValueError: if `iterations` is not an integer of at least 0; in `init`, as in `pissa`.
        NotImplementedError: in `init`, within a `shard_map` that may shard W.

    Source: Meng et al., arXiv 2404.02948, section 4; Halko et al., arXiv 0909.4061, section 4.5.

    Examples:
        >>> import jlora
        >>> jlora.LoRA("w", init=jlora.initializers.pissa_niter(4)).init
        pissa_niter(iterations=4)
    """

    iterations: int = 16

    def __post_init__(self) -> None:
        check_int("iterations", self.iterations, 0, "pissa_niter")
        object.__setattr__(self, "iterations", int(self.iterations))

    def __call__(self, key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
        return split(_Iterate(self.iterations), key, w, site, rule)


@dataclasses.dataclass(frozen=True)
class _Iterate:
    """Computes A and B; equal objects share a compiled program, which bound methods would not."""

    iterations: int

    def __call__(self, key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
        w = widen(w)
        *stack, inputs, outputs = w.shape
        columns = min(rank + MORE, inputs, outputs)
        omega = jax.random.normal(key, (*stack, outputs, columns), w.dtype)

        def iterate(_: jax.Array, q: jax.Array) -> jax.Array:
            z, _ = factor_qr(times(w.mT, q))
            return factor_qr(times(w, z))[0]

        q = lax.fori_loop(0, self.iterations, iterate, factor_qr(times(w, omega))[0])
        z, rest = factor_qr(times(w.mT, q))
        u, values, vt = svd_part(rest.mT, slice(rank))
        return make_factors(times(q, u), values, times(vt, z.mT), scale)
