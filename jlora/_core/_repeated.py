"""Finds the layers that a model repeats, so that each distinct layer is traced once.

A layer is a run of equations in one name scope, such as each module of Flax opens. Runs that differ
only in the name of the scope become one `Call` each.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _compat
from ._arrays import pick

LEAST = 16  # equations of a run that is worth a call
LARGEST = 1024  # numbers with known values that a shared function may hold


class Call:
    """A run of equations in one name scope; it acts as one equation, and as the jaxpr of that."""

    class primitive:  # noqa: N801 - as the attribute of an equation
        """The name of its primitive."""

        name, multiple_results = "closed_call", True

    effects = frozenset[Any]()
    constvars = ()

    def __init__(self, eqns: Sequence[Any], depth: int, outvars: Sequence[Any]):
        """Makes the call of `eqns`, whose scopes have the first `depth` names in common."""
        self.eqns = [_compat.in_scope(eqn, slice(depth, None)) for eqn in eqns]
        self.source_info = _compat.in_scope(eqns[0], slice(depth)).source_info
        self.ctx = eqns[0].ctx
        self.outvars = list(outvars)
        self.params = {"call_jaxpr": self}
        made = {v for eqn in eqns for v in eqn.outvars}
        used = dict.fromkeys(v for eqn in eqns for v in variables(eqn.invars))
        self.invars = [v for v in used if v not in made]


def with_calls(eqns: Sequence[Any], outvars: Sequence[Any], groups: Any) -> list[Any]:
    """Replaces each repeated run of equations by a `Call`.

    Args:
        eqns: equations in order.
        outvars: the variables that are needed in the end.
        groups: equations that must stay together.
    """
    last = {v: i for i, eqn in enumerate(eqns) for v in variables(eqn.invars)}
    last |= dict.fromkeys(variables(outvars), len(eqns))
    forms = Forms()

    def call(run: Sequence[int], depth: int) -> Call | None:
        """Makes the call of a run if it is long enough, without effects, and tears no group."""
        ids = {id(eqns[i]) for i in run}
        inside = ([id(eqn) in ids for eqn in group] for group in groups)
        if any(eqns[i].effects for i in run) or any(any(x) and not all(x) for x in inside):
            return None
        made = [v for i in run for v in eqns[i].outvars if last.get(v, -1) > run[-1]]
        found = Call([eqns[i] for i in run], depth, made)
        return found if _size(found) >= LEAST else None

    def split(run: Sequence[int], depth: int) -> list[Any]:
        """Lists the equations of a run, with a call for each repeated scope of `depth` names."""
        each = itertools.groupby(run, lambda i: tuple(_compat.scopes(eqns[i])[:depth]))
        parts = [(len(scope) == depth, list(at)) for scope, at in each]
        calls = [call(at, depth) if len(parts) > 1 and is_scope else None for is_scope, at in parts]
        counts = Counter(forms.of(c) for c in calls if c)
        out = []
        for (is_scope, at), found in zip(parts, calls, strict=True):
            if found and counts[forms.of(found)] > 1:
                out.append(found)
            else:
                out += split(at, depth + 1) if is_scope else [eqns[i] for i in at]
        return out

    return split(range(len(eqns)), 1)


def _size(jaxpr: Any) -> int:
    """Counts the equations of a jaxpr, and of the jaxprs within."""
    inner = (x for eqn in jaxpr.eqns for x in eqn.params.values() if hasattr(x, "eqns"))
    return len(jaxpr.eqns) + sum(map(_size, inner))


class Forms:
    """Gives equal jaxprs one form, whatever their variables are called."""

    def __init__(self) -> None:
        """Knows no form yet; it will keep each jaxpr alive, because it knows them by `id`."""
        self._known: dict[int, tuple[Any, int]] = {}
        self._numbers: dict[Hashable, int] = {}

    def of(self, x: Any) -> Hashable:
        """Returns the form of a jaxpr, or of another parameter of an equation."""
        if hasattr(x, "eqns"):
            if id(x) not in self._known:
                number = self._numbers.setdefault(self._of_jaxpr(x), len(self._numbers))
                self._known[id(x)] = x, number
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

    def _of_jaxpr(self, jaxpr: Any) -> Hashable:
        numbers: dict[Any, int] = {}

        def atoms(each: Sequence[Any]) -> Hashable:
            return tuple(
                (np.asarray(v.val).tobytes(), v.aval)
                if _compat.is_literal(v)
                else (numbers.setdefault(v, len(numbers)), v.aval)
                for v in each
            )

        def equation(eqn: Any) -> Hashable:
            how = (eqn.primitive, self.of(eqn.params), _compat.scopes(eqn), id(eqn.ctx))
            return how, atoms(eqn.invars), atoms(eqn.outvars)

        ends = atoms(jaxpr.constvars), atoms(jaxpr.invars)
        body, consts = tuple(map(equation, jaxpr.eqns)), tuple(map(id, _compat.consts(jaxpr)))
        return ends, body, atoms(jaxpr.outvars), consts


def variables(atoms: Sequence[Any]) -> list[Any]:
    """Drops the literals among `atoms`."""
    return [v for v in atoms if not _compat.is_literal(v)]


class Functions:
    """The functions that equal calls share while one model is evaluated."""

    def __init__(self) -> None:
        """Has no function yet."""
        self._forms = Forms()
        self._shared = dict[Hashable, Any]()

    def forget(self) -> None:
        """Drops the functions, which refer to this object and to arrays with known values."""
        self._shared.clear()

    def call(
        self, eqn: Any, f: Callable[..., list[Any]], operands: Sequence[Any], structure: Hashable
    ) -> list[Any]:
        """Computes `f(*operands)`; `f` must depend on `eqn` and the operands' structure only.

        The first of equal calls is evaluated in place. The others share one function, unless the
        first returned a weight.
        """
        known = {i: x for i, x in enumerate(jax.tree.leaves(operands)) if _compat.is_concrete(x)}
        if sum(map(np.size, known.values())) > LARGEST:  # each function would hold a copy
            return f(*operands)
        traced, put = pick(operands, lambda x: not _compat.is_concrete(x))
        places = tuple((i, id(x)) for i, x in known.items())
        key = (eqn.primitive, self._forms.of(eqn.params), structure, places)

        def layer(*values: Any) -> list[Any]:
            return f(*put(values))

        if key not in self._shared:
            outs = f(*operands)
            are_arrays = jax.tree_util.all_leaves(outs)
            self._shared[key] = jax.jit(layer) if are_arrays else None
            return outs
        shared = self._shared[key]
        return f(*operands) if shared is None else shared(*traced)
