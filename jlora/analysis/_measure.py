"""Measures adapters on the host, by NumPy in float64: no shape of a file needs a program."""

import math
from typing import NamedTuple

import numpy as np

from .._adapters import Decomposed, LowRank, weight_shape, without_slots
from ._size import effective_rank, stable_rank


class Measured(NamedTuple):
    """The size of each ΔW of a node, as arrays of float64.

    Attributes:
        norm: the Frobenius norm, shape (stack…).
        stable_rank: as by `analysis.stable_rank`, shape (stack…).
        effective_rank: as by `analysis.effective_rank`, shape (stack…).
        spectrum: the singular values, which descend, shape (stack…, r).
    """

    norm: np.ndarray
    stable_rank: np.ndarray
    effective_rank: np.ndarray
    spectrum: np.ndarray


def measure(node: LowRank | Decomposed) -> Measured:
    r"""Measures each ΔW = s·A·B of a node on the host, such as one of `checkpoint.restore`.

    Args:
        node: a node of an adapter; of DoRA the A and B, before normalization.

    Returns:
        Norm, ranks and singular values. They are NaN where A or B is not finite.

    Examples:
        >>> import numpy as np, jlora
        >>> from jlora import analysis
        >>> a, b = np.eye(4, 2), np.diag([3.0, 4.0])
        >>> node = jlora.types.LowRank(a, b, 2.0, jlora.types.Layout((), (0,), (1,)))
        >>> float(analysis.measure(node).norm), analysis.measure(node).spectrum.tolist()
        (10.0, [8.0, 6.0])
    """
    values = _spectrum(*_matrices(node))
    return Measured(_norm(values), stable_rank(values), effective_rank(values), values)


def relative_distance(node: LowRank, other: LowRank) -> float:
    """Computes ‖ΔW₁ - ΔW₂‖ / ‖ΔW₁‖ over all matrices of two nodes for weights with equal axes."""
    (a, b), (c, d) = _matrices(node), _matrices(other)
    both = np.concatenate([a, -c], -1), np.concatenate([b, d], -2)
    change, size = (float(np.linalg.norm(_norm(_spectrum(*x)))) for x in (both, (a, b)))
    return relative(change, size)


def relative(change: float, size: float) -> float:
    """Divides; a change of zeros is 0, or infinite."""
    return change / size if size else math.inf if change else 0.0


def _matrices(node: LowRank | Decomposed) -> tuple[np.ndarray, np.ndarray]:
    """Returns s·A as (stack…, inputs, r) and B as (stack…, r, outputs); slots are concatenated."""
    flat = without_slots(node, weight_shape(node))
    a, b = (np.asarray(x, np.float64) for x in (flat.a, flat.b))
    n = len(flat.layout.stack)
    rank = a.shape[-1]
    a = a.reshape(*a.shape[:n], math.prod(a.shape[n:-1]), rank)
    return node.scale * a, b.reshape(*b.shape[:n], rank, math.prod(b.shape[n + 1 :]))


def _spectrum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the singular values of A·B, (stack…, r); zeros beyond what its shape allows."""
    core = np.linalg.qr(a, mode="r") @ np.linalg.qr(b.mT, mode="r").mT
    is_finite = np.isfinite(core).all((-2, -1))[..., None]
    values = np.linalg.svd(np.where(is_finite[..., None], core, 0), compute_uv=False)
    values = np.where(is_finite, values, np.nan)
    missing = a.shape[-1] - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def _norm(values: np.ndarray) -> np.ndarray:
    """Computes the norm from singular values, whose squares may be beyond float64."""
    return values[..., 0] * np.sqrt(stable_rank(values))
