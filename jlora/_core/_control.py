"""Higher-order primitives, each rebuilt through its public combinator."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .. import _compat
from .._arrays import explicit
from ._interpret import Equation, as_array, primitive
from ._shards import constrain, pieces, place, shard_of, specs
from ._weight import Operand, Weight


def _traced_once(f: Callable[..., list[Operand]]) -> Callable[..., list[Operand]]:
    """Makes equal equations share `f(equation, *operands)`."""
    return lambda eqn, *_: eqn.share(f)


@primitive("jit", is_move=False)
@_traced_once
def _jit(eqn: Equation, *xs: Operand) -> list[Operand]:
    p = eqn.params
    args = map(constrain, xs, p["in_shardings"])
    return list(map(constrain, eqn.evaluate(p["jaxpr"], *args), p["out_shardings"]))


@primitive("closed_call", is_move=False)
@_traced_once
def _call(eqn: Equation, *xs: Operand) -> list[Operand]:
    return eqn.evaluate(eqn.params["call_jaxpr"], *xs)


@primitive("remat2", is_move=False)
@_traced_once
def _checkpoint(eqn: Equation, *xs: Operand) -> list[Operand]:
    p = eqn.params
    body = functools.partial(eqn.evaluate, p["jaxpr"])
    return jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(*xs)


@primitive("cond", is_move=False)
def _cond(eqn: Equation, index: Operand, *operands: Operand) -> list[Operand]:
    index = as_array(index, lambda: f"the predicate of {eqn.where}")
    jaxprs = eqn.params["branches"]
    platforms = eqn.params.get("branches_platforms")
    same = set.intersection(*({*_forwarded(jaxpr).items()} for jaxpr in jaxprs))
    kept = {i: operands[source] for i, source in same}
    branches = [lambda *xs, j=j: eqn.arrays(eqn.evaluate(j, *xs), kept) for j in jaxprs]
    if platforms is None:
        return _put_back(lax.switch(index, branches, *operands), kept)
    named = zip(platforms, branches, strict=True)
    by_name = {name: f for names, f in named for name in names or ("default",)}
    return _put_back(lax.platform_dependent(*operands, **by_name), kept)


def _put_back(xs: Sequence[Any], kept: Mapping[int, Operand]) -> list[Operand]:
    """Replaces the entries of `xs` whose index is in `kept`."""
    return [kept.get(i, x) for i, x in enumerate(xs)]


@primitive("while", is_move=False)
def _while(eqn: Equation, *operands: Operand) -> list[Operand]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    of_cond, of_body = operands[:n_cond], operands[n_cond : n_cond + n_body]
    init = operands[n_cond + n_body :]
    kept = {
        i: init[i]
        for i, source in _forwarded(p["body_jaxpr"]).items()
        if source == n_body + i and isinstance(init[i], Weight)
    }

    def cond(state: list[jax.Array | None]) -> jax.Array:
        [*state, i] = state
        inside = _fold_in(i, *of_cond, *_put_back(state, kept))
        return eqn.arrays(eqn.evaluate(p["cond_jaxpr"], *inside))[0]

    def body(state: list[jax.Array | None]) -> list[jax.Array | None]:
        [*state, i] = state
        inside = _fold_in(i, *of_body, *_put_back(state, kept))
        return [
            *eqn.arrays(eqn.evaluate(p["body_jaxpr"], *inside), kept),
            i if i is None else i + 1,
        ]

    first = jnp.int32(0) if _have_keys(operands) else None
    [*state, _] = lax.while_loop(cond, body, [*eqn.arrays(init, kept), first])
    return _put_back(state, kept)


def _have_keys(operands: Sequence[Any]) -> bool:
    return any(isinstance(x, Weight) and x.has_keys for x in operands)


def _fold_in(i: jax.Array | None, *operands: Operand) -> list[Operand]:
    """Folds the number of the iteration, if it is counted, into the keys of each weight."""
    return [x.fold_in(i) if i is not None and isinstance(x, Weight) else x for x in operands]


@primitive("scan", is_move=False)
def _scan(eqn: Equation, *operands: Operand) -> list[Operand]:
    p = eqn.params
    jaxpr = p["jaxpr"]
    n_consts, n_carry = _compat.scan_counts(p)
    first = n_consts + n_carry  # the first operand that the loop slices
    # A weight that each iteration returns unchanged is neither carried nor stacked again.
    kept = {
        i: operands[source]
        for i, source in _forwarded(jaxpr).items()
        if isinstance(operands[source], Weight)
        and (source == n_consts + i if i < n_carry else source >= first)
    }

    numbers = jnp.arange(p["length"]) if _have_keys(operands) else None

    def body(
        state: list[jax.Array], own: tuple[jax.Array | None, list[Operand]]
    ) -> tuple[list[Any], list[Any]]:
        i, slices = own
        slices = [x.as_slice() if isinstance(x, Weight) else x for x in slices]
        # Slices too: those of a weight that is repeated have one key.
        inside = _fold_in(i, *operands[:n_consts], *_put_back(state, kept), *slices)
        outs = eqn.arrays(eqn.evaluate(jaxpr, *inside), kept)
        return outs[:n_carry], outs[n_carry:]

    state, ys = lax.scan(
        body,
        eqn.arrays(operands[n_consts:first], kept),
        (numbers, [x.as_stack() if isinstance(x, Weight) else x for x in operands[first:]]),
        p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return _put_back([*state, *ys], kept)


@primitive("shard_map", is_move=False)
def _shard_map(eqn: Equation, *operands: Operand) -> list[Operand]:
    p = eqn.params
    unchecked = frozenset() if p["check_vma"] else frozenset(p["newly_manual_axes"])

    def enter(x: Operand, spec: PartitionSpec) -> Operand:
        if not isinstance(x, Weight):
            return x
        x = x.replace(x.w.with_pieces(pieces(x, spec, p["mesh"])))
        # Along explicit mesh axes, A and B must be sharded as the specs of `shard_map` say.
        return place(x, p["mesh"], spec) if explicit(x.type) else x

    def inner(*xs: Operand) -> tuple[Any, ...]:
        inside = [
            shard_of(x, spec, unchecked, var.aval.shape) if isinstance(x, Weight) else x
            for x, spec, var in zip(xs, p["in_specs"], p["jaxpr"].invars, strict=True)
        ]
        return tuple(eqn.arrays(eqn.evaluate(p["jaxpr"], *inside)))

    operands = tuple(map(enter, operands, p["in_specs"]))
    pairs = zip(operands, p["in_specs"], strict=True)
    body = jax.shard_map(
        inner,
        mesh=p["mesh"],
        in_specs=tuple(specs(x, s) if isinstance(x, Weight) else s for x, s in pairs),
        out_specs=tuple(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return list(body(*operands))


def _forwarded(jaxpr: _compat.Jaxpr) -> dict[int, int]:
    """Returns by output the input that it returns unchanged, also through inner calls."""
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
