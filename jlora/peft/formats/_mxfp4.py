"""MXFP4, as gpt-oss ships its experts."""

from collections.abc import Iterator

import numpy as np

from ..._quantized import MXFP4
from ._codes import Codes
from ._format import Format, Parameter, register
from ._tensors import Unreadable


@register("mxfp4")
class Mxfp4(Format):
    """Blocks (experts, rows, blocks, 16) of two codes a byte, the first in the low bits."""

    def read(self, module: str, parameter: str, shape: tuple[int, ...]) -> Codes | None:
        """Reads a parameter that has `_blocks`."""
        blocks, scales = (f"{module}.{parameter}_{kind}" for kind in ("blocks", "scales"))
        if blocks not in self.tensors:
            return None
        *lead, inputs = shape
        if inputs % 32:
            raise Unreadable(f"{blocks}: {inputs} inputs are no multiple of 32")
        pairs = self.tensors.read(blocks, ("U8",), (*lead, inputs // 32, 16))
        scale = self.tensors.read(scales, ("U8",), (*lead, inputs // 32))
        if (scale == 255).any():
            raise Unreadable(f"{scales}: has values that are NaN")
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(shape)
        return Codes(MXFP4(), codes, scale)

    def find(self) -> Iterator[Parameter]:
        """Yields the parameters that have `_blocks`."""
        for name in self.tensors:
            if name.endswith("_blocks"):
                module, _, parameter = name.removesuffix("_blocks").rpartition(".")
                shape = self.tensors.shape(name)
                if len(shape) != 4 or 0 in shape:
                    raise Unreadable(f"{name}: expected (experts, rows, blocks, 16), got {shape}")
                yield module, parameter, (*shape[:2], 32 * shape[2])
