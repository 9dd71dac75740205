"""Layers that read and set the mask that Keras keeps for an array."""

from typing import Any

import jax
import keras


class GetMask(keras.Layer):
    """Returns the mask that Keras keeps for its input, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True

    def call(self, x: jax.Array, mask: jax.Array | None = None) -> Any:
        return mask


class SetMask(keras.Layer):
    """Returns its input, for which Keras keeps a mask from then on."""

    def __init__(self, mask: jax.Array | None) -> None:
        super().__init__()
        self._mask = mask

    def call(self, x: jax.Array) -> Any:
        return x

    def compute_mask(self, inputs: jax.Array, previous_mask: jax.Array | None) -> Any:
        return self._mask
