"""AWQ and GPTQ: integer codes, where each group of inputs shares a scale and a zero point."""

from collections.abc import Sequence

import numpy as np

from ..._errors import shorten
from ..._quantized import Int4, Int8
from ._codes import Codes, Dense
from ._format import FLOATS, Format, Unreadable, register

MARKS = {".qweight": ".weight"}
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in a word of AWQ of the code of each of 8 outputs
ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}  # 1 in each code of a word


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


@register("gptq")
class Gptq(Format):
    """W = s·(q - z). A 32-bit word of q has neighboring inputs, a word of z neighboring outputs.

    `checkpoint_format` "gptq" stores z - 1, "gptq_v2" z. With `desc_act` the inputs of a group are
    not neighbors: `g_idx` has the group of each input.
    """

    marks = MARKS

    def read(self, name: str) -> Codes | Dense:
        """Reads the weight of a module that has `qweight`."""
        module = name.removesuffix(".weight")
        tensors = self.tensors
        config = self.config
        bits = self.field("bits", tuple(ONES))
        version = self.field("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        codes = unpack(tensors.read_matrix(f"{module}.qweight", ("I32",)), 0, bits).T
        outputs, inputs = codes.shape
        count = 32 // bits
        groups, _ = tensors.matrix(f"{module}.scales")
        zeros = tensors.read(f"{module}.qzeros", ("I32",), (groups, -(-outputs // count)))
        if version == "gptq":
            zeros = (zeros.view(np.uint32) + ONES[bits]).view(np.int32)
        scale = tensors.read(f"{module}.scales", FLOATS, (groups, outputs))
        order = None
        if f"{module}.g_idx" in tensors or config.get("desc_act") not in (None, False):
            order = tensors.read(f"{module}.g_idx", ("I32",), (inputs,))
        zeros = unpack(zeros, 1, bits).T[:outputs]
        return read_affine(module, bits, codes, scale.T, zeros, order, [config.get("group_size")])


def unpack(
    words: np.ndarray, axis: int, bits: int = 4, order: tuple[int, ...] | None = None
) -> np.ndarray:
    """Unpacks codes from int32 words, lowest bits first; the k-th is at place `order[k]`."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    places = order or range(32 // bits)
    mask = np.uint32(2**bits - 1)
    codes = np.stack([(words >> np.uint32(bits * k) & mask).astype(np.uint8) for k in places], -1)
    return np.moveaxis(codes.reshape(*words.shape[:-1], -1), -1, axis)


def read_affine(
    module: str,
    bits: int,
    codes: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    order: np.ndarray | None = None,
    sizes: Sequence[object] = (),
) -> Codes | Dense:
    """Makes W = s·(q - z) from codes of 4 or 8 bits.

    Args:
        module: the module, for errors.
        bits: the bits of a code.
        codes: q, unsigned, (outputs, inputs).
        scale: s, (outputs, groups).
        zero: z, unsigned, (outputs, groups); None for half the number of codes.
        order: the group of each input; None if groups are runs of neighboring inputs.
        sizes: the values of `group_size` in the configuration; a value below 1 means all inputs.
    """
    if not np.isfinite(scale.astype(np.float32)).all():
        raise Unreadable(module, "has scales that are not finite")
    inputs, groups = codes.shape[1], scale.shape[1]
    if order is None and (groups < 1 or inputs % groups):
        raise Unreadable(module, f"{groups} groups of scales do not divide {inputs} inputs")
    if order is None and not _is_configured(inputs, groups, sizes):
        said = f"`group_size` of the quantization, {', '.join(map(shorten, sizes[:9]))}"
        why = f"{groups} groups of scales for {inputs} inputs contradict {said}"
        raise Unreadable(module, why)
    if order is not None and not 0 <= order.min(initial=0) <= order.max(initial=0) < groups:
        raise Unreadable(module, f"has inputs in groups other than the {groups} with scales")
    usual = np.arange(inputs) * groups // max(inputs, 1)
    order = usual if order is None else order
    group = inputs // groups
    # A part of a group has the group's scale.
    part = max((n for n in Int4.legal if group % n == 0), default=0)
    is_cut = inputs % groups == 0 and part > 0 and np.array_equal(order, usual)
    if is_cut and bits == 4:
        zero = None if zero is None else zero.repeat(group // part, 1)
        return Codes(Int4(group=part), codes, scale.repeat(group // part, 1), zero)
    half = np.int16(2 ** (bits - 1))
    q = codes.astype(np.int16) - (half if zero is None else zero.astype(np.int16)[:, order])
    if is_cut and q.min(initial=0) >= -128 and q.max(initial=0) <= 127:
        scale = scale if scale.dtype == np.float16 else scale.astype(np.float32)
        return Codes(Int8(block=part), q.astype(np.int8), scale.repeat(group // part, 1))
    w = q.astype(np.float32) * scale.astype(np.float32)[:, order]
    return Dense(w, f"{bits}-bit integers", bits)


def _is_configured(inputs: int, groups: int, sizes: Sequence[object]) -> bool:
    """Whether the groups have one of the configured sizes, if any are configured."""
    given = [n for n in sizes if isinstance(n, int) and n > 0]
    whole = groups == 1 and (len(given) < len(sizes) or max(given, default=0) > inputs)
    return whole or not given or inputs // groups in given
