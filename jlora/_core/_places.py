"""Primitives that say where a weight lies on a mesh, or that act on it only as an array."""

from typing import Any

import jax
from jax import lax

from .. import _compat
from ._axes import Factor, Unfactorable
from ._change import Change
from ._interpret import Equation, rule
from ._packed import Packed
from ._shards import constrain, pieces, place
from ._weight import Weight


@rule("copy", "device_put", "name")
def _same(eqn: Equation, w: Weight) -> Weight:
    return w if isinstance(w.w, Packed) else w.each(eqn.bind)


@rule("optimization_barrier")
def _optimization_barrier(eqn: Equation, *operands: Any) -> list[Any]:
    values = [x.w if isinstance(x, Weight) else x for x in operands]
    outs = lax.optimization_barrier(values)
    return [
        x.replace(out) if isinstance(x, Weight) else out
        for x, out in zip(operands, outs, strict=True)
    ]


@rule("stop_gradient", "pvary")
def _stop_gradient(eqn: Equation, w: Weight) -> Weight:
    # A dropout key stays: where it does not vary, each shard draws a mask of its own.
    return w.map(lambda f: f if f.is_key else f.each(eqn.bind))


@rule("sharding_constraint")
def _sharding_constraint(eqn: Equation, w: Weight) -> Weight:
    return constrain(w, eqn.params["sharding"]) if isinstance(w.w, Packed) else w.each(eqn.bind)


@rule("reshard")
def _reshard(eqn: Equation, w: Weight) -> Weight:
    old, new = w.type.sharding, eqn.params["dst_sharding"]
    # A and B stay where they are, unless W goes to a mesh on which other axes are explicit.
    stays = old is not None and old.mesh.axis_types == new.mesh.axis_types
    base = w.w.cut(pieces(w, new.spec, new.mesh.shape))
    placed = place(w.replace(base, Change() if stays else None), new.mesh, new.spec)
    return w.replace(placed.w, w.change if stays else placed.change)


@rule("all_gather")
def _all_gather(eqn: Equation, w: Weight) -> Weight:
    p = eqn.params
    if not p["tiled"] or p["axis_index_groups"] is not None:
        raise Unfactorable("it is gathered along a new axis or in groups")
    gathered = w.axes[p["all_gather_dimension"]]
    over = {p["axis_name"]} if isinstance(p["axis_name"], str) else set(p["axis_name"])

    def gather(f: Factor) -> Factor:
        if gathered in f.axes:
            return f.along({gathered: gather_along})
        if over & (f.varying | _compat.varying(f.value)):
            raise Unfactorable(
                "A or B may vary over the mesh axis of the gather, but has not the axis that is "
                "gathered; with shard_map(check_vma=True) it is known whether it does"
            )
        return f

    def gather_along(x: jax.Array, i: int) -> jax.Array:
        return lax.all_gather(x, p["axis_name"], axis=i, tiled=True)

    out = w.replace(w.w.cut({gathered: 1})).map(gather)
    return out.replace(out.w.with_type(w.axes, eqn.outputs[0]))
