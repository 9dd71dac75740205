"""GPTQ: integers of 4 or 8 bits in groups of inputs."""

from collections.abc import Iterator

import numpy as np

from ._affine import affine
from ._codes import Codes, Dense
from ._format import Format, Parameter, register
from ._tensors import FLOATS, Unreadable, unpack

ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}  # 1 in each code of a word


@register("gptq")
class Gptq(Format):
    """W = s·(q - z), where 32-bit words of q hold neighboring inputs, and those of z outputs.

    `checkpoint_format` "gptq" stores z - 1, "gptq_v2" z. With `desc_act` the inputs of a group are
    no neighbors: `g_idx` has the group of each input.
    """

    def read(self, module: str, parameter: str, shape: tuple[int, ...]) -> Codes | Dense | None:
        """Reads the weight of a module that has `qweight`."""
        tensors, config = self.tensors, self.config
        if parameter != "weight" or f"{module}.qweight" not in tensors:
            return None
        bits = self.field("bits", tuple(ONES))
        version = self.field("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        (outputs, inputs), count = shape, 32 // bits
        if inputs % count or outputs % count:
            raise Unreadable(f"{module}: {shape} is no multiple of {count}, as 32-bit words are")
        groups = (tensors.shape(f"{module}.scales") or (0,))[0]
        words = tensors.read(f"{module}.qweight", ("I32",), (inputs // count, outputs))
        zeros = tensors.read(f"{module}.qzeros", ("I32",), (groups, outputs // count))
        if version == "gptq":
            zeros = (zeros.view(np.uint32) + ONES[bits]).view(np.int32)
        scale = tensors.read(f"{module}.scales", FLOATS, (groups, outputs))
        order = None
        if f"{module}.g_idx" in tensors or config.get("desc_act") not in (None, False):
            order = tensors.read(f"{module}.g_idx", ("I32",), (inputs,))
        codes, zeros = unpack(words, 0, bits).T, unpack(zeros, 1, bits).T
        return affine(module, bits, codes, scale.T, zeros, order, [config.get("group_size")])

    def find(self) -> Iterator[Parameter]:
        """Yields the weights of modules that have `qweight`."""
        for name in self.tensors:
            if name.endswith(".qweight"):
                rows, outputs = self.tensors.matrix(name)
                inputs = 32 // self.field("bits", tuple(ONES)) * rows
                yield name.removesuffix(".qweight"), "weight", (outputs, inputs)
