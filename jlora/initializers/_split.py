"""What initializers share that move a part of W into A and B, and leave the rest as the base."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _compat
from .._core import RANK, Axis, Change, Delta, Factor, explicit, leaf_weight, mesh_axes, promote
from .._linalg import each, qr
from .._quantized import Form, Quantized, is_quantized, quantize_weight
from .._rules import rule_name
from .._types import Layout
from .._whole import check_whole
from ._draw import dtype_of

# `(key, w, rank, scale) -> (a, b)` of matrices (…, inputs, outputs): scale·A·B is taken from them.
Factored = Callable[[jax.Array, jax.Array, int, float], tuple[jax.Array, jax.Array]]


class How(NamedTuple):
    """What a factorization needs to know of a site beside its arrays.

    Attributes:
        layout: which axes of W are which.
        rank: r.
        scale: s.
        dtype: of A and B.
        form: how W is cut into blocks, if the base is quantized.
    """

    layout: Layout
    rank: int
    scale: float
    dtype: Any
    form: Form | None = None

    @property
    def is_stack(self) -> bool:
        """Whether the first axis of W, and of its codes, is one of the stack."""
        return self.layout.stack[:1] == (0,) and (self.form is None or 0 in self.form.stack)

    @property
    def of_entry(self) -> "How":
        """What is known of each entry along the first axis."""
        stack, inputs, outputs = (tuple(d - 1 for d in axes if d) for axes in self.layout[:3])
        slots = self.layout.slots and (*self.layout.slots[:2], self.layout.slots[2] - 1)
        form = self.form and self.form.of_entry
        return self._replace(layout=Layout(stack, inputs, outputs, slots), form=form)


def how_of(w: Any, site: Any, rule: Any, form: Form | None = None) -> How:
    """The `How` of a site under a rule."""
    form = w.form if is_quantized(w) else form
    return How(site.layout, rule.rank, rule.scale, dtype_of(site, rule), form)


def split(
    factored: Factored, key: jax.Array, w: Any, site: Any, rule: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """`(w, a, b)`: W - s·A·B, rounded once, with A and B from `factored`.

    Each matrix of a stack and each slot is factored by itself. A quantized W is quantized again.
    """
    check(w, site, rule)
    return in_place(how_of(w, site, rule), functools.partial(_split, factored), key, w)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(factored: Factored, how: How, key: jax.Array, w: Any) -> tuple[Any, Any, Any]:
    if not is_quantized(w):
        return of_array(factored, how, key, w)

    def requantize(how: How, key: jax.Array, w: Quantized) -> tuple[Any, Any, Any]:
        rest, a, b = of_array(factored, how, key, w.array(jnp.float32))
        return quantize_weight(rest, w.scheme, w.form), a, b

    leaf, a, b = each_matrix(requantize, how, key, dataclasses.replace(w, used=None))
    error = None if w.error is None else leaf.error
    return dataclasses.replace(leaf, dtype=w.dtype, used=w.used, error=error), a, b


def each_matrix(f: Callable[..., Any], how: How, key: jax.Array, w: Any) -> tuple[Any, Any, Any]:
    """Maps `f(how, key, w)` over the leading axes of a stack, one entry after the other."""
    if not how.is_stack:
        return f(how, key, w)

    def of_entry(xs: Any) -> Any:
        key, w = xs
        w = dataclasses.replace(w, form=how.of_entry.form) if is_quantized(w) else w
        return each_matrix(f, how.of_entry, key, w)

    leaf, a, b = lax.map(of_entry, (jax.random.split(key, w.shape[0]), w))
    return dataclasses.replace(leaf, form=how.form) if is_quantized(leaf) else leaf, a, b


def of_array(
    factored: Factored, how: How, key: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """W - s·A·B, A and B; slots that are not chosen stay as they are."""

    def of(how: How, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        a, b = _of_matrices(factored, how, key, w)
        return _without(how, w, a, b), a, b

    return _in_slots(of, how, w)


def subtract(how: How, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """W - s·A·B in the chosen slots, rounded once."""
    return _in_slots(lambda how, w: (_without(how, w, a, b), a, b), how, w)[0]


def _in_slots(f: Callable[..., Any], how: How, w: jax.Array) -> tuple[Any, Any, Any]:
    """Applies `f(how, w)`, which returns `(w, a, b)`, to the chosen slots as a stack."""
    if how.layout.slots is None:
        return f(how, w)
    count, chosen, axis = how.layout.slots
    parts = jnp.split(w, count, axis)
    stack, inputs, outputs = (tuple(d + 1 for d in axes) for axes in how.layout[:3])
    how = how._replace(layout=Layout((*stack, 0), inputs, outputs))
    rest, a, b = f(how, jnp.stack([parts[i] for i in chosen]))
    for i, part in zip(chosen, rest, strict=True):
        parts[i] = part
    return jnp.concatenate(parts, axis), a, b


def _of_matrices(
    factored: Factored, how: How, key: jax.Array, w: jax.Array
) -> tuple[jax.Array, jax.Array]:
    stack, inputs, outputs = (tuple(w.shape[d] for d in axes) for axes in how.layout[:3])
    x = lax.transpose(w, [d for axes in how.layout[:3] for d in axes])
    x = x.reshape(*stack, math.prod(inputs), math.prod(outputs))
    a, b = factored(key, x, how.rank, how.scale)
    a, b = a.reshape(*stack, *inputs, how.rank), b.reshape(*stack, how.rank, *outputs)
    return a.astype(how.dtype), b.astype(how.dtype)


def _without(how: How, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """W - s·A·B, summed in float32 or better and rounded once."""
    stack, inputs, outputs = (tuple(map(Axis, axes)) for axes in how.layout[:3])
    delta = Delta(
        Factor(a, (*stack, *inputs, RANK)), Factor(b, (*stack, RANK, *outputs)), how.scale
    )
    return Change((delta,)).of(w, [Axis(d) for d in range(w.ndim)], -1)


def svd_part(w: jax.Array, kept: slice) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The part `kept` of U, Σ and Vᵀ of matrices (…, inputs, outputs).

    A stack is decomposed one entry of its first axis at a time: layers fit in memory one by one,
    and experts behind them stay on the devices where they are.
    """

    def of(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        u, values, vt = jnp.linalg.svd(widened(w), full_matrices=False)
        return u[..., kept], values[..., kept], vt[..., kept, :]

    return each(of, w) if w.ndim == 2 else lax.map(lambda w: each(of, w), w)


def orthonormal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of matrices (…, n, r); rows that are sharded stay where they are."""
    return each(qr, x, on_cpu=lambda x: tuple(jnp.linalg.qr(x)))


def widened(x: jax.Array) -> jax.Array:
    """`x` in float32 or better."""
    return x.astype(promote(x.dtype, jnp.float32))


# ----------------------------------------------------------------------------------- the whole of W


def check(w: Any, site: Any, rule: Any) -> None:
    """Raises if W has no values, values that are not finite, or is only a part."""
    name = f"the start of {rule_name(rule)}"
    check_whole(f"{name} factors", w, site.path)
    if is_quantized(w):
        return
    bad = _compat.known(lambda w: jnp.sum(~jnp.isfinite(w)), w)
    if bad:
        raise ValueError(
            f"{site.path!r} of `params` has {bad} values that are NaN or infinite, which {name} "
            "cannot factor. Use a checkpoint whose values are finite."
        )


def in_place(
    how: How, f: Callable[..., Any], key: jax.Array, w: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """Calls `f(how, key, w)`, which returns `(w, a, b)`, and shards the new W like the old one.

    Along explicit axes of a mesh, A and B are sharded like W too.
    """
    f = functools.partial(f, how)
    known = explicit(leaf_weight(w, Change(), "", materialize=True).type)
    if known is not None:
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (key, w))
        places = _places(how, known, *jax.eval_shape(f, *bare))
        f = jax.sharding.auto_axes(f, out_sharding=places)
    new, a, b = f(key, w)
    if jax.tree.structure(new) == jax.tree.structure(w):
        new = jax.tree.map(_put_like, new, w)
    return new, a, b


def _put_like(new: jax.Array, old: Any) -> jax.Array:
    place = _compat.place_of(old) if _compat.is_concrete(new) else None
    return new if place is None else jax.device_put(new, place)


def _places(how: How, known: NamedSharding, w: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    """The shardings of W, A and B along the axes of the mesh of `known`, that of W."""

    def place(axes: Sequence[int | None], x: Any) -> NamedSharding:
        spec = [None if d is None else known.spec[d] for d in axes]
        parts = [math.prod(known.mesh.shape[n] for n in mesh_axes(entry)) for entry in spec]
        fits = [n % k == 0 for n, k in zip(x.shape, parts, strict=True)]
        spec = [entry if fit else None for entry, fit in zip(spec, fits, strict=True)]
        return NamedSharding(known.mesh, PartitionSpec(*spec))

    stack, inputs, outputs, slots = how.layout
    beside = (*stack, *((None,) if slots is not None else ()))
    of_a, of_b = place((*beside, *inputs, None), a), place((*beside, None, *outputs), b)
    if not is_quantized(w):
        return place(range(w.ndim), w), of_a, of_b
    parts = {
        name: jax.tree.map(place, axes, getattr(w, name), is_leaf=lambda x: type(x) is tuple)
        for name, axes in w.axes().items()
    }
    return dataclasses.replace(w, **parts), of_a, of_b
