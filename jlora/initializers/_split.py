"""Moves a part of W into A and B; the rest of W becomes the base."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _compat
from .._arrays import (
    automatically,
    back,
    explicit,
    follow,
    promote,
    to_device,
)
from .._core import RANK, Axis, Change, Delta, Factor, leaf_weight
from .._linalg import map_matrices, qr
from .._quantized import (
    BaseLeaf,
    Form,
    Quantized,
    check_finite,
    is_quantized,
    quantize_weight,
)
from .._rules import rule_name
from .._site import Site, check_whole
from .._types import Layout
from ._initializer import RankRule, Start, dtype_of

Factors = tuple[jax.Array, jax.Array]  # A and B, or Q and R
# `(key, w, rank, scale) -> (a, b)` for matrices w (…, inputs, outputs), which lose scale·A·B.
Factorize = Callable[[jax.Array, jax.Array, int, float], Factors]


class Split(NamedTuple):
    """How a site is split, apart from its arrays.

    Attributes:
        layout: which axes of W are which.
        rank: r.
        scale: s.
        dtype: the dtype of A and B.
        form: how W is divided into blocks, if the base is quantized.
    """

    layout: Layout
    rank: int
    scale: float
    dtype: jnp.dtype
    form: Form | None = None

    @property
    def is_stack(self) -> bool:
        """Whether the first axis of W, and of its codes, is a stack."""
        return self.layout.stack[:1] == (0,) and (self.form is None or 0 in self.form.stack)

    @property
    def of_entry(self) -> "Split":
        """How each entry along the first axis is split."""
        form = self.form and self.form.of_entry
        return self._replace(layout=self.layout.of_entry, form=form)


def split_of(w: BaseLeaf, site: Site, rule: RankRule, form: Form | None = None) -> Split:
    """Returns how a site is split under a rule."""
    form = w.form if isinstance(w, Quantized) else form
    return Split(site.layout, rule.rank, rule.scale, dtype_of(site, rule), form)


def split(factored: Factorize, key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    """Returns W - s·A·B, rounded once, and A and B, which `factored` computes.

    Each matrix of a stack and each slot is factored on its own. If W is quantized, W - s·A·B is
    quantized again.
    """
    w = check_values(w, site, rule)
    return keep_sharding(split_of(w, site, rule), functools.partial(_split, factored), key, w)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(factored: Factorize, spec: Split, key: jax.Array, w: jax.Array | Quantized) -> Start:
    if not isinstance(w, Quantized):
        return split_array(factored, spec, key, w)

    def requantize(
        spec: Split, key: jax.Array, w: Quantized
    ) -> tuple[Quantized, jax.Array, jax.Array]:
        rest, a, b = split_array(factored, spec, key, w.array(jnp.float32))
        return quantize_weight(rest, w.scheme, w.form), a, b

    leaf, a, b = map_stack(requantize, spec, key, dataclasses.replace(w, used=None))
    error = None if w.error is None else leaf.error
    return dataclasses.replace(leaf, dtype=w.dtype, used=w.used, error=error), a, b


def map_stack(
    f: Callable[..., Any], spec: Split, key: jax.Array, w: jax.Array | Quantized
) -> tuple[Any, jax.Array, jax.Array]:
    """Maps `f(spec, key, w)` over the stacked axes at the front, one entry after the other."""
    if not spec.is_stack:
        return f(spec, key, w)

    def of_entry(xs: tuple[jax.Array, jax.Array | Quantized]) -> tuple[Any, jax.Array, jax.Array]:
        key, w = xs
        w = dataclasses.replace(w, form=spec.of_entry.form) if is_quantized(w) else w
        return map_stack(f, spec.of_entry, key, w)

    leaf, a, b = lax.map(of_entry, (jax.random.split(key, w.shape[0]), w))
    return dataclasses.replace(leaf, form=spec.form) if is_quantized(leaf) else leaf, a, b


def split_array(
    factored: Factorize, spec: Split, key: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns W - s·A·B, A and B; slots that are not chosen do not change."""

    def of(spec: Split, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        a, b = _factor_matrices(factored, spec, key, w)
        return _subtract_product(spec, w, a, b), a, b

    return _in_slots(of, spec, w)


def subtract(spec: Split, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Subtracts s·A·B from the chosen slots of W, and rounds once."""
    return _in_slots(lambda spec, w: (_subtract_product(spec, w, a, b), a, b), spec, w)[0]


def _in_slots(f: Callable[..., Any], spec: Split, w: jax.Array) -> tuple[Any, Any, Any]:
    """Applies `f(spec, w)`, which returns `(w, a, b)`, to the chosen slots as a stack."""
    if spec.layout.slots is None:
        return f(spec, w)
    count, chosen, axis = spec.layout.slots
    parts = jnp.split(w, count, axis)
    stack, inputs, outputs = (tuple(d + 1 for d in axes) for axes in spec.layout[:3])
    spec = spec._replace(layout=Layout((*stack, 0), inputs, outputs))
    rest, a, b = f(spec, jnp.stack([parts[i] for i in chosen]))
    for i, part in zip(chosen, rest, strict=True):
        parts[i] = part
    return jnp.concatenate(parts, axis), a, b


def _factor_matrices(factored: Factorize, spec: Split, key: jax.Array, w: jax.Array) -> Factors:
    stack, inputs, outputs = (tuple(w.shape[d] for d in axes) for axes in spec.layout[:3])
    x = lax.transpose(w, [d for axes in spec.layout[:3] for d in axes])
    x = x.reshape(*stack, math.prod(inputs), math.prod(outputs))
    a, b = factored(key, x, spec.rank, spec.scale)
    a, b = a.reshape(*stack, *inputs, spec.rank), b.reshape(*stack, spec.rank, *outputs)
    return a.astype(spec.dtype), b.astype(spec.dtype)


def _subtract_product(spec: Split, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Subtracts s·A·B from W in float32 or better, and rounds once."""
    stack, inputs, outputs = (tuple(map(Axis, axes)) for axes in spec.layout[:3])
    delta = Delta(
        Factor(a, (*stack, *inputs, RANK)), Factor(b, (*stack, RANK, *outputs)), spec.scale
    )
    return Change((delta,)).of(w, [Axis(d) for d in range(w.ndim)], -1)


def svd_part(w: jax.Array, kept: slice) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes the part `kept` of U, Σ and Vᵀ of matrices (…, inputs, outputs).

    A stack is decomposed one entry of its first axis at a time, so that memory holds one layer, and
    the experts of a layer stay on their devices.
    """

    def of(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, values, vt = jnp.linalg.svd(widen(w), full_matrices=False)
        return u[..., kept], values[..., kept], vt[..., kept, :]

    return map_matrices(of, w) if w.ndim == 2 else lax.map(lambda w: map_matrices(of, w), w)


def factor_qr(x: jax.Array) -> Factors:
    """Computes Q and R of matrices (…, n, r); sharded rows stay on their devices."""
    return map_matrices(qr, x, on_cpu=lambda x: tuple(jnp.linalg.qr(x)))


def widen(x: jax.Array) -> jax.Array:
    """Casts `x` to float32, or keeps a wider dtype."""
    return x.astype(promote(x.dtype, jnp.float32))


# ------------------------------------------------------------------------------ checks and sharding


def check_values(w: BaseLeaf, site: Site, rule: RankRule) -> jax.Array | Quantized:
    """Returns W; raises if W has no values, is not finite, or may be a shard."""
    name = f"the `init` of {rule_name(rule)}"
    w = check_whole(f"{name} factors", w, site.path)
    if not isinstance(w, Quantized):
        check_finite(w, "params", site.path, f"{name} cannot factor")
    return w


def keep_sharding(
    spec: Split, f: Callable[..., Any], key: jax.Array, w: jax.Array | Quantized
) -> Start:
    """Calls `f(spec, key, w)`, which returns `(w, a, b)`, and shards the new W like the old one.

    Along explicit axes of a mesh, A and B are sharded like W too.
    """
    f = functools.partial(f, spec)
    known = explicit(leaf_weight(w, Change(), "", materialize=True).type)
    if known is not None:
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (key, w))
        new, a, b = jax.eval_shape(f, *bare)
        place = functools.partial(follow, known)
        stack, inputs, outputs, slots = spec.layout
        beside = (*stack, *((None,) if slots is not None else ()))
        of_a, of_b = place(a, (*beside, *inputs, None)), place(b, (*beside, None, *outputs))
        of_w = new.map_arrays(place) if is_quantized(new) else place(new, range(new.ndim))
        f = automatically(f, (of_w, of_a, of_b))
    new, a, b = f(key, to_device(w))
    new = back(new, w)
    if jax.tree.structure(new) == jax.tree.structure(w):
        new = jax.tree.map(_put_like, new, w)
    return new, a, b


def _put_like(new: jax.Array, old: jax.Array) -> jax.Array:
    place = _compat.place_of(old) if _compat.is_concrete(new) else None
    return new if place is None else jax.device_put(new, place)
