r"""The two matrices that can be sketched, and how each is multiplied with a basis of few columns.

In each pass a node at the site holds a basis, and the gradient of the node is the image of the
basis: the product of the matrix with it. The leading left singular vectors of the image are the
next basis. In the last pass some columns are random directions orthogonal to the others: they
estimate what the basis misses.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._adapters import LoRA, LowRank, Probe, factor_shapes, from_matrices, matrices, matrix_lengths
from .._arrays import promote
from .._linalg import qr, svd_of, times
from .._site import Site
from .._text import align_columns
from .._types import Layout, PyTree, short


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """The leading singular vectors of a site, for each matrix of a stack and each slot.

    Attributes:
        values: the k largest singular values, descending; shape (stack…, k), or (stack…, slots, k).
        total: the sum of the squares of all singular values; shape (stack…), or (stack…, slots).
            The part beyond the k values is estimated without bias from eight random directions.
        inputs: the singular vectors along the inputs, in the layout of A: (stack…, inputs…, k), or
            (stack…, slots, inputs…, k).
        outputs: the singular vectors along the outputs, in the layout of B; None if inputs were
            sketched.
        shape: the shape of W.
        layout: the layout of W, with the slots of the rule.
        use: how the model uses W: the `kind` of its `Site`.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> loss = lambda params, x: jnp.sum((x @ params["w"]) ** 2)
        >>> params, batches = {"w": jnp.ones((4, 3))}, [jnp.eye(4)]
        >>> found = jlora.sketch(loss, params, jlora.LoRA("w", rank=1), batches, kind="inputs")
        >>> found.sites["w"].inputs.shape, found.sites["w"].values.shape
        ((4, 2), (2,))
    """

    values: jax.Array
    total: jax.Array
    inputs: jax.Array
    outputs: jax.Array | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    use: str | None = dataclasses.field(default="dense", metadata={"static": True})

    def __repr__(self) -> str:
        names = ("values", "total", "inputs", "outputs")
        return f"Spectrum({', '.join(f'{name}={short(getattr(self, name))}' for name in names)})"

    @property
    def ratios(self) -> jax.Array:
        """The squares of `values` over the total; for inputs, the explained variance."""
        total = self.total[..., None]
        is_normal = total >= jnp.finfo(total.dtype).tiny  # XLA rounds smaller numbers to 0
        return jnp.where(is_normal, self.values**2 / jnp.where(is_normal, total, 1), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """The result of `jlora.sketch`: a pytree of arrays, which `print` shows as a table.

    Attributes:
        sites: a `Spectrum` for each site, by path.
        kind: `"inputs"` or `"gradient"`.
    """

    sites: Mapping[str, Spectrum]
    kind: str = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"Sketch({len(self.sites)} sites, kind={self.kind!r})"

    def __str__(self) -> str:
        header = ("site", "matrices", "inputs", "outputs", "components", "largest", "share")
        lines = align_columns(header, [_row(*item) for item in self.sites.items()], header[1:])
        return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])


def _row(path: str, s: Spectrum) -> tuple[str, ...]:
    counts = (s.total.size, *matrix_lengths(s.layout, s.shape), s.values.shape[-1])
    share = min(1.0, float(jnp.sum(s.values**2) / jnp.maximum(jnp.sum(s.total), 1e-30)))
    return (
        path or "(root)",
        *(f"{n:,}" for n in counts),
        f"{float(jnp.max(s.values)):.3g}",
        f"{share:.1%}",
    )


# --------------------------------------------------------------------------- the matrices of a site

SPARE = 8  # extra columns for accuracy; in the last pass as many random ones too

# Compiles a method; sites of one form share the program.
_program: Any = functools.partial(jax.jit, static_argnums=(0, 1))


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """The matrices of a site to sketch, one for each entry of a stack and each slot.

    In its methods a matrix has the shape (stack and slots…, n, columns). The `side` of a pass is 0
    if the basis is along the inputs, and 1 if it is along the outputs.

    Attributes:
        shape: the shape of W.
        layout: the layout of W.
        dtype: the dtype of the basis.
        components: how many singular vectors to compute, at most as many as there are.
        materialize: whether the rule allows W + ΔW to be formed.
        use: the kind of the site.
    """

    shape: tuple[int, ...]
    layout: Layout
    dtype: Any
    components: int
    materialize: bool
    use: str | None

    @classmethod
    def of(cls, site: Site, components: int | None) -> Any:
        """Makes the matrices of a site, by default with twice the rank of its rule."""
        assert isinstance(site.rule, LoRA)
        k = min(components or 2 * site.rule.rank, *matrix_lengths(site.layout, site.shape))
        dtype = promote(site.dtype, jnp.float32)
        return cls(site.shape, site.layout, dtype, k, site.rule.materialize, site.kind)

    @property
    def lengths(self) -> tuple[int, int]:
        """The numbers of inputs and of outputs of each matrix."""
        return matrix_lengths(self.layout, self.shape)

    @property
    def most(self) -> int:
        """The number of columns of a complete basis."""
        return min(self.lengths)

    @property
    def columns(self) -> int:
        """The number of columns of a basis."""
        return min(self.components + 2 * SPARE, self.most)

    @property
    def spare(self) -> int:
        """The number of random columns in the last pass: 0 if the basis is complete."""
        return 0 if self.columns == self.most else SPARE

    @functools.partial(jax.jit, static_argnums=(0, 1, 2))
    def basis(self, side: int, is_last: bool, image: PyTree, key: jax.Array) -> jax.Array:
        """Computes the basis of a pass: a random one, or the leading vectors of the last image.

        In the last pass some columns are random and orthogonal to the others.
        """
        basis = _svd(self.normal(key, 0, side, self.columns) if image is None else image)[0]
        if not is_last:
            return basis
        kept = basis[..., : self.columns - self.spare]
        drawn = self.normal(key, 1, side, self.spare)
        return jnp.concatenate([kept, drawn - times(kept, times(kept.mT, drawn))], -1)

    def normal(self, key: jax.Array, number: int, side: int, columns: int) -> jax.Array:
        """Draws random matrices along one side."""
        stack, _, _, slots = self.layout
        beside = [self.shape[d] for d in stack] + ([] if slots is None else [len(slots[1])])
        shape = (*beside, self.lengths[side], columns)
        return jax.random.normal(jax.random.fold_in(key, number), shape, self.dtype)


class Gradient(_Matrices):
    r"""G: if A is a basis Q, the gradient of B is $G^T Q$; if B is Q, that of A is $G Q$."""

    sides: ClassVar = (0, 1)  # of the passes, in turn

    @_program
    def node(self, side: int, basis: jax.Array, key: jax.Array) -> LowRank:
        """Makes the node whose gradient has the image of the basis."""
        across = jnp.zeros((*basis.shape[:-2], self.lengths[1 - side], self.columns), basis.dtype)
        return self._node(side, basis, across)._replace(materialize=self.materialize)

    @_program
    def image(self, side: int, basis: jax.Array, gradient: LowRank, batches: int) -> jax.Array:
        """Computes the image of the basis from the sum of gradients over batches."""
        a, b = matrices(gradient)
        return (a if side else b.mT) / batches

    @_program
    def spectrum(self, side: int, basis: jax.Array, image: jax.Array) -> Spectrum:
        """Computes the spectrum from the last basis and its image."""
        n = self.columns - self.spare
        k = self.components
        across, values, rotation = _svd(image[..., :n])
        along = times(basis[..., :n], rotation.mT)
        total = jnp.sum(values**2, -1) + _estimate_rest(image[..., n:], image[..., n:])
        node = self._node(side, along[..., :k], across[..., :k])
        found = values[..., :k], total, node.a, node.b
        return Spectrum(*found, self.shape, self.layout, self.use)

    def _node(self, side: int, along: jax.Array, across: jax.Array) -> LowRank:
        a, b = (across, along) if side else (along, across)
        return from_matrices(a, b.mT, self.layout, self.shape)


class Inputs(_Matrices):
    r"""$C = \sum_t (z_t - \bar z)(z_t - \bar z)^T$, over all inputs z."""

    @property
    def most(self) -> int:
        return self.lengths[0]

    sides: ClassVar = (0,)

    @_program
    def node(self, side: int, basis: jax.Array, key: jax.Array) -> Probe:
        """Makes the node whose gradient has the image of the basis."""
        a = jnp.pad(basis, [(0, 0)] * (basis.ndim - 1) + [(0, 1)])
        gate = jnp.zeros((*basis.shape[:-2], self.columns + 1), basis.dtype).at[..., -1].set(1)
        b = self.normal(key, 2, 1, self.columns + 1).mT
        node = from_matrices(a, b, self.layout, self.shape)
        return Probe(node.a, node.b, gate, self.layout)

    @_program
    def image(self, side: int, basis: jax.Array, gradient: Probe, batches: int) -> jax.Array:
        """Computes the image of the basis from the sum of gradients over batches."""
        a = gradient.a.reshape(*basis.shape[:-1], -1)
        count = gradient.gate[..., -1, None, None]
        image, total = a[..., :-1], a[..., -1:]
        return image - times(total, times(total.mT, basis)) / jnp.maximum(count, 1)

    @_program
    def spectrum(self, side: int, basis: jax.Array, image: jax.Array) -> Spectrum:
        """Computes the spectrum from the last basis and its image."""
        n = self.columns - self.spare
        k = self.components
        square = times(basis[..., :n].mT, image[..., :n])
        squares, vectors = (x[..., ::-1] for x in jnp.linalg.eigh((square + square.mT) / 2))
        total = jnp.sum(squares, -1) + _estimate_rest(basis[..., n:], image[..., n:])
        along = times(basis[..., :n], vectors[..., :k])
        inputs = along.reshape(factor_shapes(self.layout, self.shape, k)[0])
        values = jnp.sqrt(jnp.maximum(squares[..., :k], 0))
        return Spectrum(values, total, inputs, None, self.shape, self.layout, self.use)


KINDS: dict[str, type[Inputs] | type[Gradient]] = {"inputs": Inputs, "gradient": Gradient}


def _svd(image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes U, S and Vᵀ of tall matrices."""
    q, r = qr(image)
    u, values, v = svd_of(r)
    return times(q, u), values, v


def _estimate_rest(x: jax.Array, y: jax.Array) -> jax.Array:
    """Estimates from random columns the part of the sum of squares that the basis misses."""
    return jnp.sum(x * y, (-2, -1)) / max(x.shape[-1], 1)
