"""How a weight is divided into blocks, and the base class of schemes, which define the codes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._arrays import explicit
from .._errors import InputError
from .._rules import check_pattern, is_int, rule_name
from .._types import Layout


class Form(NamedTuple):
    """How a weight is divided into blocks that share a scale.

    Attributes:
        shape: the shape of W.
        stack: axes over which W is a stack of matrices; each matrix is quantized on its own.
        order: the other axes of W in the order of files: outputs, then inputs; for an embedding,
            inputs, then outputs. Codes run along the last axis.
        blocks: the length of a block along each axis of W.
        flat: whether blocks run through the whole matrix in the order of `order`, across the ends
            of its rows. Then codes and scales have the axes `stack` and one more.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    order: tuple[int, ...]
    blocks: tuple[int, ...]
    flat: bool = False

    @property
    def axis(self) -> int:
        """The axis along which the codes run."""
        return self.order[-1]

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of a matrix in the order of a file."""
        return tuple(self.shape[d] for d in self.order)

    @property
    def of_codes(self) -> "Form":
        """The form of the array that is divided: W, or its flattened matrices if it is `flat`."""
        if not self.flat:
            return self
        n = len(self.stack)
        lead = [self.shape[d] for d in self.stack]
        blocks = (*[1] * n, self.blocks[self.axis])
        return Form((*lead, math.prod(self.matrix)), tuple(range(n)), (n,), blocks, True)

    @property
    def scaled(self) -> tuple[int | None, ...]:
        """The axis of W for each axis of the scales; None for the axis of a flattened matrix.

        Scales lack the axes of W that one block covers.
        """
        if self.flat:
            return (*self.stack, None)
        return tuple(d for d in range(len(self.shape)) if not self.is_whole(d))

    @property
    def coded(self) -> tuple[int | None, ...]:
        """The axis of W for each axis of the codes; None for the axis of a flattened matrix."""
        return (*self.stack, None) if self.flat else tuple(range(len(self.shape)))

    @property
    def of_entry(self) -> "Form":
        """The form of one entry along the first axis, which must be an axis of the stack."""
        stack, order = (tuple(d - 1 for d in axes if d) for axes in (self.stack, self.order))
        return self._replace(shape=self.shape[1:], stack=stack, order=order, blocks=self.blocks[1:])

    def is_whole(self, d: int) -> bool:
        """Whether one block covers axis `d`, so that scales lack it; never if it is `flat`."""
        return not self.flat and 1 < self.shape[d] <= self.blocks[d]


def along(
    shape: tuple[int, ...], stack: tuple[int, ...], order: tuple[int, ...], block: int
) -> Form:
    """Makes a form with blocks along the last axis of `order`."""
    blocks = tuple(block if d == order[-1] else 1 for d in range(len(shape)))
    return Form(shape, stack, order, blocks)


def one_block(
    shape: tuple[int, ...], stack: tuple[int, ...], order: tuple[int, ...], inputs: int
) -> Form:
    """Makes a form with one block for the last `inputs` axes of `order`; see `Form`.

    Examples:
        >>> from jlora.extend import one_block
        >>> one_block(shape=(64, 8), stack=(), order=(1, 0), inputs=1).blocks
        (64, 1)
    """
    blocks = tuple(n if d in order[-inputs:] else 1 for d, n in enumerate(shape))
    return Form(shape, stack, order, blocks)


# --------------------------------------------------------------------------------- arrays in blocks


def divisor(x: jax.Array) -> jax.Array:
    """Returns `x`, but 1 where it is 0."""
    return jnp.where(x == 0, 1, x)


def split(w: jax.Array, blocks: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """Divides each axis of W into blocks, padded with 0; also returns the axes within a block."""
    counts = [-(-n // b) for n, b in zip(w.shape, blocks, strict=True)]
    ends = [c * b - n for c, b, n in zip(counts, blocks, w.shape, strict=True)]
    w = jnp.pad(w, [(0, end) for end in ends]) if any(ends) else w
    shape = [n for pair in zip(counts, blocks, strict=True) for n in pair]
    return w.reshape(shape), tuple(range(1, 2 * len(counts), 2))


def join(x: jax.Array) -> jax.Array:
    """Joins the blocks of `split`, with their padding."""
    return x.reshape([c * b for c, b in zip(x.shape[::2], x.shape[1::2], strict=True)])


def spread(scale: jax.Array, blocks: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Repeats the scales of blocks to `shape`; an axis with one block keeps length 1."""
    for d, (block, n) in enumerate(zip(blocks, shape, strict=True)):
        if block > 1 and scale.shape[d] > 1:
            before, count, after = scale.shape[:d], scale.shape[d], scale.shape[d + 1 :]
            x = lax.broadcast_in_dim(
                scale,
                (*before, count, block, *after),
                [*range(d + 1), *range(d + 2, scale.ndim + 1)],
            )
            scale = x.reshape(*before, count * block, *after)
            scale = lax.slice_in_dim(scale, 0, n, axis=d) if count * block != n else scale
    return scale


