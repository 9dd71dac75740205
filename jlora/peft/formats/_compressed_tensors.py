"""compressed-tensors, of llm-compressor and vLLM: integers of 4 and 8 bits, and FP8."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .._file import brief
from ._affine import affine
from ._codes import Codes, Dense
from ._format import Format, Parameter, register
from ._fp8 import Block, read_float8
from ._tensors import FLOATS, Unreadable, unpack

KNOWN = ("dense", "float-quantized", "int-quantized", "mixed-precision", "naive-quantized")
KNOWN += ("pack-quantized",)
BITS = (4, 8)  # of packed codes


@register("compressed-tensors")
class CompressedTensors(Format):
    """W = s·(q - z), where q is packed or in a byte each."""

    def read(self, module: str, parameter: str, shape: tuple[int, ...]) -> Codes | Dense | None:
        """Reads the weight of a module that has `weight_packed`, or codes as `weight`."""
        packed, key, tensors = f"{module}.weight_packed", f"{module}.weight", self.tensors
        kind = tensors.dtype(key) if key in tensors else ""
        if parameter != "weight" or not (packed in tensors or kind in ("I8", "F8_E4M3")):
            return None
        self._check()
        tensors.skip_activations(module)
        if packed in tensors:
            return self._packed(module, shape)
        codes = tensors.read(key, (kind,), shape)
        if kind == "I8":
            return self._integers(module, 8, codes.view(np.uint8) ^ 128)
        zero = f"{key}_zero_point"  # some versions wrote one, of zeros
        if zero in tensors and tensors.bytes(zero).any():
            raise Unreadable(f"{zero}: expected zeros for {key} in FP8")
        return read_float8(tensors, key, f"{key}_scale", self._blocks())

    def find(self) -> Iterator[Parameter]:
        """Yields the weights whose codes are packed, or in a byte each."""
        for name in self.tensors:
            module, _, parameter = name.rpartition(".")
            if parameter == "weight_packed":
                self._check()
                shape = self.tensors.read(f"{module}.weight_shape", ("I64", "I32"), (2,))
                yield module, "weight", tuple(map(int, shape))
            elif parameter == "weight" and self.tensors.dtype(name) in ("I8", "F8_E4M3"):
                yield module, "weight", self.tensors.matrix(name)

    def _packed(self, module: str, shape: tuple[int, ...]) -> Codes | Dense:
        outputs, inputs = shape
        found = tuple(map(int, self.tensors.read(f"{module}.weight_shape", ("I64", "I32"), (2,))))
        if found != shape:
            raise Unreadable(f"{module}.weight_shape: expected {shape}, got {found}")
        words = self.tensors.shape(packed := f"{module}.weight_packed")
        forms = {(outputs, -(-inputs * bits // 32)): bits for bits in BITS}
        if words not in forms:
            wanted = " or ".join(f"{bits} bits, shape {form}" for form, bits in forms.items())
            raise Unreadable(f"{packed}: expected {wanted}; got {words}")
        bits = forms[words]
        codes = unpack(self.tensors.read(packed, ("I32",), words), 1, bits)
        return self._integers(module, bits, codes[:, :inputs])

    def _integers(self, module: str, bits: int, codes: np.ndarray) -> Codes | Dense:
        """Reads scales, zero points and order of unsigned codes."""
        name, rows, tensors = f"{module}.weight_scale", len(codes), self.tensors
        shape = tensors.shape(name)
        scale = tensors.read(name, FLOATS, shape)
        if scale.size == 1 or shape == (rows,):  # of the tensor, or of each output
            scale = np.broadcast_to(scale.reshape(-1, 1), (rows, 1))
        if scale.ndim != 2 or len(scale) != rows:
            raise Unreadable(
                f"{name}: expected scales of groups of each of {rows} outputs, got {shape}"
            )
        order, key = None, f"{module}.weight_g_idx"
        if key in tensors:
            order = tensors.read(key, ("I32", "I64"), codes.shape[1:])
            order = None if (order == -1).any() else order  # as it was before it was known
        zero = self._zero(f"{module}.weight_zero_point", bits, scale.shape)
        sizes = [weights.get("group_size") for weights in self._weights()]
        return affine(module, bits, codes, scale, zero, order, sizes)

    def _zero(self, name: str, bits: int, shape: tuple[int, ...]) -> np.ndarray | None:
        """Reads the zero points of scales of a shape, unsigned as the codes are."""
        if name not in self.tensors:
            return None
        if self.tensors.dtype(name) == "I32":
            packed = (-(-shape[0] * bits // 32), *shape[1:])
            return unpack(self.tensors.read(name, ("I32",), packed), 0, bits)[: shape[0]]
        signed = self.tensors.read(name, ("I8",), self.tensors.shape(name))
        if signed.size not in (1, shape[0] * shape[1]):
            raise Unreadable(f"{name}: expected one for each of {shape} scales, got {signed.shape}")
        signed = np.broadcast_to(signed.reshape((1, 1) if signed.size == 1 else shape), shape)
        return (signed.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)

    # ----------------------------------------------------------------- what the configuration says

    def _check(self) -> None:
        """Raises where tensors mean something else than they are read as."""
        formats = [self.config.get("format"), *(group.get("format") for group in self._groups())]
        if odd := [x for x in formats if x is not None and x not in KNOWN]:
            raise Unreadable(
                f"`format` of the quantization: expected one of {', '.join(KNOWN)}; "
                f"got {brief(odd[0])}"
            )
        sparse = self.config.get("sparsity_config") or {}
        if isinstance(sparse, dict) and (kind := sparse.get("format", "dense")) != "dense":
            raise Unreadable(
                f"`sparsity_config` of the quantization: {brief(kind)} is not supported"
            )
        if self.config.get("transform_config"):
            raise Unreadable(
                "`transform_config` of the quantization: turned weights are not supported"
            )

    def _groups(self) -> list[dict[str, Any]]:
        found = self.config.get("config_groups")
        return [g for g in found.values() if isinstance(g, dict)] if isinstance(found, dict) else []

    def _weights(self) -> list[dict[str, Any]]:
        found = (group.get("weights") for group in self._groups())
        return [weights for weights in found if isinstance(weights, dict)]

    def _blocks(self) -> list[Block]:
        """The sizes of blocks that the configuration lists."""
        given = [weights.get("block_structure") for weights in self._weights()]
        each = (x.split("x") if isinstance(x, str) else x for x in given)
        pairs = (x for x in each if isinstance(x, list) and len(x) == 2)
        return [
            (int(a), int(b))
            for a, b in pairs
            if str(a).isdecimal() and str(b).isdecimal() and int(a) * int(b)
        ]
