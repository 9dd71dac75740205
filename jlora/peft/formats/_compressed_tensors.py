"""compressed-tensors, of llm-compressor and vLLM: integers of 4 and 8 bits, and FP8."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .._file import brief
from ._affine import affine
from ._float8 import Block, float8
from ._format import Format, register
from ._stored import Dense, Stored
from ._tensors import FLOATS, Tensors, Unreadable, unpacked

KNOWN = ("dense", "float-quantized", "int-quantized", "mixed-precision", "naive-quantized")
KNOWN += ("pack-quantized",)
BITS = (4, 8)  # of packed codes


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | Dense | None:
    """W = s·(q - z), q packed or in a byte each."""
    packed, key = f"{module}.weight_packed", f"{module}.weight"
    kind = tensors.dtype(key) if key in tensors else None
    if parameter != "weight" or not (packed in tensors or kind in ("I8", "F8_E4M3")):
        return None
    _check(config)
    tensors.leave_activations(module)
    if packed in tensors:
        return _packed(tensors, config, module, shape)
    codes = tensors.read(key, (kind or "",), shape)
    if kind == "I8":
        return _integers(tensors, config, module, 8, codes.view(np.uint8) ^ 128)
    zero = f"{key}_zero_point"  # some versions wrote one, of zeros
    if zero in tensors and tensors.bytes(zero).any():
        raise Unreadable(f"{zero}: expected zeros for {key} in FP8")
    return float8(tensors, key, f"{key}_scale", _blocks(config))


def _packed(
    tensors: Tensors, config: dict[str, Any], module: str, shape: tuple[int, ...]
) -> Stored | Dense:
    outputs, inputs = shape
    said = tensors.read(f"{module}.weight_shape", ("I64", "I32"), (2,))
    if tuple(said) != shape:
        raise Unreadable(f"{module}.weight_shape: expected {shape}, got {tuple(map(int, said))}")
    words = tensors.shape(packed := f"{module}.weight_packed")
    forms: dict[tuple[int, ...], int] = {(outputs, -(-inputs * bits // 32)): bits for bits in BITS}
    if words not in forms:
        wanted = " or ".join(f"{bits} bits, shape {form}" for form, bits in forms.items())
        raise Unreadable(f"{packed}: expected {wanted}; got {words}")
    bits = forms[words]
    codes = unpacked(tensors.read(packed, ("I32",), words), 1, bits)
    return _integers(tensors, config, module, bits, codes[:, :inputs])


def _integers(
    tensors: Tensors, config: dict[str, Any], module: str, bits: int, codes: np.ndarray
) -> Stored | Dense:
    """Unsigned codes with their scales, zero points and order."""
    name, rows = f"{module}.weight_scale", len(codes)
    scale, form = tensors.read(name, FLOATS, tensors.shape(name)), tensors.shape(name)
    if scale.size == 1 or form == (rows,):  # of the tensor, or of each output
        scale = np.broadcast_to(scale.reshape(-1, 1), (rows, 1))
    if scale.ndim != 2 or len(scale) != rows:
        raise Unreadable(f"{name}: expected scales of groups of each of {rows} outputs, got {form}")
    order, key = None, f"{module}.weight_g_idx"
    if key in tensors:
        order = tensors.read(key, ("I32", "I64"), codes.shape[1:])
        order = None if (order == -1).any() else order  # as it was before it was known
    zero = _zero(tensors, f"{module}.weight_zero_point", bits, scale.shape)
    sizes = [weights.get("group_size") for weights in _weights(config)]
    return affine(module, bits, codes, scale, zero, order, sizes)


def _zero(tensors: Tensors, name: str, bits: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """Zero points of scales of `shape`, unsigned as the codes are."""
    if name not in tensors:
        return None
    if tensors.dtype(name) == "I32":
        words = tensors.read(name, ("I32",), (-(-shape[0] * bits // 32), *shape[1:]))
        return unpacked(words, 0, bits)[: shape[0]]
    signed = tensors.read(name, ("I8",), tensors.shape(name))
    if signed.size not in (1, shape[0] * shape[1]):
        raise Unreadable(f"{name}: expected one for each of {shape} scales, got {signed.shape}")
    signed = np.broadcast_to(
        signed.reshape(-1, 1) if signed.size == 1 else signed.reshape(shape), shape
    )
    return (signed.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)


def _check(config: dict[str, Any]) -> None:
    """Raises where tensors mean something else than they are read as."""
    formats = [config.get("format"), *(group.get("format") for group in _groups(config))]
    if odd := [x for x in formats if x is not None and x not in KNOWN]:
        raise Unreadable(
            f"`format` of the quantization: expected one of {', '.join(KNOWN)}; got {brief(odd[0])}"
        )
    sparse = config.get("sparsity_config") or {}
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise Unreadable(
            f"`sparsity_config` of the quantization: {brief(sparse.get('format'))} is not supported"
        )
    if config.get("transform_config"):
        raise Unreadable("`transform_config` of the quantization: turned weights are not supported")


def _groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    found = config.get("config_groups")
    return [g for g in found.values() if isinstance(g, dict)] if isinstance(found, dict) else []


def _weights(config: dict[str, Any]) -> list[dict[str, Any]]:
    found = (group.get("weights") for group in _groups(config))
    return [weights for weights in found if isinstance(weights, dict)]


def _blocks(config: dict[str, Any]) -> list[Block]:
    """The sizes of blocks that the configuration speaks of."""
    said = [weights.get("block_structure") for weights in _weights(config)]
    each = (x.split("x") if isinstance(x, str) else x for x in said)
    pairs = (x for x in each if isinstance(x, list) and len(x) == 2)
    return [
        (int(a), int(b))
        for a, b in pairs
        if str(a).isdecimal() and str(b).isdecimal() and int(a) * int(b)
    ]


def find(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Modules with codes that are packed, or in a byte each."""
    for name in tensors:
        module, _, parameter = name.rpartition(".")
        if parameter == "weight_packed":
            _check(config)
            shape = tensors.read(f"{module}.weight_shape", ("I64", "I32"), (2,))
            yield module, "weight", tuple(map(int, shape))
        elif parameter == "weight" and tensors.dtype(name) in ("I8", "F8_E4M3"):
            yield module, "weight", tensors.matrix(name)


register(Format("compressed-tensors", find, read))