def pack(codes: jax.Array, axis: int) -> jax.Array:
    """Packs two codes of 4 bits in a byte, along the blocks that `split` makes of `axis`.

    Entry j of a block is in the high bits, entry j + block / 2 in the low bits. So unpacking does
    not interleave neighbors, which would be slow on a TPU.
    """
    first, second = jnp.split(codes, 2, 2 * axis + 1)
    return (first << 4 | second).astype(jnp.uint8)


def unpack(data: jax.Array, axis: int, block: int) -> jax.Array:
    """Unpacks codes along an axis whose packed blocks are joined."""
    before, n, after = data.shape[:axis], data.shape[axis], data.shape[axis + 1 :]
    blocks = data.reshape(*before, 2 * n // block, 1, block // 2, *after)
    # Shifts rather than two joined arrays, because XLA fuses them with what reads the codes.
    one = [1] * blocks.ndim
    shifts = lax.broadcasted_iota(jnp.uint8, [*one[: axis + 1], 2, *one[axis + 2 :]], axis + 1)
    codes = (blocks >> (4 - 4 * shifts)) & jnp.uint8(15)
    return codes.reshape(*before, 2 * n, *after)


# ------------------------------------------------------------------------------------------ schemes


class Coded(NamedTuple):
    """A weight in codes.

    Attributes:
        codes: a code for each entry of W.
        scale: a number for each block.
        zero: a second number for each block, or None.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The base class of schemes, each of which quantizes the weights whose path matches `pattern`.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None matches
            every dense site except embeddings, the head, and leaves trained in full.
        bits: bits of a code: 8, or 4 for two codes a byte.
        legal: values of the field `block` or `group`, which has the length of blocks; () for any.
        is_optional: whether None is legal too, for one block an output.
        scales: legal dtypes of scales, also of those from files.

    Examples:
        >>> import dataclasses, jax.numpy as jnp, jlora
        >>> from jlora.extend import Coded, Scheme
        >>> @dataclasses.dataclass(frozen=True)
        ... class Ternary(Scheme):
        ...     def encode(self, w, within, short):
        ...         scale = jnp.abs(w).max(within, keepdims=True)
        ...         return Coded(jnp.round(w / scale).astype(jnp.int8), scale)
        >>> base = jlora.quantize({"w": jnp.array([[-2.0], [0.5], [1.5]])}, Ternary("w"))
        >>> jlora.dequantize(base)["w"].tolist()
        [[-2.0], [0.0], [2.0]]
    """

    pattern: str | None = None

    bits: ClassVar[int] = 8
    legal: ClassVar[tuple[int, ...]] = ()
    is_optional: ClassVar[bool] = False
    scales: ClassVar[tuple[str, ...]] = ("float32",)

    def __post_init__(self) -> None:
        if self.pattern is not None:
            check_pattern(self, self.pattern)
        name, n = block_of(self)
        if not self.legal or (n is None and self.is_optional):
            return
        legal = ", ".join(map(str, self.legal))
        if not is_int(n) or n not in self.legal:  # a subclass may lack the field
            raise InputError(name, f"of {rule_name(self)} must be one of {legal}; got {n!r}.")
        if n is not None and type(n) is not int:
            object.__setattr__(self, name, int(n))

    def form(
        self, shape: tuple[int, ...], stack: tuple[int, ...], order: tuple[int, ...], inputs: int
    ) -> Form:
        """Divides a weight into blocks along its last axis, or into one block for each output.

        Args:
            shape: the shape of the weight.
            stack: as in `Form`.
            order: as in `Form`.
            inputs: how many axes at the end of `order` are inputs.

        Raises:
            ValueError: if blocks do not divide the axis.
        """
        name, block = block_of(self)
        n = shape[order[-1]]
        if block is None:
            return one_block(shape, stack, order, inputs)
        if n % block == 0:
            return along(shape, stack, order, block)
        fits = ", ".join(str(b) for b in self.legal if n % b == 0)
        remedy = f"Give one of {fits}." if fits else "None does: leave it out of the pattern."
        raise InputError(
            name,
            f"of {rule_name(self)} must divide axis {order[-1]}, of length {n}, of a "
            f"weight of shape {shape}; got {block}. {remedy}",
        )

    def encode(self, w: jax.Array, within: Sequence[int], short: jax.Array | None) -> Coded:
        """Computes the codes of W.

        Args:
            w: W in float32, with each axis divided into blocks.
            within: the axes within a block, along which the scales have length 1.
            short: marks the blocks that are padded, as the last one may be; None if none is.
        """
        raise NotImplementedError

    def decode(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Computes W in float32, by default code × scale; the scales broadcast to the codes."""
        return codes.astype(jnp.float32) * scale.astype(jnp.float32)


def spell(scheme: Scheme) -> str:
    """Returns the name and the fields of a scheme, without the pattern."""
    fields = (f.name for f in dataclasses.fields(scheme) if f.name != "pattern")
    return f"{type(scheme).__name__}({', '.join(f'{n}={getattr(scheme, n)!r}' for n in fields)})"


def form_of(scheme: Scheme, shape: tuple[int, ...], layout: Layout, kind: str | None) -> Form:
    """Divides a weight into blocks: along inputs, or along the rows of an embedding."""
    stack, inputs, outputs, _ = layout
    if kind == "embed":
        return scheme.form(shape, stack, (*inputs, *outputs), len(outputs))
    return scheme.form(shape, stack, (*outputs, *inputs), len(inputs))


def block_of(scheme: Scheme) -> tuple[str, Any]:
    """Returns the name and the value of the field with the block length; None if there is none."""
    name = "group" if hasattr(scheme, "group") else "block"
    return name, getattr(scheme, name, None)


def lookup(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Looks up `table[codes]` in float32."""

    def gathered(codes: jax.Array) -> jax.Array:
        numbers = jnp.asarray(table, jnp.float32)
        return numbers.at[codes].get(mode="promise_in_bounds", out_sharding=explicit(codes))

    # Gathers from a small table are slow on a TPU.
    def selected(codes: jax.Array) -> jax.Array:
        level: list[Any] = [jnp.float32(x) for x in table]
        for bit in range(4):
            is_odd = (codes >> bit) & 1 == 1
            level = [jnp.where(is_odd, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        return level[0]

    def summed(codes: jax.Array) -> jax.Array:
        each = jnp.arange(len(table), dtype=codes.dtype).reshape(-1, *[1] * codes.ndim)
        values = jnp.asarray(table, jnp.float32).reshape(each.shape)
        return jnp.where(codes[None] == each, values, 0).sum(0)

    on_tpu = selected if len(table) == 16 else summed
    return lax.platform_dependent(codes, tpu=on_tpu, default=gathered)
