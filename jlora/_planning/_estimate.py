"""Bytes that a traced step holds at once on a device, as XLA would fuse and cut its values.

Along automatic mesh axes a type does not say where its value lies. That is followed from the
arguments, and from what the model constrains, through each operation. What an elementwise operation
gives is computed wherever it is read, so that what it is computed from lives on instead.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .. import _compat
from .._core import explicit
from .._policy import CHEAP

Layout = tuple[tuple[str, ...], ...]  # for each axis of a value the mesh axes that cut it
Mesh = Mapping[str, int]  # the length of each mesh axis

_FUSED = CHEAP | {
    *("div", "dynamic_slice", "log", "name", "pow", "reduce_precision", "rsqrt", "slice", "sqrt")
}
_SUMS = frozenset({"add", "add_any"})
_LOOPS = frozenset({"scan", "while"})
_IN_PLACE = _SUMS | _LOOPS | {"dynamic_update_slice", "scatter", "scatter-add"}


class _Operation(NamedTuple):
    """An equation, and names of its values: those of a program that is called twice differ."""

    eqn: Any
    inputs: list[Any]  # None for a literal
    outputs: list[Any]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


def held(jaxpr: Any, layouts: Sequence[Layout], mesh: Mesh) -> tuple[int, list[Layout]]:
    """Bytes of the values that live at one moment, at most, and where the results lie.

    A value lives from its operation to its last use. Arguments are not counted, but what products
    need whole of them is, all at once, as XLA gathers ahead. What a loop's body holds counts once,
    and what it stacks in full, as in the loop's results.

    Args:
        jaxpr: of the step.
        layouts: where its arguments lie.
        mesh: the length of each mesh axis.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> f = jax.make_jaxpr(lambda w, x: jnp.sin(x @ w) @ w)(jnp.ones((8, 8)), jnp.ones((2, 8)))
        >>> held(f, [((), ()), ((), ())], {})[0]
        128
        >>> held(f, [((), ()), (("data",), ())], {"data": 2})[0]
        64
    """
    names, given = {v: v for v in jaxpr.invars}, frozenset(jaxpr.invars)
    operations = list(_flat(jaxpr, names))
    results = [_name(names, v) for v in jaxpr.outvars]
    operations = _needed(operations, results)
    lies: dict[Any, Layout] = dict(zip(jaxpr.invars, layouts, strict=True))
    # For the hints and again: not twice for a loop, or it would be 2ⁿ times for n in each other.
    found = functools.cache(lambda i, known: _results(operations[i], known, mesh))
    hints = _hints(operations, lies, found)
    # The written values that are read where a name is read.
    read: dict[Any, frozenset[Any]] = {v: frozenset({v}) for v in given}
    none = frozenset[Any]()
    size: dict[Any, int] = dict.fromkeys(given, 0)
    last: dict[Any, int] = {}
    gathered: dict[frozenset[Any], int] = {}
    written: list[tuple[int, _Operation, int, frozenset[Any]]] = []
    for i, op in enumerate(operations):
        known = _known(op, lies)
        inside, outs = found(i, known)
        for v, var, out in zip(op.outputs, op.eqn.outvars, outs, strict=True):
            lies[v] = out if any(out) else hints.get(v, out)
            size[v] = _bytes(var.aval, lies[v], mesh)
        sources = [read.get(v, none) for v in op.inputs]
        if op.name == "dot_general":
            wholes = zip(sources, _gathered(op, known, outs[0], mesh), strict=True)
            gathered |= {source: n for source, n in wholes if n and source <= given}
        if op.name == "optimization_barrier":
            read |= dict(zip(op.outputs, sources, strict=True))
        elif _is_fused(op, sources, lies, size):
            read |= dict.fromkeys(op.outputs, none.union(*sources))
        else:
            read |= {v: frozenset({v}) for v in op.outputs}
            last |= dict.fromkeys(none.union(*sources, op.outputs), i)
            written.append((i, op, inside, none.union(*sources)))
    last |= dict.fromkeys(none.union(*(read.get(v, none) for v in results)), len(operations))
    most, live = _most(written, size, last)
    fused = sum(size[v] for v in set(results) if v in size and read[v] != {v})
    most = max(most, live + fused) + sum(gathered.values())
    return most, [lies.get(v, ()) for v in results]


def _most(
    written: Sequence[tuple[int, _Operation, int, frozenset[Any]]],
    size: Mapping[Any, int],
    last: Mapping[Any, int],
) -> tuple[int, int]:
    """Bytes of what lives at once, at most, and in the end.

    Args:
        written: operations that write: number, operation, what it holds itself, what it reads.
        size: of each value.
        last: the number of the operation that reads it last.
    """
    ends: dict[int, list[int]] = {}
    for v, i in last.items():
        ends.setdefault(i, []).append(size[v])
    live, most = 0, 0
    for i, op, inside, sources in written:
        new = sum(size[v] for v in op.outputs)
        old = max((size[v] for v in sources if last[v] == i), default=0)
        reused = min(new, old) if op.name in _IN_PLACE else 0
        most = max(most, live + inside + new - reused)
        live += new - sum(ends.get(i, []))
    return most, live


# ------------------------------------------------------------------------------------- operations


def _name(names: Mapping[Any, Any], atom: Any) -> Any:
    return None if _compat.is_literal(atom) else names.get(atom)


def _flat(jaxpr: Any, names: dict[Any, Any]) -> Iterator[_Operation]:
    """The operations of `jaxpr` and of what it calls, in order; `names` gets their values'."""
    for eqn in jaxpr.eqns:
        inputs = [_name(names, v) for v in eqn.invars]
        body = _called(eqn)
        if eqn.params.get("branches_platforms") is not None:
            body, inputs = eqn.params["branches"][-1], inputs[1:]  # that of accelerators
        if body is None:
            outputs: list[Any] = [object() for _ in eqn.outvars]
            yield _Operation(eqn, inputs, outputs)
        else:
            inner = dict(zip(body.invars, inputs, strict=True))
            yield from _flat(body, inner)
            outputs = [_name(inner, v) for v in body.outvars]
        names.update(zip(eqn.outvars, outputs, strict=True))


