"""Higher-order primitives, each rebuilt through its public combinator."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from .. import _compat
from ._arrays import explicit
from ._interpret import Equation, materialized, rule
from ._shards import constrain, pieces, place, shard_of, specs
from ._weight import Weight


@rule("jit", is_move=False)
def _jit(eqn: Equation, *operands: Any) -> list[Any]:
    # Inlined: a new function under `jax.jit` would be compiled at every eager call.
    p = eqn.params
    args = map(_constrain, operands, p["in_shardings"])
    return list(map(_constrain, eqn.evaluate(p["jaxpr"], *args), p["out_shardings"]))


def _constrain(x: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return x
    if isinstance(x, Weight):
        return constrain(x, sharding)
    return lax.with_sharding_constraint(x, sharding)


@rule("closed_call", is_move=False)
def _call(eqn: Equation, *operands: Any) -> list[Any]:
    return eqn.evaluate(eqn.params["call_jaxpr"], *operands)


@rule("remat2", is_move=False)
def _checkpoint(eqn: Equation, *operands: Any) -> list[Any]:
    p = eqn.params
    body = jax.checkpoint(
        lambda *xs: eqn.evaluate(p["jaxpr"], *xs),
        prevent_cse=p["prevent_cse"],
        policy=p["policy"],
    )
    return body(*operands)


@rule("cond", is_move=False)
def _cond(eqn: Equation, index: Any, *operands: Any) -> list[Any]:
    branches = eqn.params["branches"]
    index = materialized(index, lambda: f"the predicate of {eqn.where}")
    platforms = eqn.params.get("branches_platforms")
    same = _common([_forwarded(b) for b in branches])
    n = len(branches[0].outvars)
    computed = [i for i in range(n) if i not in same]

    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        return lambda *xs: eqn.arrays([eqn.evaluate(jaxpr, *xs)[i] for i in computed])

    each = [branch(b) for b in branches]
    if platforms is None:
        found = lax.switch(index, each, *operands)
    else:
        named = zip(platforms, each, strict=True)
        by_name = {name: f for names, f in named for name in names or ("default",)}
        found = lax.platform_dependent(*operands, **by_name)
    outs = dict(zip(computed, found, strict=True))
    outs |= {i: operands[source] for i, source in same.items()}
    return [outs[i] for i in range(n)]


def _common(maps: list[dict[int, int]]) -> dict[int, int]:
    first, *others = maps
    return {i: s for i, s in first.items() if all(m.get(i) == s for m in others)}


@rule("while", is_move=False)
def _while(eqn: Equation, *operands: Any) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts = operands[:n_cond]
    body_consts = operands[n_cond : n_cond + n_body]
    init = list(operands[n_cond + n_body :])
    loop = _Loop(eqn, init, {i: s - n_body for i, s in _forwarded(p["body_jaxpr"]).items()})

    def cond(state: Any) -> Any:
        return eqn.arrays(eqn.evaluate(p["cond_jaxpr"], *cond_consts, *loop.carry(state)))[0]

    def body(state: Any) -> Any:
        return loop.state(eqn.evaluate(p["body_jaxpr"], *body_consts, *loop.carry(state)))

    return loop.carry(lax.while_loop(cond, body, loop.state(init)))


@rule("scan", is_move=False)
def _scan(eqn: Equation, *operands: Any) -> list[Any]:
    p = eqn.params
    jaxpr, (n_consts, n_carry) = p["jaxpr"], _compat.scan_counts(p)
    consts, init = operands[:n_consts], list(operands[n_consts : n_consts + n_carry])
    xs = list(operands[n_consts + n_carry :])
    forwarded = _forwarded(jaxpr)
    loop = _Loop(eqn, init, {i: s - n_consts for i, s in forwarded.items() if i < n_carry})
    # A weight that the body returns as it came need not be stacked again.
    n_ys = len(jaxpr.outvars) - n_carry
    whole = {
        i: xs[s]
        for i in range(n_ys)
        if 0 <= (s := forwarded.get(n_carry + i, -1) - n_consts - n_carry) < len(xs)
        and isinstance(xs[s], Weight)
    }

    def body(state: Any, slices: Any) -> tuple[Any, list[Any]]:
        inside = [x.as_slice() if isinstance(x, Weight) else x for x in slices]
        outs = eqn.evaluate(jaxpr, *consts, *loop.carry(state), *inside)
        ys = [y for i, y in enumerate(outs[n_carry:]) if i not in whole]
        return loop.state(outs[:n_carry]), eqn.arrays(ys)

    state, ys = lax.scan(
        body,
        loop.state(init),
        [x.as_stack() if isinstance(x, Weight) else x for x in xs],
        p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    computed = iter(ys)
    return loop.carry(state) + [whole[i] if i in whole else next(computed) for i in range(n_ys)]


class _Loop:
    """The carry of a loop: weights that each turn returns as they came stay out of the state."""

    def __init__(self, eqn: Equation, init: list[Any], forwarded: Mapping[int, int]) -> None:
        self.eqn = eqn
        self.fixed = {
            i: x for i, x in enumerate(init) if isinstance(x, Weight) and forwarded.get(i) == i
        }
        self.size = len(init)

    def state(self, carry: list[Any]) -> list[Any]:
        """The arrays among `carry` that change."""
        return self.eqn.arrays([x for i, x in enumerate(carry) if i not in self.fixed])

    def carry(self, state: list[Any]) -> list[Any]:
        """The whole carry."""
        changing = iter(state)
        return [self.fixed[i] if i in self.fixed else next(changing) for i in range(self.size)]


@rule("shard_map", is_move=False)
def _shard_map(eqn: Equation, *operands: Any) -> list[Any]:
    p = eqn.params
    sizes = dict(p["mesh"].shape)
    operands = tuple(
        x.replace(x.w.cut(pieces(x, spec, sizes))) if isinstance(x, Weight) else x
        for x, spec in zip(operands, p["in_specs"], strict=True)
    )
    pairs = list(zip(operands, p["in_specs"], strict=True))
    # Along explicit mesh axes, A and B must lie as `shard_map` takes them.
    operands = tuple(
        place(x, p["mesh"], spec) if isinstance(x, Weight) and explicit(x.type) else x
        for x, spec in pairs
    )
    unchecked = frozenset() if p["check_vma"] else frozenset(p["newly_manual_axes"])

    def inner(*xs: Any) -> tuple[Any, ...]:
        inside = [
            shard_of(x, spec, unchecked, var.aval) if isinstance(x, Weight) else x
            for x, (_, spec), var in zip(xs, pairs, p["jaxpr"].invars, strict=True)
        ]
        return tuple(eqn.arrays(eqn.evaluate(p["jaxpr"], *inside)))

    body = jax.shard_map(
        inner,
        mesh=p["mesh"],
        in_specs=tuple(specs(x, s) if isinstance(x, Weight) else s for x, s in pairs),
        out_specs=tuple(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return list(body(*operands))


def _forwarded(jaxpr: Any) -> dict[int, int]:
    """Outputs that are inputs as they came, also through inner calls: output to input."""
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "remat2"):
            for out, inner in _forwarded(eqn.params["jaxpr"]).items():
                atom = eqn.invars[inner]
                if not _compat.is_literal(atom) and atom in source:
                    source[eqn.outvars[out]] = source[atom]
    return {
        i: source[v]
        for i, v in enumerate(jaxpr.outvars)
        if not _compat.is_literal(v) and v in source
    }
