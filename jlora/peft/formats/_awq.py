"""AWQ: integers of 4 bits in groups of inputs."""

from collections.abc import Iterator

from ._affine import affine
from ._codes import Codes, Dense
from ._format import Format, Parameter, register
from ._tensors import FLOATS, Unreadable, unpack

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which code of a word is that of each of 8 outputs


@register("awq")
class Awq(Format):
    """W = s·(q - z), where 32-bit words of q and z hold 8 neighboring outputs."""

    def read(self, module: str, parameter: str, shape: tuple[int, ...]) -> Codes | Dense | None:
        """Reads the weight of a module that has `qweight`."""
        tensors = self.tensors
        if parameter != "weight" or f"{module}.qweight" not in tensors:
            return None
        self.field("bits", (4,))
        self.field("version", ("gemm", "GEMM"), "gemm")
        outputs, inputs = shape
        if outputs % 8:
            raise Unreadable(
                f"{module}: {outputs} outputs are no multiple of 8, as 32-bit words are"
            )
        groups = (tensors.shape(f"{module}.scales") or (0,))[0]
        words = tensors.read(f"{module}.qweight", ("I32",), (inputs, outputs // 8))
        zeros = tensors.read(f"{module}.qzeros", ("I32",), (groups, outputs // 8))
        scale = tensors.read(f"{module}.scales", FLOATS, (groups, outputs))
        codes, zeros = (unpack(x, 1, order=ORDER).T for x in (words, zeros))
        return affine(module, 4, codes, scale.T, zeros, None, [self.config.get("group_size")])

    def find(self) -> Iterator[Parameter]:
        """Yields the weights of modules that have `qweight`."""
        for name in self.tensors:
            if name.endswith(".qweight"):
                inputs, columns = self.tensors.matrix(name)
                yield name.removesuffix(".qweight"), "weight", (8 * columns, inputs)
