"""The loop that evaluates a jaxpr with weights in it, and the registry of its rules.

No primitive is named here. Equations that no `Weight` reaches are bound as they are; the others
go to the rule of their primitive. Where there is none, or the rule finds no factored form, W + ΔW
is formed if the user allowed it, and else it is an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import _compat
from ._factor import Unfactorable
from ._fork import Uses, fork, main, shared
from ._tree import take
from ._weight import Weight

RULES: dict[str, Callable[..., Any]] = {}
USES: dict[str, Uses] = {}


def rule(
    *primitives: str, uses: Uses | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers `f(eqn, *operands) -> outputs` for primitives, given by name.

    At least one operand is a `Weight`; outputs are a list, or one value for a primitive of one
    result. A rule raises `Unfactorable` where the result has no factored form. Where it `uses`
    its operands as activations or calls, these may be `Forked`.
    """

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(primitives, f))
        if uses is not None:
            USES.update(dict.fromkeys(primitives, uses))
        return f

    return register


def evaluate(jaxpr: _compat.Jaxpr, *args: Any, within: Any = None) -> list[Any]:
    """Evaluates `jaxpr` at `args`, each an array, forked or not, or a `Weight`.

    `within` is the equation that `jaxpr` belongs to, if any: errors name its source line where an
    inner equation has none of the user's.
    """
    env: dict[Any, Any] = {}
    weights = [isinstance(x, Weight) for x in args]
    twice = shared(jaxpr, weights, lambda name: USES.get(name, Uses()))

    def write(variables: Sequence[Any], values: Sequence[Any]) -> None:
        for v, x in zip(variables, values, strict=True):
            env[v] = fork(x) if v in twice and not isinstance(x, Weight) else x

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else env[atom]

    write(jaxpr.constvars, _compat.consts(jaxpr))
    write(jaxpr.invars, args)
    for eqn, last in _live(jaxpr):
        operands = [read(atom) for atom in eqn.invars]
        with _compat.context(eqn):
            outs = _apply(eqn, operands, within)
        write(eqn.outvars, outs)
        for var in last:
            del env[var]
    return [main(read(atom)) for atom in jaxpr.outvars]


def _apply(eqn: Any, operands: list[Any], within: Any) -> Sequence[Any]:
    name = eqn.primitive.name
    adapted = any(isinstance(x, Weight) for x in operands)
    if not (adapted and name in USES):
        operands = [main(x) for x in operands]
    if not adapted:
        return _compat.bind(eqn, *operands)
    eqn = _compat.located(eqn, within)
    if name in RULES:
        try:
            outs = RULES[name](eqn, *operands)
            return outs if eqn.primitive.multiple_results else [outs]
        except Unfactorable as e:
            reason = f"`{name}` at {_compat.source_line(eqn)}, where {e}"
    else:
        reason = f"`{name}` at {_compat.source_line(eqn)}"
    return _compat.bind(eqn, *(materialize(main(x), reason) for x in operands))


def materialize(x: Any, reason: str) -> Any:
    """W + ΔW where `x` is a `Weight` whose rule allows it or one row; `x` where it is an array."""
    if not isinstance(x, Weight):
        return x
    if not x.materialize and not all(t.row for t in x.terms):
        raise NotImplementedError(
            f"the weight {x.path!r} reaches {reason}, for which there is no factored form of "
            "W + s·A·B. Leave the weight out of the rules, or let W + ΔW be formed there with "
            "LoRA(..., materialize=True): exact, but at full memory and time."
        )
    return x.dense(reason)


def _live(jaxpr: _compat.Jaxpr) -> list[tuple[Any, list[Any]]]:
    """The equations that the outputs or an effect need, each with the variables last used there."""
    needed = {v for v in jaxpr.outvars if not _compat.is_literal(v)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if not (eqn.effects or needed.intersection(eqn.outvars)):
            continue
        used = {v for v in eqn.invars if not _compat.is_literal(v)}
        live.append((eqn, [v for v in used if v not in needed]))
        needed |= used
    return live[::-1]


# ------------------------------------------------------------------------------------- tracing


class ValueReadError(TypeError):
    """Python code of the user's function asks for the value of a traced array."""


def trace(
    f: Callable[..., Any], specs: Sequence[jax.ShapeDtypeStruct], paths: Sequence[str]
) -> tuple[_compat.Jaxpr, Callable[..., Any]]:
    """The jaxpr of `f` at `specs`, and what makes its outputs `f`'s from a list.

    `f`'s outputs may be any pytree; leaves that are no arrays come back as they are. What `f`
    closes over stays concrete if it was: should Python code of `f` ask for the value of something
    that its arguments do not reach, `f` is traced again with such values computed at once.
    """
    finish: list[Callable[..., Any]] = []

    def flat(*leaves: Any) -> list[Any]:
        arrays, put = take(f(*leaves), lambda x: isinstance(x, jax.Array | np.ndarray))
        finish.append(put)
        return arrays

    def eager(*leaves: Any) -> list[Any]:
        with jax.ensure_compile_time_eval():
            return flat(*leaves)

    try:
        jaxpr = jax.make_jaxpr(flat)(*specs)
    except _READS:
        try:
            jaxpr = jax.make_jaxpr(eager)(*specs)
        except _READS as e:
            names = ", ".join(map(repr, paths[:3])) + (", …" if len(paths) > 3 else "")
            raise ValueReadError(
                "the function asks in Python for the value of an array that depends on the weights "
                f"{names}, or on arguments that are traced themselves ({type(e).__name__}). Use "
                "jax.lax.cond or jnp.where there, or leave the weight out of the rules."
            ) from e
    return jaxpr, finish[-1]


_READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
