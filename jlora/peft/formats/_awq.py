"""AWQ: 4-bit integers in groups of inputs."""

from ._affine import read_affine
from ._codes import Codes, Dense
from ._format import Format, register
from ._tensors import FLOATS, unpack

MARKS = {".qweight": ".weight"}
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in a word of the code of each of 8 outputs


@register("awq")
class Awq(Format):
    """W = s·(q - z), where 32-bit words of q and z hold 8 neighboring outputs."""

    marks = MARKS

    def read(self, name: str) -> Codes | Dense:
        """Reads the weight of a module that has `qweight`."""
        module = name.removesuffix(".weight")
        tensors = self.tensors
        self.field("bits", (4,))
        self.field("version", ("gemm", "GEMM"), "gemm")
        words = tensors.read_matrix(f"{module}.qweight", ("I32",))
        groups = tensors.matrix(f"{module}.scales")[0]
        columns = words.shape[1]
        zeros = tensors.read(f"{module}.qzeros", ("I32",), (groups, columns))
        scale = tensors.read(f"{module}.scales", FLOATS, (groups, 8 * columns))
        codes, zeros = (unpack(x, 1, order=ORDER).T for x in (words, zeros))
        return read_affine(module, 4, codes, scale.T, zeros, None, [self.config.get("group_size")])
