r"""The two matrices that can be sketched, and how each is multiplied with a basis of few columns.

In each pass a node at the site holds a basis, and the gradient of the node is the image of the
basis. The leading left singular vectors of the image are the next basis. In the last pass some
columns are random directions orthogonal to the rest: they measure what the basis leaves out.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .._adapters import LoRA, LowRank, Probe, factor_shapes
from .._core import promote
from .._linalg import qr, svd_of, times
from .._sites import Site
from .._types import Layout
from ._spectrum import Spectrum

SPARE = 8  # columns beside those that are kept, twice

F = TypeVar("F", bound=Callable[..., Any])


def _program(method: F) -> F:
    """Compiles a method, so that sites of one form share their programs."""
    compiled: Any = jax.jit(method, static_argnums=(0, 1))
    return compiled


@dataclasses.dataclass(frozen=True)
class Target(abc.ABC):
    """The matrices of a site, one for each entry of a stack and slot, whose spectrum is wanted.

    Attributes:
        shape: of W.
        layout: of W.
        dtype: of the basis.
        components: how many singular vectors are wanted, at most as many as there are.
        materialize: whether the rule lets W + ΔW be formed.
    """

    shape: tuple[int, ...]
    layout: Layout
    dtype: Any
    components: int
    materialize: bool

    @classmethod
    def of(cls, site: Site, components: int | None) -> "Target":
        """The target at a site, by default with twice the rank of its rule."""
        assert site.layout is not None
        assert isinstance(site.rule, LoRA)
        k = min(components or 2 * site.rule.rank, *_lengths(site.shape, site.layout))
        dtype = promote(site.dtype, jnp.float32)
        return cls(site.shape, site.layout, dtype, k, site.rule.materialize)

    @property
    def lengths(self) -> tuple[int, int]:
        """The numbers of inputs and of outputs of each matrix."""
        return _lengths(self.shape, self.layout)

    @property
    @abc.abstractmethod
    def most(self) -> int:
        """The number of columns of a complete basis."""

    @property
    def columns(self) -> int:
        """The number of columns of a basis."""
        return min(self.components + 2 * SPARE, self.most)

    @property
    def spare(self) -> int:
        """How many columns are random in the last pass: none if the basis is complete."""
        return 0 if self.columns == self.most else SPARE

    @abc.abstractmethod
    def side(self, turn: int) -> int:
        """0 if the basis lies along the inputs in a pass, 1 if along the outputs."""

    # In what follows a matrix is (…, n, columns) with axes of the stack and the slots in front.

    @_program
    def first_basis(self, side: int, key: jax.Array) -> jax.Array:
        """A random orthonormal basis."""
        return leading(self._normal(key, 0, self.lengths[side], self.columns))

    @_program
    def last_basis(self, side: int, basis: jax.Array, key: jax.Array) -> jax.Array:
        """The leading columns of a basis, and random ones orthogonal to them."""
        kept = basis[..., : self.columns - self.spare]
        drawn = self._normal(key, 1, self.lengths[side], self.spare)
        return jnp.concatenate([kept, drawn - times(kept, times(kept.mT, drawn))], -1)

    @abc.abstractmethod
    def node(self, side: int, basis: jax.Array, key: jax.Array) -> Any:
        """The node whose gradient has the image of the basis."""

    @abc.abstractmethod
    def image(self, side: int, basis: jax.Array, gradient: Any, batches: int) -> jax.Array:
        """The image of the basis, from the sum of gradients over batches."""

    @abc.abstractmethod
    def spectrum(self, side: int, basis: jax.Array, image: jax.Array) -> Spectrum:
        """The spectrum that the last basis and its image have."""

    def _normal(self, key: jax.Array, number: int, rows: int, columns: int) -> jax.Array:
        stack, _, _, slots = self.layout
        beside = [self.shape[d] for d in stack] + ([] if slots is None else [len(slots[1])])
        key = jax.random.fold_in(key, number)
        return jax.random.normal(key, (*beside, rows, columns), self.dtype)

    @property
    def _beside(self) -> int:
        return len(self.layout.stack) + (self.layout.slots is not None)

    def _as_a(self, matrix: jax.Array) -> jax.Array:
        """Gives a matrix (…, inputs, r) the axes of A."""
        return matrix.reshape(factor_shapes(self.layout, self.shape, matrix.shape[-1])[0])

    def _as_b(self, matrix: jax.Array) -> jax.Array:
        """Gives a matrix (…, outputs, r) the axes of B."""
        return matrix.mT.reshape(factor_shapes(self.layout, self.shape, matrix.shape[-1])[1])

    def _matrix_of_a(self, a: jax.Array) -> jax.Array:
        return a.reshape(*a.shape[: self._beside], -1, a.shape[-1])

    def _matrix_of_b(self, b: jax.Array) -> jax.Array:
        return b.reshape(*b.shape[: self._beside + 1], -1).mT


class Gradient(Target):
    r"""G: $G^T Q$ is the gradient of B where A is Q, and $G Q$ that of A where B is Q."""

    @property
    def most(self) -> int:
        return min(self.lengths)

    def side(self, turn: int) -> int:
        return turn % 2

    @_program
    def node(self, side: int, basis: jax.Array, key: jax.Array) -> LowRank:
        del key
        across = (*basis.shape[:-2], self.lengths[1 - side], self.columns)
        a, b = _by_side(side, basis, jnp.zeros(across, basis.dtype))
        return LowRank(self._as_a(a), self._as_b(b), 1.0, self.layout, materialize=self.materialize)

    @_program
    def image(self, side: int, basis: jax.Array, gradient: LowRank, batches: int) -> jax.Array:
        return (self._matrix_of_a(gradient.a) if side else self._matrix_of_b(gradient.b)) / batches

    @_program
    def spectrum(self, side: int, basis: jax.Array, image: jax.Array) -> Spectrum:
        n, k = self.columns - self.spare, self.components
        across, values, rotation = _svd(image[..., :n])
        along = times(basis[..., :n], rotation.mT)
        total = jnp.sum(values**2, -1) + _estimate_rest(image[..., n:], image[..., n:])
        inputs, outputs = _by_side(side, along[..., :k], across[..., :k])
        found = (values[..., :k], total, self._as_a(inputs), self._as_b(outputs))
        return Spectrum(*found, self.shape, self.layout)


class Inputs(Target):
    r"""$C = \sum_t (z_t - \bar z)(z_t - \bar z)^T$, over all inputs z."""

    @property
    def most(self) -> int:
        return self.lengths[0]

    def side(self, turn: int) -> int:
        return 0

    @_program
    def node(self, side: int, basis: jax.Array, key: jax.Array) -> Probe:
        a = jnp.pad(basis, [(0, 0)] * (basis.ndim - 1) + [(0, 1)])
        gate = jnp.zeros((*basis.shape[:-2], self.columns + 1), basis.dtype).at[..., -1].set(1)
        b = self._as_b(self._normal(key, 2, self.lengths[1], self.columns + 1))
        return Probe(self._as_a(a), b, gate, self.layout)

    @_program
    def image(self, side: int, basis: jax.Array, gradient: Probe, batches: int) -> jax.Array:
        a, count = self._matrix_of_a(gradient.a), gradient.gate[..., -1, None, None]
        image, total = a[..., :-1], a[..., -1:]
        return image - times(total, times(total.mT, basis)) / jnp.maximum(count, 1)

    @_program
    def spectrum(self, side: int, basis: jax.Array, image: jax.Array) -> Spectrum:
        n, k = self.columns - self.spare, self.components
        squares, vectors = _eigh(times(basis[..., :n].mT, image[..., :n]))
        total = jnp.sum(squares, -1) + _estimate_rest(basis[..., n:], image[..., n:])
        inputs = self._as_a(times(basis[..., :n], vectors[..., :k]))
        values = jnp.sqrt(jnp.maximum(squares[..., :k], 0))
        return Spectrum(values, total, inputs, None, self.shape, self.layout)


KINDS: dict[str, type[Target]] = {"inputs": Inputs, "gradient": Gradient}


def whole(x: jax.Array) -> jax.Array:
    """`x`, replicated over the devices of its mesh."""
    if not isinstance(x.sharding, NamedSharding):
        return x
    return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))


@jax.jit
def leading(image: jax.Array) -> jax.Array:
    """The left singular vectors of a tall matrix, the leading ones first."""
    return _svd(image)[0]


def _lengths(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    inputs, outputs = (math.prod(shape[d] for d in dims) for dims in layout[1:3])
    return inputs, outputs // (1 if layout.slots is None else layout.slots[0])


def _by_side(side: int, along: jax.Array, across: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orders two matrices: first what lies along the inputs, then what along the outputs."""
    return (across, along) if side else (along, across)


def _svd(image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, r = qr(image)
    u, values, v = svd_of(r)
    return times(q, u), values, v


def _eigh(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors, the largest first."""
    values, vectors = jnp.linalg.eigh((square + square.mT) / 2)
    return values[..., ::-1], vectors[..., ::-1]


def _estimate_rest(x: jax.Array, y: jax.Array) -> jax.Array:
    """Estimates from random columns what the basis leaves out of the sum of squares."""
    return jnp.sum(x * y, (-2, -1)) / max(x.shape[-1], 1)
