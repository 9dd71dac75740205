"""AWQ: integers of 4 bits in groups of inputs."""

from collections.abc import Iterator
from typing import Any

from ._affine import affine
from ._format import Format, register
from ._stored import Dense, Stored
from ._tensors import FLOATS, Tensors, Unreadable, integer, unpacked

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which code of a word is that of each of 8 outputs


def read(
    tensors: Tensors, config: dict[str, Any], module: str, parameter: str, shape: tuple[int, ...]
) -> Stored | Dense | None:
    """W = s·(q - z), q and z along the outputs in 32-bit words."""
    if parameter != "weight" or f"{module}.qweight" not in tensors:
        return None
    integer(config, "bits", (4,))
    integer({"version": "gemm"} | config, "version", ("gemm", "GEMM"))
    outputs, inputs = shape
    if outputs % 8:
        raise Unreadable(f"{module}: {outputs} outputs are no multiple of 8, as 32-bit words are")
    groups = (tensors.shape(f"{module}.scales") or (0,))[0]
    words = tensors.read(f"{module}.qweight", ("I32",), (inputs, outputs // 8))
    zeros = tensors.read(f"{module}.qzeros", ("I32",), (groups, outputs // 8))
    scale = tensors.read(f"{module}.scales", FLOATS, (groups, outputs))
    codes, zeros = (unpacked(x, 1, order=ORDER).T for x in (words, zeros))
    return affine(module, 4, codes, scale.T, zeros, None, [config.get("group_size")])


def find(tensors: Tensors, config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Modules with codes, whose words are along the outputs."""
    del config
    for name in tensors:
        if name.endswith(".qweight"):
            inputs, columns = tensors.matrix(name)
            yield name.removesuffix(".qweight"), "weight", (8 * columns, inputs)


register(Format("awq", find, read))
