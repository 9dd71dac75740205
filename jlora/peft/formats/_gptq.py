"""GPTQ: integers of 4 bits in groups of inputs."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...quantized import Int4
from ._format import Format, register
from ._stored import Stored
from ._tensors import FLOATS, Tensors, Unreadable, integer, nibbles


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | None:
    """W = s·(q - z), q along the inputs in 32-bit words and z along the outputs.

    `checkpoint_format` "gptq" stores z - 1, "gptq_v2" z.
    """
    if parameter != "weight" or f"{module}.qweight" not in tensors:
        return None
    integer(config, "bits", (4,))
    if config.get("desc_act") not in (None, False):
        raise Unreadable(
            f"{module}: `desc_act` reorders its inputs by activation, so that groups are not next "
            "to each other, which is not supported"
        )
    version = integer(
        {"checkpoint_format": "gptq"} | config, "checkpoint_format", ("gptq", "gptq_v2")
    )
    outputs, inputs = shape
    if inputs % 8 or outputs % 8:
        raise Unreadable(f"{module}: {shape} is no multiple of 8, as 32-bit words are")
    groups = (tensors.shape(f"{module}.scales") or (0,))[0]
    if groups < 1 or inputs % groups:
        raise Unreadable(f"{module}.scales: {groups} groups do not divide {inputs} inputs")
    codes = nibbles(tensors.read(f"{module}.qweight", ("I32",), (inputs // 8, outputs)), 0)
    zeros = tensors.read(f"{module}.qzeros", ("I32",), (groups, outputs // 8))
    if version == "gptq":
        zeros = (zeros.view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
    scale = tensors.read(f"{module}.scales", FLOATS, (groups, outputs))
    if f"{module}.g_idx" in tensors:
        order = tensors.read(f"{module}.g_idx", ("I32",), (inputs,))
        if not np.array_equal(order, np.arange(inputs) // (inputs // groups)):
            raise Unreadable(f"{module}.g_idx: reorders its inputs, which is not supported")
    return affine(module, inputs // groups, codes.T, scale.T, nibbles(zeros, 1).T)


def find(tensors: Tensors) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Modules with codes, whose words are along the inputs."""
    for name in tensors:
        if name.endswith(".qweight"):
            rows, outputs = tensors.matrix(name)
            yield name.removesuffix(".qweight"), "weight", (outputs, 8 * rows)


def affine(
    module: str, group: int, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None
) -> Stored:
    """Codes (outputs, inputs), and scales and zero points (outputs, groups)."""
    if not np.isfinite(scale.astype(np.float32)).all():
        raise Unreadable(f"{module}: has scales that are not finite")
    fits = [n for n in Int4.legal if group % n == 0]
    if not fits:
        raise Unreadable(f"{module}: groups of {group} are no multiple of {Int4.legal[0]}")
    part = max(fits)  # of a longer group all parts have the same scale
    scale = np.repeat(scale, group // part, 1)
    zero = None if zero is None else np.repeat(zero, group // part, 1)
    return Stored(Int4(group=part), codes, scale, zero)


register(Format("gptq", find, read))
