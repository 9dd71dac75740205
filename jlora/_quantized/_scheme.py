"""The base class of schemes of quantization."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._core import explicit
from .._rules import check_pattern, is_int, rule_name
from .._types import Layout
from ._form import Form, along, one_block


class Coded(NamedTuple):
    """A weight in codes.

    Attributes:
        codes: a code for each entry of W.
        scale: a number for each block.
        zero: another for each block, or None.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Quantizes the weights whose path matches `pattern`; the base of each scheme.

    Attributes:
        pattern: a regular expression for whole components of a leaf's path. None means
            every dense site that is neither an embedding nor the head.
    """

    pattern: str | None = None

    bits: ClassVar[int]  # of a code
    legal: ClassVar[tuple[int, ...]] = ()  # lengths of blocks; a field `block` or `group` has one
    is_optional: ClassVar[bool] = False  # whether None is legal too
    scales: ClassVar[tuple[str, ...]] = ("float32",)  # dtypes of scales, here or in a file

    def __post_init__(self) -> None:
        if self.pattern is not None:
            check_pattern(self, self.pattern)
        name, n = block_of(self)
        if not self.legal or (n is None and self.is_optional):
            return
        if not is_int(n) or n not in self.legal:
            raise ValueError(
                f"`{name}` of {rule_name(self)} must be one of "
                f"{', '.join(map(str, self.legal))}; got {n!r}."
            )
        if type(n) is not int:
            object.__setattr__(self, name, int(n))

    def form(
        self, shape: tuple[int, ...], stack: tuple[int, ...], order: tuple[int, ...], inputs: int
    ) -> Form:
        """Cuts a weight into blocks along its last axis, or into one for all inputs of an output.

        Args:
            shape: of the weight.
            stack: as in `Form`.
            order: as in `Form`.
            inputs: how many axes at the end of `order` each output is a sum over.

        Raises:
            ValueError: if the weight cannot be cut so, as if blocks do not divide the axis.
        """
        (name, block), n = block_of(self), shape[order[-1]]
        if block is None:
            return one_block(shape, stack, order, inputs)
        if n % block == 0:
            return along(shape, stack, order, block)
        fits = ", ".join(str(b) for b in self.legal if n % b == 0)
        raise ValueError(
            f"`{name}` of {rule_name(self)} is {block}, which does not divide axis {order[-1]}, "
            f"of length {n}, of a weight of shape {shape}. "
            + (
                f"Blocks of {fits} divide it."
                if fits
                else "No legal block divides it: leave it out of the pattern."
            )
        )

    def encode(self, w: jax.Array, within: Sequence[int], short: jax.Array | None) -> Coded:
        """Computes the codes of W.

        Args:
            w: W in float32, its axes cut into blocks.
            within: the axes within a block, of which scales have length 1.
            short: True for blocks that are not full, if there are any.
        """
        raise NotImplementedError

    def decode(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Computes W in float32 from codes and scales that broadcast to them: their product."""
        return codes.astype(jnp.float32) * scale.astype(jnp.float32)


def spell(scheme: Scheme) -> str:
    """Spells a scheme for a table: its name and fields without the pattern."""
    fields = (f.name for f in dataclasses.fields(scheme) if f.name != "pattern")
    return f"{type(scheme).__name__}({', '.join(f'{n}={getattr(scheme, n)!r}' for n in fields)})"


def form_of(scheme: Scheme, shape: tuple[int, ...], layout: Layout, kind: str | None) -> Form:
    """Says how a weight is cut into blocks: along inputs, or along rows that are looked up."""
    stack, inputs, outputs, _ = layout
    if kind == "embed":
        return scheme.form(shape, stack, (*inputs, *outputs), len(outputs))
    return scheme.form(shape, stack, (*outputs, *inputs), len(inputs))


def block_of(scheme: Scheme) -> tuple[str, Any]:
    """Returns the name and the value of the field with the length of blocks, None without."""
    name = "group" if hasattr(scheme, "group") else "block"
    return name, getattr(scheme, name, None)


def lookup(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Looks up `table[codes]` in float32."""

    def gathered(codes: jax.Array) -> jax.Array:
        numbers = jnp.asarray(table, jnp.float32)
        return numbers.at[codes].get(mode="promise_in_bounds", out_sharding=explicit(codes))

    # A TPU gathers slowly from a small table.
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
