"""GPTQ: integers of 4 or 8 bits in groups of inputs."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ._affine import affine
from ._format import Format, register
from ._stored import Dense, Stored
from ._tensors import FLOATS, Tensors, Unreadable, integer, unpacked

ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}  # 1 in each code of a word


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | Dense | None:
    """W = s·(q - z), q along the inputs in 32-bit words and z along the outputs.

    `checkpoint_format` "gptq" stores z - 1, "gptq_v2" z. The group of each input is in `g_idx`: by
    `desc_act` its inputs are not next to each other.
    """
    if parameter != "weight" or f"{module}.qweight" not in tensors:
        return None
    bits = integer(config, "bits", tuple(ONES))
    version = integer(
        {"checkpoint_format": "gptq"} | config, "checkpoint_format", ("gptq", "gptq_v2")
    )
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
    codes, zeros = unpacked(words, 0, bits).T, unpacked(zeros, 1, bits).T
    return affine(module, bits, codes, scale.T, zeros, order, [config.get("group_size")])


def find(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Modules with codes, whose words are along the inputs."""
    for name in tensors:
        if name.endswith(".qweight"):
            rows, outputs = tensors.matrix(name)
            inputs = 32 // integer(config, "bits", tuple(ONES)) * rows
            yield name.removesuffix(".qweight"), "weight", (outputs, inputs)


register(Format("gptq", find, read))
