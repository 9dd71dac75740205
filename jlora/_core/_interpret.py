"""The loop that evaluates a jaxpr with weights in it, and the registry of primitives.

No primitive is named here. Equations without a `Weight` are bound as they are, except those that
`many.route` needs for its rows. The others go to the function that is registered for their
primitive. If there is none, or it finds no factored form, W + ΔW is formed if the user allowed it;
otherwise it is an error.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from .. import _compat
from .._grouped import ROWS
from .._registry import check_free
from ._axes import Unfactorable
from ._calls import Functions
from ._shared import steps, variables
from ._weight import Operand, Weight


class Primitive(NamedTuple):
    """How the equations of a primitive are evaluated if one of their operands is a `Weight`.

    Attributes:
        function: `(equation, *operands) -> outputs`.
        is_move: as in `primitive`.
        together: as in `primitive`.
        for_rows: as in `primitive`.
    """

    function: Callable[..., Any]
    is_move: bool = True
    together: Callable[..., list[Any]] | None = None
    for_rows: bool = False


PRIMITIVES: dict[str, Primitive] = {}


def primitive(
    *primitives: str,
    override: bool = False,
    is_move: bool = True,
    together: Callable[..., list[Any]] | None = None,
    for_rows: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `f(eqn: Equation, *operands) -> outputs` for JAX's primitives of these names.

    Args:
        *primitives: names of JAX primitives.
        override: whether `f` may replace the function that a primitive has.
        is_move: whether the outputs of `f` are weights again, unless it raises.
        together: a function that evaluates several equations, each with one result, that multiply
            the same activation; it raises `Unfactorable` if each should be evaluated on its own.
        for_rows: whether `f` also evaluates equations without a `Weight`, and those around them,
            where `many.route` maps them over rows.

    Returns:
        A decorator for `f`, which returns `f`. At least one operand of `f` is a `Weight`, unless
        `for_rows` is true. Its outputs are a list, or one value if the primitive has one result.
        `f` raises `Unfactorable` if the result has no factored form. CONTRIBUTING.md has an
        example.

    Raises:
        TypeError: if a primitive has a function already.
    """

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        for name in primitives:
            old = PRIMITIVES[name].function if name in PRIMITIVES else None
            check_free(f"the primitive {name!r}", old, f, override)
        PRIMITIVES.update(dict.fromkeys(primitives, Primitive(f, is_move, together, for_rows)))
        return f

    return register


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One equation of a jaxpr, as the function of its primitive gets it.

    Attributes:
        traced: the equation as JAX traced it.
        operands: arrays and weights.
        within: the equation whose jaxpr contains this one, or None.
        functions: the functions that equal calls share, or None if each call is evaluated in place.
    """

    traced: _compat.JaxprEqn
    operands: Sequence[Operand]
    within: "Equation | None"
    functions: Functions | None = None

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of its primitive."""
        return self.traced.params

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return self.traced.primitive.name

    @property
    def outputs(self) -> list[Any]:
        """The types of its outputs."""
        return [v.aval for v in self.traced.outvars]

    @functools.cached_property
    def where(self) -> str:
        """Its primitive, and the line of the user's code that made it."""
        around = self
        line = None
        while around is not None and line is None:
            line = _compat.source_line(around.traced)
            around = around.within
        return f"`{self.name}` at {line or 'an unknown line'}"

    def bind(self, *values: jax.Array) -> Any:
        """Applies its primitive, unchanged, to `values`."""
        outs = _compat.bind(self.traced, *values)
        return outs if self.traced.primitive.multiple_results else outs[0]

    def evaluate(self, jaxpr: _compat.Jaxpr, *operands: Operand) -> list[Any]:
        """Evaluates a jaxpr among its parameters."""
        return _evaluate(jaxpr, operands, self._without_operands(), self.functions)

    def share(self, f: Callable[..., list[Any]]) -> list[Any]:
        """Computes `f(equation, *operands)`, and traces it once for equal equations and operands.

        `f` must depend on nothing else. The equation that it gets has no operands.
        """
        f = functools.partial(f, self._without_operands())
        if self.functions is None:
            return f(*self.operands)
        return self.functions.call(self.traced, f, self.operands)

    def _without_operands(self) -> "Equation":
        # A shared function outlives the trace of the operands.
        return dataclasses.replace(self, operands=())

    def arrays(self, xs: Sequence[Any], kept: Collection[int] = ()) -> list[Any]:
        """Turns weights that leave an inner jaxpr into arrays; the outputs `kept` become None."""
        return [
            None if i in kept else as_array(x, lambda: f"an output of {self.where}")
            for i, x in enumerate(xs)
        ]


