"""compressed-tensors, of llm-compressor and vLLM: integers of 4 and 8 bits, and FP8."""

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from ..._errors import shorten
from ._affine import read_affine, unpack
from ._codes import Codes, Dense
from ._format import FLOATS, Format, Unreadable, refuse_field, register
from ._fp8 import Block, read_float8

KNOWN = ("dense", "float-quantized", "int-quantized", "mixed-precision", "naive-quantized")
KNOWN += ("pack-quantized",)
BITS = (4, 8)  # of packed codes
MOST = 1000  # groups of modules


@register("compressed-tensors")
class CompressedTensors(Format):
    """W = s·(q - z), with q packed or one in each byte."""

    marks: ClassVar = {".weight_packed": ".weight"}
    dtypes = ("I8", "F8_E4M3")

    def find(self) -> Iterator[str]:
        """Yields the weights whose codes are packed, or one in each byte."""
        yield from (name for name in super().find() if name.endswith(".weight"))

    def read(self, name: str) -> Codes | Dense:
        """Reads the weight of a module that has `weight_packed`, or codes as `weight`."""
        self._check()
        self.tensors.skip_activations(name)
        if f"{name}_packed" in self.tensors:
            return self._packed(name)
        if self.tensors.dtype(name) == "I8":
            codes = self.tensors.read_matrix(name, ("I8",))
            return self._integers(name, 8, codes.view(np.uint8) ^ 128)
        zero = f"{name}_zero_point"  # some versions wrote one, of zeros
        if zero in self.tensors and self.tensors.bytes(zero).any():
            raise Unreadable(zero, f"expected zeros for {name} in FP8")
        return read_float8(self.tensors, name, f"{name}_scale", self._blocks)

    def _packed(self, name: str) -> Codes | Dense:
        outputs, inputs = map(int, self.tensors.read(f"{name}_shape", ("I64", "I32"), (2,)))
        words = self.tensors.matrix(f"{name}_packed")
        forms = {bits: (outputs, -(-inputs * bits // 32)) for bits in BITS}
        fits = [bits for bits, form in forms.items() if form == words]
        if not fits:
            wanted = " or ".join(f"{bits} bits, shape {form}" for bits, form in forms.items())
            raise Unreadable(f"{name}_packed", f"expected {wanted}; got {words}")
        each = [weights.get("num_bits") for weights in self._weights]
        known = each if each and None not in each else BITS
        found = [bits for bits in fits if bits in known]
        if len(found) != 1:  # up to 4 inputs fit one word in either
            said = f"`num_bits` of the quantization is {', '.join(map(shorten, each[:9])) or None}"
            why = f"its shape {words} is that of {' or '.join(map(str, fits))} bits, and {said}"
            raise Unreadable(f"{name}_packed", why)
        codes = unpack(self.tensors.read(f"{name}_packed", ("I32",)), 1, found[0])
        return self._integers(name, found[0], codes[:, :inputs])

    def _integers(self, name: str, bits: int, codes: np.ndarray) -> Codes | Dense:
        """Reads the scales, zero points and order of unsigned codes."""
        rows = len(codes)
        tensors = self.tensors
        scale = tensors.read(f"{name}_scale", FLOATS)
        if scale.size == 1 or scale.shape == (rows,):  # for the tensor, or for each output
            scale = np.broadcast_to(scale.reshape(-1, 1), (rows, 1))
        if scale.ndim != 2 or len(scale) != rows:
            why = f"expected scales for groups of {rows} outputs, got {scale.shape}"
            raise Unreadable(f"{name}_scale", why)
        order = None
        if f"{name}_g_idx" in tensors:
            order = tensors.read(f"{name}_g_idx", ("I32", "I64"), codes.shape[1:])
            order = None if (order == -1).any() else order  # -1 means not set
        zero = self._zero(f"{name}_zero_point", bits, scale.shape)
        sizes = [weights.get("group_size") for weights in self._weights]
        sizes += [width for _, width in self._blocks]
        return read_affine(name.removesuffix(".weight"), bits, codes, scale, zero, order, sizes)

    def _zero(self, name: str, bits: int, shape: tuple[int, ...]) -> np.ndarray | None:
        """Reads the zero points for scales of `shape`, unsigned like the codes."""
        if name not in self.tensors:
            return None
        if self.tensors.dtype(name) == "I32":
            packed = (-(-shape[0] * bits // 32), *shape[1:])
            return unpack(self.tensors.read(name, ("I32",), packed), 0, bits)[: shape[0]]
        signed = self.tensors.read(name, ("I8",))
        if signed.size not in (1, shape[0] * shape[1]):
            raise Unreadable(name, f"expected one for each scale {shape}, got {signed.shape}")
        signed = np.broadcast_to(signed.reshape((1, 1) if signed.size == 1 else shape), shape)
        return (signed.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)

    # ----------------------------------------------------------------- what the configuration says

    def _check(self) -> None:
        """Raises if the configuration gives the tensors a meaning that is not supported."""
        formats = [self.config.get("format"), *(group.get("format") for group in self._groups)]
        if odd := [x for x in formats if x is not None and x not in KNOWN]:
            why = f"expected one of {', '.join(KNOWN)}; got {shorten(odd[0])}"
            raise refuse_field("format", why)
        sparse = self.config.get("sparsity_config") or {}
        if isinstance(sparse, dict) and (kind := sparse.get("format", "dense")) != "dense":
            raise refuse_field("sparsity_config", f"{shorten(kind)} is not supported")
        if self.config.get("transform_config"):
            raise refuse_field("transform_config", "rotated weights are not supported")

    @functools.cached_property
    def _groups(self) -> list[dict[str, Any]]:
        given = self.config.get("config_groups")
        each = given.values() if isinstance(given, dict) else ()
        found = [group for group in each if isinstance(group, dict)]
        if len(found) > MOST:
            raise refuse_field("config_groups", f"expected at most {MOST}, got {len(found)}")
        return found

    @functools.cached_property
    def _weights(self) -> list[dict[str, Any]]:
        found = (group.get("weights") for group in self._groups)
        return [weights for weights in found if isinstance(weights, dict)]

    @functools.cached_property
    def _blocks(self) -> list[Block]:
        """Lists the block sizes in the configuration."""
        found = list[Block]()
        for weights in self._weights:
            given = weights.get("block_structure")
            pair = given.split("x") if isinstance(given, str) else given
            if isinstance(pair, list) and len(pair) == 2 and all(str(n).isdecimal() for n in pair):
                a, b = map(int, pair)
                found += [(a, b)] if a * b else []
        return found