def _called(eqn: Any) -> Any:
    """The jaxpr that is evaluated in the place of `eqn`, if any."""
    if eqn.primitive.name in (*_LOOPS, "cond", "shard_map"):
        return None
    values = (x if isinstance(x, tuple | list) else (x,) for x in eqn.params.values())
    bodies = [x for each in values for x in each if hasattr(x, "eqns")]
    sizes = (len(eqn.invars), len(eqn.outvars))
    return next((x for x in bodies[::-1] if (len(x.invars), len(x.outvars)) == sizes), None)


def _needed(operations: Sequence[_Operation], results: Sequence[Any]) -> list[_Operation]:
    needed, kept = set(results), []
    for op in reversed(operations):
        if op.eqn.effects or needed.intersection(op.outputs):
            needed.update(op.inputs)
            kept.append(op)
    return kept[::-1]


def _is_fused(
    op: _Operation,
    read: Sequence[frozenset[Any]],
    lies: Mapping[Any, Layout],
    size: Mapping[Any, int],
) -> bool:
    """Whether nothing is written for it; of two products one is, and the other added to it."""
    if op.name == "sharding_constraint":
        return lies.get(op.inputs[0]) == lies[op.outputs[0]]
    if op.name in _SUMS:
        return not all(any(size[v] >= size[op.outputs[0]] for v in each) for each in read)
    return op.name in _FUSED


