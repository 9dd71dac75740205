"""Bytes that a traced function holds at once, as if nothing were fused."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from .. import _compat

Size = Callable[[Any], int]


def held(jaxpr: Any, size: Size) -> int:
    """The largest sum of `size` over the values that live at one moment; arguments are not counted.

    A value lives from its equation to its last use. What a loop's body holds counts once, and what
    it stacks in full, as in the loop's results. The results of a call are those of its body.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> f = jax.make_jaxpr(lambda x: jnp.sin(jnp.sin(x)).sum())(jnp.ones(8))
        >>> held(f, lambda aval: aval.size)
        16
    """
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    end = len(jaxpr.eqns)
    last |= dict.fromkeys(_variables(jaxpr.outvars), end)
    live: dict[Any, int] = {}
    most = 0
    for i, eqn in enumerate(jaxpr.eqns):
        outs = {v: size(v.aval) for v in eqn.outvars}
        before, results = sum(live.values()), sum(outs.values())
        inside = [held(b, size) + (0 if _is_call(eqn, b) else results) for b in _bodies(eqn)]
        most = max(most, before + max([results, *inside]))
        live |= outs
        for v in [v for v in live if last.get(v, i) <= i]:
            del live[v]
    return most


def _variables(atoms: Any) -> list[Any]:
    return [x for x in atoms if not _compat.is_literal(x)]


def _is_call(eqn: Any, body: Any) -> bool:
    """Whether the results of `body` are those of the equation, as they come."""
    of_eqn, of_body = ([getattr(v.aval, "shape", None) for v in x.outvars] for x in (eqn, body))
    return of_eqn == of_body


def _bodies(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if hasattr(x, "eqns"):
                yield x


def shard_size(aval: Any) -> int:
    """The bytes of an array on one device, as far as its type says where it lies."""
    shape = getattr(aval, "shape", ())
    sharding = getattr(aval, "sharding", None)
    if sharding is not None:
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * getattr(getattr(aval, "dtype", None), "itemsize", 0)
