"""GPTQ: 4-bit or 8-bit integers in groups of inputs."""

import numpy as np

from ._affine import read_affine
from ._awq import MARKS
from ._codes import Codes, Dense
from ._format import Format, register
from ._tensors import FLOATS, unpack

ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}  # 1 in each code of a word


@register("gptq")
class Gptq(Format):
    """W = s·(q - z). A 32-bit word of q has neighboring inputs, a word of z neighboring outputs.

    `checkpoint_format` "gptq" stores z - 1, "gptq_v2" z. With `desc_act` the inputs of a group are
    not neighbors: `g_idx` has the group of each input.
    """

    marks = MARKS

    def read(self, name: str) -> Codes | Dense:
        """Reads the weight of a module that has `qweight`."""
        module = name.removesuffix(".weight")
        tensors = self.tensors
        config = self.config
        bits = self.field("bits", tuple(ONES))
        version = self.field("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        codes = unpack(tensors.read_matrix(f"{module}.qweight", ("I32",)), 0, bits).T
        outputs, inputs = codes.shape
        count = 32 // bits
        groups, _ = tensors.matrix(f"{module}.scales")
        zeros = tensors.read(f"{module}.qzeros", ("I32",), (groups, -(-outputs // count)))
        if version == "gptq":
            zeros = (zeros.view(np.uint32) + ONES[bits]).view(np.int32)
        scale = tensors.read(f"{module}.scales", FLOATS, (groups, outputs))
        order = None
        if f"{module}.g_idx" in tensors or config.get("desc_act") not in (None, False):
            order = tensors.read(f"{module}.g_idx", ("I32",), (inputs,))
        zeros = unpack(zeros, 1, bits).T[:outputs]
        return read_affine(module, bits, codes, scale.T, zeros, order, [config.get("group_size")])
