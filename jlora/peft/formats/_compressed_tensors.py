"""compressed-tensors, of llm-compressor and vLLM: integers of 4 bits, and FP8."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...quantized import FP8
from ._format import Format, register
from ._gptq import affine
from ._stored import Stored
from ._tensors import FLOATS, Tensors, Unreadable, nibbles


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | None:
    """W = s·(q - z), q and z as they are plus 8."""
    del config
    if parameter != "weight":
        return None
    if f"{module}.weight_packed" in tensors:
        return _packed(tensors, module, shape)
    key = f"{module}.weight"
    if key not in tensors or tensors.dtype(key) != "F8_E4M3":
        return None
    codes = tensors.read(key, ("F8_E4M3",), shape)
    scale = tensors.read(f"{module}.weight_scale", FLOATS, (shape[0], 1))
    if not np.isfinite(scale.astype(np.float32)).all():
        raise Unreadable(f"{module}.weight_scale: has values that are not finite")
    return Stored(FP8(block=None), codes, scale.astype(np.float32))


def _packed(tensors: Tensors, module: str, shape: tuple[int, ...]) -> Stored:
    outputs, inputs = shape
    said = tensors.read(f"{module}.weight_shape", ("I64", "I32"), (2,))
    if tuple(said) != shape:
        raise Unreadable(f"{module}.weight_shape: expected {shape}, got {tuple(map(int, said))}")
    words = tensors.shape(f"{module}.weight_packed")
    if words != (outputs, -(-inputs // 8)):
        raise Unreadable(
            f"{module}.weight_packed: expected 4 bits, shape {(outputs, -(-inputs // 8))}; "
            f"got {words}"
        )
    codes = nibbles(tensors.read(f"{module}.weight_packed", ("I32",), words), 1)[:, :inputs]
    groups = (*tensors.shape(f"{module}.weight_scale"), 0, 0)[1]
    if groups < 1 or inputs % groups:
        raise Unreadable(f"{module}.weight_scale: {groups} groups do not divide {inputs} inputs")
    scale = tensors.read(f"{module}.weight_scale", FLOATS, (outputs, groups))
    zero = None
    if f"{module}.weight_zero_point" in tensors:
        rows = -(-outputs // 8)
        zero = tensors.read(f"{module}.weight_zero_point", ("I32",), (rows, groups))
        zero = nibbles(zero, 0)[:outputs]
    return affine(module, inputs // groups, codes, scale, zero)


def find(tensors: Tensors) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Modules with codes of 4 bits, and weights in FP8."""
    for name in tensors:
        module, _, parameter = name.rpartition(".")
        if parameter == "weight_packed":
            shape = tensors.read(f"{module}.weight_shape", ("I64", "I32"), (2,))
            yield module, "weight", tuple(map(int, shape))
        elif parameter == "weight" and tensors.dtype(name) == "F8_E4M3":
            yield module, "weight", tensors.matrix(name)


register(Format("compressed-tensors", find, read))
