"""A product of an activation with a changed weight: x·W, plus what the deltas add."""

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays import lie_along, promote
from ._axes import RANK, Factor, ProductAxes, Unfactorable
from ._change import ArrayPair, Delta
from ._weight import Weight


@dataclasses.dataclass(frozen=True)
class Product(abc.ABC):
    """The product y = x·W' of an activation x with a changed weight.

    Attributes:
        kind: `"dense"`, `"conv"` or `"embed"` (rows are looked up).
        eqn: the equation.
        w: the weight.
        x: the activation.
        roles: what the product does with the axes of W.
    """

    kind: ClassVar[str] = "dense"
    eqn: Any
    w: Weight
    x: jax.Array
    roles: ProductAxes

    @abc.abstractmethod
    def base(self, x: jax.Array) -> jax.Array:
        """Computes x·W."""

    @abc.abstractmethod
    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        """Computes what a delta adds to x·W."""

    @abc.abstractmethod
    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        """Returns the gain with the axes of x if it is `on_x`, else with those of y."""

    def result(self) -> jax.Array:
        """Computes y."""
        return self.finish(*self.start())

    def start(self) -> tuple[jax.Array, list[jax.Array]]:
        """Returns x, scaled if the gain is along inputs, and what each delta adds to y."""
        x = self._scale(self.x, self._gains[0], on_x=True)
        return x, self.terms(x)

    def finish(self, x: jax.Array, terms: Sequence[jax.Array]) -> jax.Array:
        """Adds the terms of `start` to x·W, and scales the sum if the gain is along outputs.

        The terms are computed before x·W so that the backward pass adds their gradients last.
        """
        y = functools.reduce(self.add, terms, self.base(x))
        return self._scale(y, self._gains[1], on_x=False)

    def _scale(self, x: jax.Array, gain: Factor | None, on_x: bool) -> jax.Array:
        if gain is None:
            return x
        x = x.astype(self.dtype) if on_x else x  # integers cannot hold their product with a gain
        return times(x, lie_along(self.spread(gain, on_x), x), self.w.change.divides)

    @property
    def _gains(self) -> tuple[Factor | None, Factor | None]:
        """The gain that scales x and the gain that scales y; at least one of them is None."""
        gain = self.w.change.gain
        if gain is None or self.kind == "embed" or {*gain.axes}.isdisjoint(self.roles.inputs):
            return None, gain
        if not {*gain.axes}.isdisjoint(self.roles.outputs):
            raise Unfactorable("its gain varies along both inputs and outputs")
        return gain, None

    def terms(self, x: jax.Array) -> list[jax.Array]:
        """Computes what each delta adds; while sites are searched, records the use."""
        if self.w.origin.uses is not None:
            self.w.origin.uses.product(self.w, self.kind, self.roles)
        return [self.low_rank(delta, x) for delta in self.w.change.deltas]

    def add(self, y: jax.Array, term: jax.Array) -> jax.Array:
        """Adds a term to `y`, in its dtype."""
        return y + term.astype(y.dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in which the factors are multiplied."""
        return promote(self.x.dtype, self.w.dtype)

    def ordered(self, delta: Delta) -> Delta:
        """Returns a delta in `dtype`, whose `a` is the factor that x is multiplied with first.

        Its factors together have all axes of W. It has no key: x has dropped its entries.
        """
        dtype = self.dtype
        delta = delta.of_slot()
        inputs = {*self.roles.inputs}
        q, p = sorted((delta.b, delta.a), key=lambda f: len(inputs.intersection(f.axes)))
        delta = dataclasses.replace(delta, a=p, b=q, key=None, dropout=0.0)
        if delta.is_matrix and jnp.finfo(dtype).minexp > -100:
            delta = _balance(delta)
        p, q = (f.each(lambda x: x.astype(dtype)) for f in (delta.a, delta.b))
        outputs = self.roles.outputs
        of_p = {a: n for a, n in self.w.lengths.items() if a not in (*outputs, *q.axes)}
        of_q = {a: n for a, n in self.w.lengths.items() if a in outputs and a not in p.axes}
        return dataclasses.replace(delta, a=p.repeat(of_p), b=q.repeat(of_q))


def _balance(delta: Delta) -> Delta:
    """Moves s and the norm of each column of A into B, for float16.

    There x·A, s·A or s·x·A could be above 65,504, or round to 0, while s·A·B is neither. Columns
    of A are divided by powers of two, so nothing else is rounded.
    """
    others = [i for i, a in enumerate(delta.a.axes) if a != RANK]
    wide = lax.stop_gradient(delta.a.value).astype(promote(delta.a.dtype, jnp.float32))
    norm = jnp.sqrt(jnp.square(wide).sum(others)).astype(jnp.float32)
    power = jnp.where((norm > 0) & jnp.isfinite(norm), jnp.frexp(norm)[1], 0)

    def times_power(f: Factor, sign: int, scale: float = 1.0) -> Factor:
        factor = jnp.ldexp(jnp.float32(scale), sign * power)
        wide = promote(f.dtype, jnp.float32)
        return f.replace(f.value.astype(wide) * f.replace(factor, [RANK]).expand_to(f.axes))

    b = times_power(delta.b, 1, delta.scale)
    return dataclasses.replace(delta, a=times_power(delta.a, -1), b=b, scale=1.0)


def times(x: jax.Array, gain: jax.Array, divides: bool) -> jax.Array:
    """Multiplies `x` by `gain` in the dtype of `x`.

    If the gain `divides`, the backward pass keeps the result instead of `x`, because the model
    usually keeps the result too, and divides the gain out of it. float16 has too few exponents.
    """
    return _scaled(x, gain) if divides and jnp.finfo(x.dtype).minexp < -100 else _product(x, gain)


def _product(x: jax.Array, gain: jax.Array) -> jax.Array:
    wide = promote(x.dtype, gain.dtype)
    return (x.astype(wide) * gain.astype(wide)).astype(x.dtype)


_scaled = jax.custom_jvp(_product)


@_scaled.defjvp
def _scaled_jvp(primals: ArrayPair, tangents: ArrayPair) -> ArrayPair:
    (_, gain), (dx, dgain) = primals, tangents
    y = _scaled(*primals)
    # Without the barrier XLA would compute y again, from x, and keep both.
    of_gain = jax.checkpoint(_product, prevent_cse=True)(y, dgain / gain)
    return y, _product(dx, gain) + of_gain
