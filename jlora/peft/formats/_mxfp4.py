"""MXFP4, the format of gpt-oss's experts."""

from typing import ClassVar

import numpy as np

from ..._quantized import MXFP4
from ._codes import Codes
from ._format import Format, Unreadable, register


@register("mxfp4")
class Mxfp4(Format):
    """Blocks (experts, rows, blocks, 16): two codes in each byte, the first in the low bits."""

    marks: ClassVar = {"_blocks": ""}

    def read(self, name: str) -> Codes:
        """Reads a parameter that has `_blocks`."""
        shape = self.tensors.shape(f"{name}_blocks")
        if len(shape) != 4 or 0 in shape or shape[3] != 16:
            raise Unreadable(f"{name}_blocks", f"expected (experts, rows, blocks, 16), got {shape}")
        pairs = self.tensors.read(f"{name}_blocks", ("U8",), shape)
        scale = self.tensors.read(f"{name}_scales", ("U8",), shape[:3])
        if (scale == 255).any():
            raise Unreadable(f"{name}_scales", "has values that are NaN")
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(*shape[:2], -1)
        return Codes(MXFP4(), codes, scale)
