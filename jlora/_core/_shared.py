r"""Activations that several products share, one of them with an adapted weight.

Where q, k and v are products with one x, the gradient of x is a sum over all three and over what
their ΔW add. On a mesh that splits W's outputs each product with W leaves partial sums, and XLA
reduces their sum once, but only if nothing that is whole already is added in between, as is what
ΔW adds, whose reduction was that of the small $\bar h$. So the low-rank path has an x of its
own, and what it adds comes after the sum of the others: one reduction of the activation's size, as
without an adapter.

And the products are free to be evaluated one after the other, as soon as the first is: so the
activation is read once for the A of all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _compat


class Forked(NamedTuple):
    """An activation twice: for the model's own operations, and for the low-rank ones."""

    main: Any
    low_rank: Any


def main(x: Any) -> Any:
    """`x` as the model sees it."""
    return x.main if isinstance(x, Forked) else x


def low_rank_operand(x: Any) -> Any:
    """`x` as the low-rank path sees it."""
    return x.low_rank if isinstance(x, Forked) else x


def fork(x: Any) -> Any:
    """`x` twice, if it has a gradient; the gradients of the two are summed apart, then added."""
    if isinstance(x, Forked) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return Forked(*_twice(x))


@jax.custom_jvp
def _twice(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, x


@_twice.defjvp
def _twice_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    # The transpose of a copy takes the sum of all cotangents of that copy. XLA sees no copies.
    return _twice(*primals), (jnp.copy(tangents[0]), jnp.copy(tangents[0]))


def shared(jaxpr: Any, weights: Iterable[bool], rules: Mapping[str, Any]) -> dict[Any, list[Any]]:
    """The variables of `jaxpr` that it uses several times, one of them with an adapted weight.

    For each the equations of `jaxpr` that may be evaluated together: they multiply it with weights,
    none of which follows from a product.

    Args:
        jaxpr: to be evaluated.
        weights: for each input, whether it is an adapted weight.
        rules: the rule of each primitive, which says whether it `multiplies` and what it `calls`.
    """
    count: dict[Any, int] = {}
    for eqn in jaxpr.eqns:
        for v in variables(eqn.invars):
            count[v] = count.get(v, 0) + 1
    found = _multiplied(jaxpr, weights, rules)[0]
    return {v: eqns for v, eqns in found.items() if count[v] > 1}


def _multiplied(
    jaxpr: Any, weights: Iterable[bool], rules: Mapping[str, Any]
) -> tuple[dict[Any, list[Any]], list[bool]]:
    """The variables that are multiplied with a weight, and which outputs are weights again."""
    heavy = {v for v, is_weight in zip(jaxpr.invars, weights, strict=True) if is_weight}
    late: set[Any] = set()  # what follows from a product, or has an effect
    found: dict[Any, list[Any]] = {}
    for eqn in jaxpr.eqns:
        used = variables(eqn.invars)
        if eqn.effects or not late.isdisjoint(used):
            late.update(eqn.outvars)
        if heavy.isdisjoint(used):
            continue
        rule = rules.get(eqn.primitive.name)
        if rule is not None and rule.multiplies:
            early = rule.together is not None and late.isdisjoint(heavy.intersection(used))
            for v in used:
                if v not in heavy:
                    found.setdefault(v, []).extend([eqn] * early)
            late.update(eqn.outvars)
        elif rule is not None and rule.calls is not None:
            inner = eqn.params[rule.calls]
            flags = [not _compat.is_literal(v) and v in heavy for v in eqn.invars]
            multiplied, outs = _multiplied(inner, flags, rules)
            for v, i in zip(eqn.invars, inner.invars, strict=True):
                if i in multiplied and not _compat.is_literal(v):
                    found.setdefault(v, [])
            late.update(eqn.outvars if multiplied else ())
            heavy.update(v for v, is_weight in zip(eqn.outvars, outs, strict=True) if is_weight)
        else:
            heavy.update(eqn.outvars)
    return found, [not _compat.is_literal(v) and v in heavy for v in jaxpr.outvars]


def variables(atoms: Sequence[Any]) -> list[Any]:
    """`atoms` without the literals among them."""
    return [v for v in atoms if not _compat.is_literal(v)]
