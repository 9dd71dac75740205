"""FP8 in blocks, as DeepSeek and Qwen ship it, or with a scale of each tensor or output."""

from collections.abc import Iterator
from typing import Any

from ._float8 import float8
from ._format import Format, register
from ._stored import Dense, Stored
from ._tensors import Tensors, Unreadable


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | Dense | None:
    """W = q·s, where `weight_scale_inv` is s in spite of its name."""
    key = f"{module}.{parameter}"
    if key not in tensors or tensors.dtype(key) != "F8_E4M3":
        return None
    tensors.read(key, ("F8_E4M3",), shape)
    said = config.get("weight_block_size")
    if said is not None and not _is_block(said):
        raise Unreadable(
            f"`weight_block_size` of the quantization: expected two numbers or null, got {said!r}"
        )
    tensors.leave_activations(module)
    name = f"{key}_scale" if f"{key}_scale" in tensors else f"{key}_scale_inv"
    return float8(tensors, key, name, [] if said is None else [(said[0], said[1])])


def _is_block(said: Any) -> bool:
    return isinstance(said, list) and len(said) == 2 and all(type(n) is int and n > 0 for n in said)


def find(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Tensors in FP8."""
    del config
    for name in tensors:
        if tensors.dtype(name) == "F8_E4M3":
            module, _, parameter = name.rpartition(".")
            yield module, parameter, tensors.matrix(name)


register(Format("fp8", find, read))
register(Format("fbgemm_fp8", find, read))