def evaluate(jaxpr: _compat.Jaxpr, *args: Operand) -> list[Any]:
    """Evaluates `jaxpr` at `args`, each an array or a `Weight`."""
    is_search = any(isinstance(x, Weight) and x.origin.uses is not None for x in args)
    # A search records each use in place. Eagerly, shared functions would be compiled at each call.
    if is_search or not _compat.is_staged():
        return _evaluate(jaxpr, args, None, None)
    functions = Functions()
    try:
        return _evaluate(jaxpr, args, None, functions)
    finally:
        functions.forget()


def _evaluate(
    jaxpr: _compat.Jaxpr,
    args: Sequence[Operand],
    within: Equation | None,
    functions: Functions | None,
) -> list[Any]:
    env: dict[Any, Any] = {}

    def write(variables: Sequence[Any], values: Sequence[Any]) -> None:
        env.update(zip(variables, values, strict=True))

    def read(atom: _compat.Atom) -> Any:
        return atom.val if _compat.is_literal(atom) else env[atom]

    write(jaxpr.constvars, _compat.consts(jaxpr))
    write(jaxpr.invars, args)
    weights = [isinstance(x, Weight) and x.is_changed for x in args]
    number = _number_uses(jaxpr) if any(isinstance(x, Weight) and x.has_keys for x in args) else {}

    def use(atom: _compat.Atom) -> Any:
        x = read(atom)
        return x.fold_in(next(number[atom])) if isinstance(x, Weight) and atom in number else x

    for eqns, last in steps(jaxpr, weights, PRIMITIVES):
        operands = [[use(atom) for atom in eqn.invars] for eqn in eqns]
        pairs = zip(eqns, operands, strict=True)
        outputs = _apply([Equation(*pair, within, functions) for pair in pairs])
        for eqn, outs in zip(eqns, outputs, strict=True):
            write(eqn.outvars, outs)
        for var in last:
            del env[var]
    return [read(atom) for atom in jaxpr.outvars]


def _number_uses(jaxpr: _compat.Jaxpr) -> dict[Any, Iterator[int]]:
    """Returns numbers for the uses of each variable that more than one operand reads."""
    counts = collections.Counter(variables([v for eqn in jaxpr.eqns for v in eqn.invars]))
    return {v: itertools.count() for v, n in counts.items() if n > 1}


def _apply(eqns: Sequence[Equation]) -> list[Sequence[Any]]:
    together = PRIMITIVES[eqns[0].name].together if len(eqns) > 1 else None
    if together is not None:
        with contextlib.suppress(Unfactorable), _compat.context(eqns[0].traced):
            return [[out] for out in together(eqns)]
    return list(map(_apply_one, eqns))


def _apply_one(eqn: Equation) -> Sequence[Any]:
    traced, operands = eqn.traced, eqn.operands
    with _compat.context(traced):
        found = PRIMITIVES.get(eqn.name)
        if not any(isinstance(x, Weight) for x in operands) and not _is_for_rows(traced):
            return _compat.bind(traced, *operands)
        try:
            if found is None:
                raise Unfactorable
            outs = found.function(eqn, *operands)
            return outs if traced.primitive.multiple_results else [outs]
        except Unfactorable as e:
            why = f": {e}" if e.args else ""
            arrays = [as_array(x, lambda: f"{eqn.where}{why}", e.added) for x in operands]
        return _compat.bind(traced, *arrays)


def _is_for_rows(traced: _compat.JaxprEqn) -> bool:
    """Whether an equation, or one inside of it, has a function that `many.route` needs here."""
    known = (PRIMITIVES.get(inner.primitive.name) for inner in _compat.equations(traced))
    needed = any(found is not None and found.for_rows for found in known)
    return needed and _compat.mapped_index(ROWS) is not None


def as_array(x: Operand, reason: Callable[[], str], added: bool = False) -> jax.Array:
    """Returns an array as it is, and forms W + ΔW of a `Weight` if that is allowed.

    A looked-up row is always formed. While sites are searched, the use is recorded, and W returned.

    Args:
        x: a weight or an array.
        reason: returns the operation that has no factored form, for the error.
        added: whether x acts as an activation: added to one, concatenated with one, or returned.
    """
    if not isinstance(x, Weight):
        return x
    if x.origin.uses is not None:
        x.origin.uses.no_product(x, reason(), added)
        return x.array
    if not x.origin.materialize and not x.is_row:
        raise NotImplementedError(
            f"the weight {' + '.join(x.origin.paths)!r} reaches {reason()}. W + s·A·B has no "
            "factored form there. Leave the weight out of the rules, or give LoRA(..., "
            "materialize=True), which forms W + ΔW there: exact, but at full memory and time."
        )
    return x.form(reason())