def _bytes(aval: Any, layout: Layout, mesh: Mesh) -> int:
    """On one device; along axes of a mesh that only the model knows of, whole."""
    shape = getattr(aval, "shape", ())
    parts = [math.prod(mesh.get(a, 1) for a in axes) for axes in layout] or [1] * len(shape)
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return math.prod(-(-n // p) for n, p in zip(shape, parts, strict=True)) * itemsize


# ---------------------------------------------------------------------------------- where it lies


def layout_of(spec: Any, ndim: int) -> Layout:
    """The mesh axes along each axis of an array whose partition is `spec`."""
    entries = (*spec, *(None,) * (ndim - len(spec)))
    return tuple(e if isinstance(e, tuple) else (e,) if isinstance(e, str) else () for e in entries)


def _known(op: _Operation, lies: Mapping[Any, Layout]) -> tuple[Layout, ...]:
    """Where the operands lie."""
    pairs = zip(op.inputs, op.eqn.invars, strict=True)
    return tuple(lies.get(v) or ((),) * len(var.aval.shape) for v, var in pairs)


def _hints(
    operations: Sequence[_Operation], lies: Mapping[Any, Layout], found: Callable[..., Any]
) -> dict[Any, Layout]:
    """For values that lie nowhere, as zeros do, where what they are added to does.

    `found` gives the results of an operation, by its number and where its operands lie.
    """
    lies, hints = dict(lies), {}
    for i, op in enumerate(operations):
        lies |= dict(zip(op.outputs, found(i, _known(op, lies))[1], strict=True))
    for op in reversed(operations):
        if op.name not in _FUSED | _IN_PLACE - _LOOPS:
            continue
        out, shape = op.outputs[0], op.eqn.outvars[0].aval.shape
        for v, var in zip(op.inputs, op.eqn.invars, strict=True):
            if v is not None and not any(lies.get(v, ())) and var.aval.shape == shape:
                hints[v] = hints.get(out, lies[out])
    return hints


def _results(op: _Operation, layouts: Sequence[Layout], mesh: Mesh) -> tuple[int, list[Layout]]:
    """What an operation holds beside its results, and where those lie."""
    p, avals = op.eqn.params, [v.aval for v in op.eqn.outvars]
    if op.name == "scan":
        consts, carry = _compat.scan_counts(p)
        n = consts + carry
        inside, outs = held(p["jaxpr"], [*layouts[:n], *(x[1:] for x in layouts[n:])], mesh)
        stacked = [((), *x) if x else ((),) * a.ndim for x, a in zip(outs, avals, strict=True)]
        return inside, [*outs[:carry], *stacked[carry:]]
    if op.name == "while":
        return held(p["body_jaxpr"], layouts[p["cond_nconsts"] :], mesh)
    if op.name == "cond":
        each = [held(branch, layouts[1:], mesh) for branch in p["branches"]]
        most = max(size for size, _ in each)
        outs = each[-1][1]
        return max(0, most - sum(map(_bytes, avals, outs, [mesh] * len(outs)))), outs
    if op.name == "shard_map":
        inside, _ = held(p["jaxpr"], [((),) * len(x) for x in layouts], mesh)
        specs = zip(p["out_specs"], avals, strict=True)
        return inside, [layout_of(spec, a.ndim) for spec, a in specs]
    return 0, [_lies(op, a, layouts) for a in avals]


def _lies(op: _Operation, out: Any, layouts: Sequence[Layout]) -> Layout:
    p, shapes = op.eqn.params, [v.aval.shape for v in op.eqn.invars]
    if (known := explicit(out)) is not None:
        return layout_of(known.spec, out.ndim)
    if op.name == "sharding_constraint":
        return layout_of(p["sharding"].spec, out.ndim)
    if op.name == "dot_general":
        return _product(op, layouts)
    if op.name == "transpose":
        return tuple(layouts[0][d] for d in p["permutation"])
    if op.name == "reshape":
        return _reshaped(shapes[0], layouts[0], out.shape)
    if op.name == "broadcast_in_dim":
        old = {d: e for e, d in enumerate(p["broadcast_dimensions"])}
        same = {d: e for d, e in old.items() if shapes[0][e] == out.shape[d]}
        return tuple(layouts[0][same[d]] if d in same else () for d in range(out.ndim))
    if op.name == "gather":
        offset, rows = p["dimension_numbers"].offset_dims, iter(layouts[1])
        return tuple(() if d in offset else next(rows) for d in range(out.ndim))
    if layouts and len(layouts[0]) > out.ndim:  # a reduction, or a loss of axes of length 1
        lost = p.get("axes", p.get("dimensions", ()))
        return tuple(x for d, x in enumerate(layouts[0]) if d not in lost)[: out.ndim]
    alike = [x for x, shape in zip(layouts, shapes, strict=True) if len(shape) == out.ndim]
    shapes = [shape for shape in shapes if len(shape) == out.ndim]
    return _once(
        [
            next((x[d] for x, s in zip(alike, shapes, strict=True) if x[d] and s[d] == n), ())
            for d, n in enumerate(out.shape)
        ]
    )


def _once(axes: Sequence[tuple[str, ...]]) -> Layout:
    """No mesh axis cuts twice: the first keeps it."""
    used: set[str] = set()
    out = []
    for names in axes:
        out.append(tuple(a for a in names if a not in used))
        used.update(names)
    return tuple(out)


def _reshaped(old: Sequence[int], layout: Layout, new: Sequence[int]) -> Layout:
    """The first of the axes that become one, or that one becomes, keeps the mesh axes."""
    ends = {math.prod(new[j:]): j for j in range(len(new)) if new[j] > 1}
    found: list[tuple[str, ...]] = [()] * len(new)
    for i, names in enumerate(layout):
        if names and (end := math.prod(old[i:])) in ends:
            found[ends[end]] = names
    return tuple(found)


def _product(op: _Operation, layouts: Sequence[Layout]) -> Layout:
    """The larger operand stays cut as it is; the other along the mesh axes that are left."""
    x, y = op.eqn.invars
    order = [0, 1] if x.aval.size >= y.aval.size else [1, 0]
    places = _places(op)
    axes = [(place, layouts[i][d]) for i in order for d, place in places[i].items()]
    first = dict.fromkeys(place for place, _ in axes)
    cut = dict(reversed([(place, names) for place, names in axes if names]))
    found = dict(zip(first, _once([cut.get(place, ()) for place in first]), strict=True))
    return tuple(found[place] for place in sorted(found))


def _gathered(op: _Operation, layouts: Sequence[Layout], out: Layout, mesh: Mesh) -> list[int]:
    """The bytes of each operand of a product that it needs whole along mesh axes that cut it."""
    contracted, _ = op.eqn.params["dimension_numbers"]
    sizes = []
    for i, places in enumerate(_places(op)):
        meets = dict(zip(contracted[i], contracted[1 - i], strict=True))
        beside = [
            out[places[d]] if d in places else layouts[1 - i][meets[d]]
            for d in range(len(layouts[i]))
        ]
        whole = tuple(
            tuple(a for a in names if a in other)
            for names, other in zip(layouts[i], beside, strict=True)
        )
        sizes.append(_bytes(op.eqn.invars[i].aval, whole, mesh) * (whole != layouts[i]))
    return sizes


def _places(op: _Operation) -> list[dict[int, int]]:
    """For each operand of a product, where in the result its axes are that are not contracted."""
    contracted, batch = op.eqn.params["dimension_numbers"]
    places, n = [], len(batch[0])
    for i, v in enumerate(op.eqn.invars):
        free = [d for d in range(v.aval.ndim) if d not in (*contracted[i], *batch[i])]
        places.append(
            {d: k for k, d in enumerate(batch[i])} | {d: n + k for k, d in enumerate(free)}
        )
        n += len(free)
    return places
