"""bitsandbytes, as written by `transformers`: NF4, FP4, and 8 bits with a scale for each row."""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from ..._errors import shorten
from ..._quantized import DYNAMIC, FP4, NF4, Int8
from .._file import parse
from ._codes import Codes
from ._format import Format, Unreadable, register

STATE = "quant_state.bitsandbytes__"
SCHEMES: dict[str, Any] = {"nf4": NF4, "fp4": FP4}
GROUP = 256
LIMIT = 10_000  # bytes of a state
LEGAL: dict[str, Callable[[Any], bool]] = {
    "blocksize": lambda x: type(x) is int and x in NF4.legal,
    "dtype": lambda x: x in ("float32", "bfloat16", "float16"),
    "shape": lambda x: (
        isinstance(x, list)
        and len(x) in (2, 3)
        and all(type(n) is int and 0 < n < 2**40 for n in x)
    ),
}
LEGAL_NESTED: dict[str, Callable[[Any], bool]] = {
    "nested_blocksize": lambda x: type(x) is int and 1 <= x <= 4096,
    "nested_dtype": lambda x: x == "float32",
    "nested_offset": lambda x: type(x) in (int, float) and abs(x) < 1e38,
}


@register("bitsandbytes")
class BitsAndBytes(Format):
    """4-bit codes come with a state in JSON, 8-bit codes with the maximum of each row."""

    marks: ClassVar = {".SCB": ".weight", ".absmax": "", **{f".{STATE}{k}": "" for k in SCHEMES}}
    keeps_axes = True

    def find(self) -> Iterator[str]:
        """Yields the parameters with a state or maxima, and weights that should have them."""
        yield from super().find()
        weights = (name for name in self.tensors if name.endswith(".weight"))
        yield from (name for name in weights if self.tensors.dtype(name) in ("I8", "U8"))

    def read(self, name: str) -> Codes:
        """Reads a parameter in 4 bits with a state, or in int8."""
        states = [kind for kind in SCHEMES if f"{name}.{STATE}{kind}" in self.tensors]
        if len(states) > 1:
            raise Unreadable(name, f"has the states of {' and '.join(states)}")
        if states:
            return self._four_bits(name, states[0])
        if f"{name}.absmax" in self.tensors or self.tensors.dtype(name) == "U8":
            raise Unreadable(name, f"has 4-bit codes, but no {name}.{STATE}nf4 or fp4")
        module = name.removesuffix(".weight")
        order = f"{name}_format"
        if order in self.tensors and (got := int(self.tensors.read(order, ("U8",), ()).item())):
            raise Unreadable(order, f"expected 0 (rows in order), got {got}")
        codes = self.tensors.read_matrix(name, ("I8",))
        return Codes(Int8(), codes, self._finite(f"{module}.SCB", codes.shape[:1]))

    def _four_bits(self, key: str, kind: str) -> Codes:
        state = self._read_state(f"{key}.{STATE}{kind}", kind)
        shape = tuple(state["shape"])
        block = state["blocksize"]
        dtype = state["dtype"]
        size = math.prod(shape)
        packed = self.tensors.bytes(key)
        half = -(-size // 2)
        if packed.size != half:
            raise Unreadable(key, f"expected {half} bytes for {shape}, got {packed.size}")
        codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:size].reshape(shape)
        scheme = SCHEMES[kind](block=block, double=False)
        table = self.tensors.read(f"{key}.quant_map", ("F32",), (16,))
        if not np.array_equal(table, scheme.table):
            raise Unreadable(f"{key}.quant_map", f"is not the table of {kind}")
        if len(shape) == 3 and size // shape[0] % block:
            raise Unreadable(key, f"blocks of {block} cross experts of {shape}")
        blocks = -(-size // block)
        if "nested_blocksize" not in state:
            return Codes(scheme, codes, self._finite(f"{key}.absmax", (blocks,)), dtype=dtype)
        absmax = self.tensors.read(f"{key}.absmax", ("U8",), (blocks,))
        group = state["nested_blocksize"]
        offset = np.asarray(state["nested_offset"], np.float32)
        of_groups = self._finite(f"{key}.nested_absmax", (-(-blocks // group),))
        numbers = self._finite(f"{key}.nested_quant_map", (256,))
        # A leaf has groups of scales and an offset for each expert; the file has them for all.
        if len(shape) == 2 and group == GROUP and np.array_equal(numbers, DYNAMIC):
            scheme = SCHEMES[kind](block=block, double=True)
            return Codes(scheme, codes, absmax, nested=(of_groups, offset), dtype=dtype)
        each = np.repeat(of_groups, group)[:blocks]
        return Codes(scheme, codes, numbers[absmax] * each + offset, dtype=dtype)

    def _finite(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.tensors.read_finite(name, ("F32",), shape)

    def _read_state(self, name: str, kind: str) -> dict[str, Any]:
        data = self.tensors.bytes(name)
        if data.size > LIMIT:
            raise Unreadable(name, f"expected at most {LIMIT} bytes, got {data.size}")
        try:
            state = parse(data.tobytes())
        except ValueError as e:
            raise Unreadable(name, str(e)) from None
        legal = LEGAL | {"quant_type": lambda x: x == kind}
        if "nested_blocksize" in state or "nested_offset" in state:
            legal |= LEGAL_NESTED
        for field, is_legal in legal.items():
            if not is_legal(state.get(field)):
                raise Unreadable(name, f"invalid `{field}` {shorten(state.get(field))}")
        return state
