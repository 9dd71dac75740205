"""bitsandbytes, as `transformers` writes it: NF4, FP4, and 8 bits by row."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..._quantized import DYNAMIC, FP4, NF4, Int8
from .._file import brief, parse
from ._codes import Codes
from ._format import Format, Parameter, register
from ._tensors import Unreadable

STATE = "quant_state.bitsandbytes__"
SCHEMES: dict[str, Any] = {"nf4": NF4, "fp4": FP4}
GROUP = 256
LIMIT = 10_000  # bytes of a state


@register("bitsandbytes")
class BitsAndBytes(Format):
    """Codes of 4 bits have a state in JSON; codes of 8 bits have the maxima of their rows."""

    def read(self, module: str, parameter: str, shape: tuple[int, ...]) -> Codes | None:
        """Reads a parameter that has a state, or whose tensor is in int8."""
        key, tensors = f"{module}.{parameter}", self.tensors
        states = [kind for kind in SCHEMES if f"{key}.{STATE}{kind}" in tensors]
        if len(states) > 1:
            raise Unreadable(f"{key}: has the states of {' and '.join(states)}")
        if states:
            return self._four_bits(key, states[0], shape)
        kind = tensors.dtype(key) if key in tensors else None
        if kind == "I8":
            return self._eight_bits(module, key, shape)
        if f"{key}.absmax" in tensors or kind == "U8":
            raise Unreadable(f"{key}: is of 4 bits, but has no {key}.{STATE}nf4 or fp4")
        return None

    def find(self) -> Iterator[Parameter]:
        """Yields the parameters with a state, which says their shape, and those with row maxima."""
        for name in self.tensors:
            key, _, kind = name.partition(f".{STATE}")
            module, _, parameter = key.rpartition(".")
            if kind in SCHEMES:
                shape = self._state(name).get("shape")
                if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_side, shape)):
                    raise Unreadable(f"{name}: `shape` is {brief(shape)}")
                yield module, parameter, tuple(shape)
            elif module and name == f"{module}.SCB":
                yield module, "weight", self.tensors.matrix(f"{module}.weight")

    def _eight_bits(self, module: str, key: str, shape: tuple[int, ...]) -> Codes:
        order = f"{module}.weight_format"
        if order in self.tensors and (got := int(self.tensors.read(order, ("U8",), ()).item())):
            raise Unreadable(f"{order}: expected 0, rows as they are; got {got}")
        codes = self.tensors.read(key, ("I8",), shape)
        return Codes(Int8(), codes, self._finite(f"{module}.SCB", shape[:1]))

    def _four_bits(self, key: str, kind: str, shape: tuple[int, ...]) -> Codes:
        state = self._state(f"{key}.{STATE}{kind}")
        _check_state(state, f"{key}.{STATE}{kind}", kind, shape)
        size, block, dtype = int(np.prod(shape)), state["blocksize"], state["dtype"]
        packed, half = self.tensors.bytes(key), -(-size // 2)
        if packed.size != half:
            raise Unreadable(f"{key}: expected {half} bytes for {shape}, got {packed.size}")
        codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[:size].reshape(shape)
        scheme = SCHEMES[kind](block=block, double=False)
        table = self.tensors.read(f"{key}.quant_map", ("F32",), (16,))
        if not np.array_equal(table, scheme.table):
            raise Unreadable(f"{key}.quant_map: is not the table of {kind}")
        blocks = -(-size // block)
        if "nested_blocksize" not in state:
            return Codes(scheme, codes, self._finite(f"{key}.absmax", (blocks,)), dtype=dtype)
        absmax = self.tensors.read(f"{key}.absmax", ("U8",), (blocks,))
        group, offset = state["nested_blocksize"], np.float32(state["nested_offset"])
        of_groups = self._finite(f"{key}.nested_absmax", (-(-blocks // group),))
        numbers = self._finite(f"{key}.nested_quant_map", (256,))
        if group == GROUP and np.array_equal(numbers, DYNAMIC):
            scheme = SCHEMES[kind](block=block, double=True)
            return Codes(scheme, codes, absmax, nested=(of_groups, offset), dtype=dtype)
        each = np.repeat(of_groups, group)[:blocks]
        return Codes(scheme, codes, numbers[absmax] * each + offset, dtype=dtype)

    def _finite(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        x = self.tensors.read(name, ("F32",), shape)
        if not np.isfinite(x).all():
            raise Unreadable(f"{name}: has values that are not finite")
        return x

    def _state(self, name: str) -> dict[str, Any]:
        data = self.tensors.bytes(name)
        if data.size > LIMIT:
            raise Unreadable(f"{name}: expected at most {LIMIT} bytes, got {data.size}")
        try:
            return parse(data.tobytes(), name)
        except ValueError as e:
            raise Unreadable(str(e)) from None


def _check_state(state: dict[str, Any], name: str, kind: str, shape: tuple[int, ...]) -> None:
    legal = {
        "quant_type": lambda x: x == kind,
        "blocksize": lambda x: type(x) is int and x in (32, 64, 128, 256, 512, 1024, 2048, 4096),
        "dtype": lambda x: x in ("float32", "bfloat16", "float16"),
        "shape": lambda x: x == list(shape),
    }
    if "nested_blocksize" in state or "nested_offset" in state:
        legal["nested_blocksize"] = lambda x: type(x) is int and 1 <= x <= 4096
        legal["nested_dtype"] = lambda x: x == "float32"
        legal["nested_offset"] = lambda x: type(x) in (int, float) and abs(x) < 1e38
    for field, is_legal in legal.items():
        if not is_legal(state.get(field)):
            raise Unreadable(f"{name}: `{field}` is {brief(state.get(field))}")


def _is_side(n: Any) -> bool:
    return type(n) is int and 0 < n < 2**40
