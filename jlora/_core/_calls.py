"""Traces what the model calls again once, if the user put it under `jit` or `checkpoint`.

The first of equal calls is evaluated in its place. The others share one function.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _compat
from .._arrays import pick

LARGEST = 1024  # numbers with known values that a shared function may hold


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

        # In this order: a variable gets its number where it is first met.
        inputs = atoms(jaxpr.constvars), atoms(jaxpr.invars)
        body = tuple(map(equation, jaxpr.eqns))
        consts = tuple(map(id, _compat.consts(jaxpr)))
        return inputs, body, atoms(jaxpr.outvars), consts


class Functions:
    """The functions that equal calls share while one model is evaluated."""

    def __init__(self) -> None:
        """Has no function yet."""
        self._forms = Forms()
        self._shared = dict[Hashable, Any]()

    def forget(self) -> None:
        """Drops the functions, which refer to this object and to arrays with known values."""
        self._shared.clear()

    def call(self, eqn: Any, f: Callable[..., list[Any]], operands: Sequence[Any]) -> list[Any]:
        """Computes `f(*operands)`; `f` must depend on `eqn` and the operands' structure only.

        The first of equal calls is evaluated in place. The others share one function, unless the
        first returned a weight.
        """
        leaves, structure = jax.tree.flatten(operands)
        known = {i: x for i, x in enumerate(leaves) if _compat.is_concrete(x)}
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
