"""Finds the layers that a model repeats, so that each distinct one is traced once.

A layer is a run of equations in one name scope, as Flax's modules open one. Where scopes hold runs
that differ in the scope's name alone, each run becomes one `Call`.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _compat

LEAST = 16  # equations of a run that is worth a call
LARGEST = 1024  # numbers with known values that a shared function may hold


class Call:
    """A run of equations in one name scope, as one equation and its jaxpr in one."""

    class primitive:  # noqa: N801 - read as that of an equation
        """Its name in the registry of rules."""

        name, multiple_results = "closed_call", True

    effects, constvars = frozenset[Any](), ()

    def __init__(self, eqns: Sequence[Any], depth: int, outvars: Sequence[Any]):
        """Makes the call of `eqns`, whose scopes have `depth` first names in common."""
        self.eqns = [_compat.in_scope(eqn, slice(depth, None)) for eqn in eqns]
        self.source_info = _compat.in_scope(eqns[0], slice(depth)).source_info
        self.ctx, self.outvars, self.params = eqns[0].ctx, list(outvars), {"call_jaxpr": self}
        made = {v for eqn in eqns for v in eqn.outvars}
        used = dict.fromkeys(v for eqn in eqns for v in variables(eqn.invars))
        self.invars = [v for v in used if v not in made]


def with_calls(eqns: Sequence[Any], outvars: Sequence[Any], groups: Any) -> list[Any]:
    """Puts a `Call` in the place of each run of equations that is repeated.

    Args:
        eqns: equations in order.
        outvars: what is needed of them in the end.
        groups: equations that must stay together.
    """
    last = {v: i for i, eqn in enumerate(eqns) for v in variables(eqn.invars)}
    last |= dict.fromkeys(variables(outvars), len(eqns))
    forms = Forms()

    def is_whole(run: range) -> bool:
        ids = {id(eqns[i]) for i in run}
        inside = (sum(id(eqn) in ids for eqn in group) for group in groups)
        whole = all(n in (0, len(group)) for n, group in zip(inside, groups, strict=True))
        return whole and not any(eqns[i].effects for i in run)

    def split(run: range, depth: int) -> list[Any]:
        each = itertools.groupby(run, lambda i: tuple(_compat.scopes(eqns[i])[:depth]))
        runs = [(scope, list(at)) for scope, at in each]
        calls: dict[int, Call] = {}
        if len(runs) > 1:
            for n, (scope, at) in enumerate(runs):
                if len(scope) == depth and is_whole(range(at[0], at[-1] + 1)):
                    made = [v for i in at for v in eqns[i].outvars if last.get(v, -1) > at[-1]]
                    calls[n] = Call([eqns[i] for i in at], depth, made)
        found = {n: forms.of(call) for n, call in calls.items() if forms.size(call) >= LEAST}
        counts = Counter(found.values())
        out = []
        for n, (scope, at) in enumerate(runs):
            if n in found and counts[found[n]] > 1:
                out.append(calls[n])
            elif len(scope) == depth:
                out += split(range(at[0], at[-1] + 1), depth + 1)
            else:
                out += [eqns[i] for i in at]
        return out

    return split(range(len(eqns)), 1)


class Forms:
    """Says in one value what equations compute, whatever their variables are called."""

    def __init__(self) -> None:
        """Knows no form yet; it keeps each jaxpr that it was asked for alive."""
        self._known: dict[int, tuple[Any, int, int]] = {}
        self._numbers: dict[Hashable, int] = {}

    def size(self, jaxpr: Any) -> int:
        """Counts the equations of a jaxpr, and those of jaxprs within."""
        self.of(jaxpr)
        return self._known[id(jaxpr)][2]

    def of(self, x: Any) -> Hashable:
        """Gives the form of a jaxpr, or of another parameter of an equation."""
        if hasattr(x, "eqns"):
            if id(x) not in self._known:
                form, size = self._of_jaxpr(x)
                self._known[id(x)] = (x, self._numbers.setdefault(form, len(self._numbers)), size)
            return self._known[id(x)][1]
        if isinstance(x, tuple | list):
            return tuple(map(self.of, x))
        if isinstance(x, dict):
            return tuple((name, self.of(value)) for name, value in sorted(x.items()))
        if isinstance(x, float | complex | np.generic):  # 0.0 is equal to -0.0
            return type(x), repr(x)
        try:
            hash(x)
        except TypeError:
            return id(x)
        return type(x), x

    def _of_jaxpr(self, jaxpr: Any) -> tuple[Hashable, int]:
        numbers: dict[Any, int] = {}

        def atom(v: Any) -> Hashable:
            if _compat.is_literal(v):
                return np.asarray(v.val).tobytes(), v.aval
            return numbers.setdefault(v, len(numbers)), v.aval

        def equation(eqn: Any) -> Hashable:
            inputs, outputs = (tuple(map(atom, each)) for each in (eqn.invars, eqn.outvars))
            how = (eqn.primitive, self.of(eqn.params), _compat.scopes(eqn), id(eqn.ctx))
            return how, inputs, outputs

        ends = [tuple(map(atom, each)) for each in (jaxpr.constvars, jaxpr.invars)]
        body = tuple(map(equation, jaxpr.eqns))
        outs, consts = tuple(map(atom, jaxpr.outvars)), tuple(map(id, _compat.consts(jaxpr)))
        inner = (x for eqn in jaxpr.eqns for x in eqn.params.values() if hasattr(x, "eqns"))
        return (*ends, body, outs, consts), len(jaxpr.eqns) + sum(map(self.size, inner))


def variables(atoms: Sequence[Any]) -> list[Any]:
    """Drops the literals among `atoms`."""
    return [v for v in atoms if not _compat.is_literal(v)]


class Functions:
    """The functions that calls of one form share while one model is evaluated."""

    def __init__(self) -> None:
        """Has no function yet."""
        self._forms, self._shared = Forms(), dict[Hashable, Any]()

    def forget(self) -> None:
        """Drops the functions, which refer to this object and to arrays with known values."""
        self._shared.clear()

    def call(
        self, eqn: Any, f: Callable[..., list[Any]], operands: Sequence[Any], structure: Hashable
    ) -> list[Any]:
        """Computes `f(*operands)`, where `f` follows from `eqn` and from the operands' structure.

        The first call of a form is evaluated in place. The others share one function, unless a
        weight came out of the first.
        """
        leaves, tree = jax.tree.flatten(list(operands))
        size = len(leaves)  # the function must not keep tracers
        known = {i: x for i, x in enumerate(leaves) if _compat.is_concrete(x)}
        if sum(map(np.size, known.values())) > LARGEST:  # each function would hold a copy
            return f(*operands)
        places = tuple((i, id(x)) for i, x in known.items())
        key = (eqn.primitive, self._forms.of(eqn.params), structure, places)

        def layer(*values: Any) -> list[Any]:
            rest = iter(values)
            full = [known[i] if i in known else next(rest) for i in range(size)]
            return f(*jax.tree.unflatten(tree, full))

        if key not in self._shared:
            outs = f(*operands)
            are_arrays = jax.tree.structure(outs) == jax.tree.structure([0] * len(outs))
            self._shared[key] = jax.jit(layer) if are_arrays else None
            return outs
        shared = self._shared[key]
        if shared is None:
            return f(*operands)
        return shared(*(x for i, x in enumerate(leaves) if i not in known))
