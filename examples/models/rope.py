"""Rotary positions: each pair of a head turns by an angle that grows with the token's position.

    x = rope(x, frequencies(head_dim, base), positions)

Models that were made longer after training turn slower: `Linear` and `Llama3` say how much.
Sources: Su et al., arXiv 2104.09864; Chen et al., arXiv 2306.15595; the Llama 3 report, 2407.21783.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Linear(NamedTuple):
    """Every pair turns `factor` times slower."""

    factor: float

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """The frequencies of the longer model."""
        return frequencies / self.factor


class Llama3(NamedTuple):
    """Slow pairs turn `factor` times slower, fast ones as before, those between partly.

    Within `original_max_position_embeddings` tokens, slow pairs turn at most `low_freq_factor`
    times and fast ones at least `high_freq_factor` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """The frequencies of the longer model."""
        turns = self.original_max_position_embeddings * frequencies / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        fast = np.clip((turns - low) / (high - low), 0, 1)
        return fast * frequencies + (1 - fast) * frequencies / self.factor


# By the `rope_type` of a config.json, whose fields have the names of the class's.
SCALINGS: Mapping[str, type[Linear] | type[Llama3]] = {"linear": Linear, "llama3": Llama3}


def frequencies(
    head_dim: int, base: float, scaling: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """The angle in radians by which each pair of a head turns per position, (head_dim / 2,)."""
    found = base ** -(np.arange(0, head_dim, 2) / head_dim)
    return np.asarray(scaling(found) if scaling else found, np.float32)


def rope(x: jax.Array, frequencies: jax.Array, positions: jax.Array) -> jax.Array:
    """Turns the pairs (x[i], x[i + head_dim / 2]) of every head by their position's angles.

    Args:
        x: (batch, length, heads, head_dim).
        frequencies: (head_dim / 2,).
        positions: (batch or 1, length).
    """
    angle = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    # (batch or 1, length, 1, head_dim / 2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
