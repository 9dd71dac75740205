"""Layers that read and set the mask that Keras keeps for an array."""

from typing import Any

import keras


class GetMask(keras.Layer):
    """Returns the mask that Keras keeps for its input, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.supports_masking = True

    def call(self, x: Any, mask: Any = None) -> Any:
        return mask


class SetMask(keras.Layer):
    """Returns its input, for which Keras keeps a mask from then on."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        self._mask = mask

    def call(self, x: Any) -> Any:
        return x

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return self._mask
