"""Primitives that multiply with a weight: the product with W, plus that with the factors of ΔW."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _compat
from ._delta import Delta
from ._explicit import explicit
from ._factor import RANK, Factor, Unfactorable
from ._fork import Uses, aside, main
from ._interpret import rule
from ._matmul import Spec, adapted, letters, lowrank, plan, promote
from ._weight import Roles, Weight, value_of

Product = Callable[[Delta], jax.Array]


def _plus(out: jax.Array, w: Weight, kind: str, roles: Roles, product: Product) -> jax.Array:
    """`out`, the product with W, plus that with each term of ΔW."""
    for term in w.terms:
        delta = term.use(kind, roles, product)
        out = out if delta is None else out + delta.astype(out.dtype)
    return out


@rule("dot_general", uses=Uses(product=True))
def _dot_general(eqn: Any, x: Any, y: Any) -> jax.Array:
    (x_contracted, y_contracted), (x_batch, y_batch) = eqn.params["dimension_numbers"]
    # One letter an axis; those that meet share it. Example: x (b, t, i) · w (i, o), contracted
    # over i, is x_axes = "abc", y_axes = "ce", out_axes = "abe".
    x_rank, y_rank = (jnp.ndim(main(value_of(z))) for z in (x, y))
    names = letters(x_rank + y_rank)
    x_axes, y_list = names[:x_rank], list(names[x_rank:])
    for i, j in zip((*x_batch, *x_contracted), (*y_batch, *y_contracted), strict=True):
        y_list[j] = x_axes[i]
    y_axes = "".join(y_list)
    batch = [x_axes[i] for i in x_batch]
    summed = [x_axes[i] for i in x_contracted]
    out_axes = "".join([*batch, *(c for c in x_axes + y_axes if c not in batch + summed)])

    def dot(x: jax.Array, y: jax.Array) -> jax.Array:
        return _compat.bind_one(eqn, x, y)

    aval = eqn.outvars[0].aval
    how = (eqn.params["precision"], aval.dtype, explicit(aval))
    of_x = _Axes(y_axes, x_axes, out_axes, _roles(x_axes, x_batch, x_contracted), *how)
    of_y = _Axes(x_axes, y_axes, out_axes, _roles(y_axes, y_batch, y_contracted), *how)
    if not isinstance(x, Weight):
        return _adapted_dot(dot, x, y, of_y)
    if not isinstance(y, Weight):
        return _adapted_dot(lambda y, x: dot(x, y), y, x, of_x)
    out = _plus_dot(dot(x.value, y.value), y.value, x, of_x)
    out = _plus_dot(out, x.value, y, of_y)
    return _plus_both(out, x, y, of_y)


class _Axes(NamedTuple):
    """The letters of the axes of an activation, a weight and their product."""

    z: str
    w: str
    out: str
    roles: Roles  # of the axes of the weight
    precision: Any
    dtype: Any  # of the product
    sharding: Any  # of the product, along explicit mesh axes


def _roles(axes: str, batch: Sequence[int], contracted: Sequence[int]) -> Roles:
    kept = [d for d in range(len(axes)) if d not in batch and d not in contracted]
    return Roles(tuple(batch), tuple(contracted), tuple(kept))


def _adapted_dot(
    dot: Callable[[jax.Array, jax.Array], jax.Array], z: Any, w: Weight, axes: _Axes
) -> jax.Array:
    """`dot(z, W)` and what ΔW adds: apart, or by the sum of W and ΔW where that is planned."""
    if _plan(x := main(z), w, axes) == "summed":
        spec, p, q = _factors(w.terms[0], w.shape, axes, x.dtype)
        return adapted(spec, dot, *_compat.match_varying(x, w.value, p, q))
    return _plus_dot(dot(x, w.value), aside(z), w, axes)


def _plan(z: jax.Array, w: Weight, axes: _Axes) -> str:
    """`plan`; apart too where there is not one ΔW, or it drops inputs, or the sum is rounded."""
    [term, *others] = w.terms
    same = z.dtype == w.value.dtype == axes.dtype
    if (
        others
        or not same
        or _rounds(axes.precision)
        or not isinstance(term, Delta)
        or term.key is not None
    ):
        return "apart"
    roles = axes.roles
    first, second = term.split(roles.inputs)
    if set(second.dims) & set(roles.inputs) or set(first.dims) & set(roles.outputs):
        return "apart"
    stack, inputs, outputs = (
        math.prod(w.shape[d] for d in dims) for dims in (roles.stack, roles.inputs, roles.outputs)
    )
    tokens = z.size // max(1, stack * inputs)
    return plan(tokens, inputs, outputs, first.value.shape[first.axis(RANK)], z.dtype)


def _rounds(precision: Any) -> bool:
    """Whether a product in this precision may round W + ΔW, of float32, to fewer bits."""
    if isinstance(precision, tuple):
        return any(map(_rounds, precision))
    if precision is None or isinstance(precision, lax.Precision):
        # What these say is said of accelerators: on a CPU all of them are float32.
        return precision != lax.Precision.HIGHEST and jax.default_backend() != "cpu"
    return precision not in (
        lax.DotAlgorithmPreset.F32_F32_F32,
        lax.DotAlgorithmPreset.F64_F64_F64,
    )


def _factors(
    term: Delta, shape: tuple[int, ...], axes: _Axes, dtype: Any
) -> tuple[Spec, jax.Array, jax.Array]:
    p, q = term.complete(shape, axes.roles.inputs)
    spec = Spec(
        axes.z,
        axes.w,
        p.label(axes.w),
        q.label(axes.w),
        axes.out,
        term.scale,
        axes.dtype,
        axes.precision,
        axes.sharding,
    )
    return spec, p.value.astype(dtype), q.value.astype(dtype)


def _plus_dot(out: jax.Array, z: jax.Array, w: Weight, axes: _Axes) -> jax.Array:
    dtype = promote(z.dtype, w.value.dtype)

    def product(term: Delta) -> jax.Array:
        spec, p, q = _factors(term, w.shape, axes, dtype)
        return lowrank(spec, *_compat.match_varying(term.drop(z).astype(dtype), p, q))

    return _plus(out, w, "dense", axes.roles, product)


def _plus_both(out: jax.Array, x: Weight, y: Weight, axes: _Axes) -> jax.Array:
    """Adds Δx·Δy where two adapted weights are multiplied with each other."""
    for s in x.terms:
        for t in y.terms:
            if isinstance(s, Delta) and isinstance(t, Delta):
                operands = [
                    (f.label(letters, rank), f.value.astype(out.dtype))
                    for term, w, letters, rank in ((s, x, axes.z, "Y"), (t, y, axes.w, "Z"))
                    for f in term.complete(w.shape, ())
                ]
                spec = ",".join(label for label, _ in operands) + "->" + axes.out
                factors = (v for _, v in operands)
                cross = jnp.einsum(spec, *factors, optimize="optimal", precision=axes.precision)
                out = out + s.scale * t.scale * cross
    return out


@rule("ragged_dot_general", uses=Uses(product=True))
def _ragged_dot_general(eqn: Any, x: Any, w: Any, group_sizes: jax.Array) -> jax.Array:
    p = eqn.params
    numbers = p["ragged_dot_dimension_numbers"]
    (x_contracted, contracted), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    if isinstance(x, Weight) or len(w.shape) != 3 or (rows, tuple(x_contracted)) != ((0,), (1,)):
        raise Unfactorable("the groups are not rows of a matrix")
    if len(groups) != 1 or len(contracted) != 1 or tuple(batch) != ((), ()):
        raise Unfactorable("the weight is not one matrix a group")
    [group], [inner] = groups, contracted
    [outer] = {0, 1, 2} - {group, inner}
    z = aside(x)
    dtype = promote(z.dtype, w.value.dtype)

    def ragged(z: jax.Array, f: Factor, *dims: int) -> jax.Array:
        value = f.arrange((group, *dims))
        value = jnp.broadcast_to(value, (w.shape[group], *value.shape[1:]))
        return lax.ragged_dot(
            z,
            value.astype(dtype),
            group_sizes,
            precision=p["precision"],
            group_offset=p["group_offset"],
        )

    def product(term: Delta) -> jax.Array:
        first, second = term.split((inner,))
        if inner in second.dims or outer in first.dims:
            raise Unfactorable("its inputs and outputs are mixed")
        h = ragged(term.drop(z.astype(dtype)), first, inner, RANK)
        return ragged(term.scale * h, second, RANK, outer)

    out = _compat.bind_one(eqn, main(x), w.value, group_sizes)
    return _plus(out, w, "dense", Roles((group,), (inner,), (outer,)), product)


@rule("conv_general_dilated", uses=Uses(product=True))
def _conv_general_dilated(eqn: Any, x: Any, w: Any) -> jax.Array:
    p = eqn.params
    out_dim, in_dim, *spatial = p["dimension_numbers"].rhs_spec
    groups = p["feature_group_count"]
    if isinstance(x, Weight) or p["batch_group_count"] != 1:
        raise Unfactorable("the weight is not a kernel, or batches are grouped")
    feature = p["dimension_numbers"].out_spec[1]
    z = aside(x)
    dtype = promote(z.dtype, w.value.dtype)

    def product(term: Delta) -> jax.Array:
        a, b = term.split((in_dim, *spatial))
        if out_dim in a.dims or {in_dim, *spatial} & set(b.dims):
            raise Unfactorable("its inputs and outputs are mixed")
        if any(d not in a.dims and w.shape[d] > 1 for d in (in_dim, *spatial)):
            raise Unfactorable("it is broadcast")
        # A is a kernel with r outputs, the same for every group; B is a product over them.
        kernel = a.arrange([RANK if d == out_dim else d for d in range(len(w.shape))])
        kernel = jnp.concatenate([kernel.astype(dtype)] * groups, out_dim)
        h = lax.conv_general_dilated(
            term.drop(z.astype(dtype)),
            kernel,
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            p["dimension_numbers"],
            groups,
            precision=p["precision"],
        )
        h = jnp.moveaxis(h, feature, -1)  # (batch, *spatial, groups * r)
        h = h.reshape(*h.shape[:-1], groups, -1)  # (batch, *spatial, groups, r)
        b_groups = b.arrange((RANK, out_dim)).astype(dtype)  # (r, outputs)
        b_groups = b_groups.reshape(b_groups.shape[0], groups, -1)  # (r, groups, outputs / groups)
        y = jnp.einsum("...gr,rgo->...go", term.scale * h, b_groups, precision=p["precision"])
        return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, feature)

    out = _compat.bind_one(eqn, main(x), w.value)
    return _plus(out, w, "conv", Roles((), (*sorted(spatial), in_dim), (out_dim,)), product)


@rule("gather", uses=Uses(product=True))
def _gather(eqn: Any, w: Any, indices: jax.Array) -> Any:
    p = eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    indexed = tuple(numbers.start_index_map)
    whole = [d for d in range(len(value_of(w).shape)) if d not in indexed]
    if (
        not isinstance(w, Weight)
        or numbers.operand_batching_dims
        or tuple(numbers.collapsed_slice_dims) != tuple(sorted(indexed))
        or any(sizes[d] != w.shape[d] for d in whole)
    ):
        raise Unfactorable("more than whole rows of the weight are looked up")
    out = _compat.bind_one(eqn, w.value, indices)
    dims: list[int | None] = [None] * out.ndim  # None: an axis of the indices
    for old, new in zip(whole, numbers.offset_dims, strict=True):
        dims[new] = old
    rows = [i for i, d in enumerate(dims) if d is None]

    def look_up(f: Factor) -> Factor:
        """The rows of a factor; its axes are those of the indices, then its own others."""
        mine = [d for d in indexed if d in f.dims]
        if not mine:
            return f.move(dims, {})
        rest = [d for d in f.dims if d not in mine]
        lead = f.arrange([*mine, *rest])
        at = tuple(range(len(mine)))
        value = lax.gather(
            lead,
            indices[..., jnp.asarray([indexed.index(d) for d in mine])],
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(len(rows), len(rows) + len(rest))),
                collapsed_slice_dims=at,
                start_index_map=at,
            ),
            slice_sizes=(*(1 for _ in mine), *lead.shape[len(mine) :]),
            mode=p["mode"],
            fill_value=None if p["fill_value"] is None else 0,
        )
        return Factor(value, (*rows, *(d if d == RANK else dims.index(d) for d in rest)))

    if all(t.follows(indexed, len(whole)) for t in w.terms):
        return w.with_terms(out, lambda t: t.look_up(look_up, dims, indexed))

    def product(term: Delta) -> jax.Array:
        if any(d in term.a.dims and d in term.b.dims for d in indexed):
            raise Unfactorable("rows and stacked matrices are looked up at once")
        kept = dataclasses.replace(term, key=None).look_up(look_up, dims, indexed)
        axes = letters(out.ndim)
        a, b = kept.complete(out.shape, ())
        # A row that is looked up is an input of A that is 1: dropout keeps it or not.
        keep = term.drop(jnp.ones([out.shape[i] for i in rows], a.value.dtype))
        spec = f"{''.join(axes[i] for i in rows)},{a.label(axes)},{b.label(axes)}->{axes}"
        return term.scale * jnp.einsum(spec, keep, a.value, b.value)

    return _plus(out, w, "embed", Roles((), indexed, tuple(whole)), product)
