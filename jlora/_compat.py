"""The one file that knows JAX versions and `jax.extend`.

Differences between JAX 0.10 and 0.12 that matter here:

* 0.11 merged `Jaxpr` and `ClosedJaxpr`. Both have `eqns`, `invars`, `outvars` and `constvars`;
  `consts` is missing only on 0.10's open `Jaxpr`, which has none.
* the option that makes XLA compile in a hurry has another name since 0.11.
* `scan` counts its constants and carries in `num_consts`, `num_carry` (0.10) or `ft_in` (0.11).
"""

import contextlib
import functools
import os
import sysconfig
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeGuard

import jax
from jax.extend import source_info_util
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]
    JaxprEqn,
    Literal,
    Var,
)
from jax.extend.core import Primitive as Primitive
from jax.sharding import Sharding

Atom = Var | Literal  # what an equation reads
Jaxpr = ClosedJaxpr  # on 0.10 some primitives hold an open one, which only lacks `consts`


HURRIED: dict[str, Any] = (
    {"exec_time_optimization_effort": -1.0}
    if jax.__version_info__ < (0, 11)
    else {"optimization_level": "O0"}
)


def consts(jaxpr: Jaxpr) -> Sequence[Any]:
    """Returns the values of `jaxpr.constvars`."""
    return getattr(jaxpr, "consts", ())


def is_literal(atom: Atom) -> TypeGuard[Literal]:
    """Whether `atom` is a literal with the value `atom.val`, rather than a variable."""
    return isinstance(atom, Literal)


def scopes(eqn: JaxprEqn) -> tuple[Any, ...]:
    """Returns the name scopes around `eqn`, the outermost first."""
    return eqn.source_info.name_stack.stack


def current_scope() -> str:
    """Returns the name scopes around what is traced, or evaluated, joined by `/`."""
    return str(source_info_util.current_name_stack())


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Counts the constants and the carries among the operands of a `scan` equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)


@contextlib.contextmanager
def context(eqn: JaxprEqn) -> Iterator[None]:
    """Enters the name scope, traceback and configuration under which `eqn` was traced."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=names),
        eqn.ctx.manager,
    ):
        yield


def bind(eqn: JaxprEqn, *args: Any) -> list[Any]:
    """Applies the primitive of `eqn`, unchanged, to `args`."""
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def equations(eqn: JaxprEqn) -> Iterator[JaxprEqn]:
    """Finds `eqn` and the equations inside of it."""
    yield eqn
    for x in eqn.params.values():
        for jaxpr in x if isinstance(x, tuple | list) else [x]:
            for inner in getattr(jaxpr, "eqns", ()):
                yield from equations(inner)


# Frames in these folders belong to a library, not to the user.
_LIBRARIES = tuple(
    os.path.realpath(p) + os.sep
    for p in {
        os.path.dirname(__file__),
        os.path.dirname(os.path.dirname(jax.__file__)),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("stdlib"),
    }
)


def source_line(eqn: JaxprEqn) -> str | None:
    """Returns `file:line (function)` of the innermost frame of `eqn` outside of libraries."""
    traceback = eqn.source_info.traceback
    for frame in [] if traceback is None else traceback.frames:
        if not os.path.realpath(frame.file_name).startswith(_LIBRARIES):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return None


def mapped_index(axis: str) -> jax.Array | None:
    """Returns the index along an axis that an enclosing `vmap` names; None if none does."""
    try:
        return jax.lax.axis_index(axis)
    except NameError:
        return None


def varying(x: jax.Array) -> frozenset[Any]:
    """Returns the mesh axes of an enclosing `shard_map` over which `x` varies."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def abstract(
    shape: Sequence[int], dtype: Hashable, sharding: Sharding | None, like: object
) -> jax.ShapeDtypeStruct:
    """Makes the type of an array that varies over mesh axes like `like`, and is as weakly typed."""
    fields = {"sharding": sharding, "weak_type": bool(getattr(like, "weak_type", False))}
    if isinstance(like, jax.Array) and varying(like):
        aval = jax.typeof(like)
        fields |= {"sharding": aval.sharding, "manual_axis_type": aval.manual_axis_type}
    if fields["sharding"] is None and len(fields) == 2:
        return _plain(tuple(shape), dtype, fields["weak_type"])
    return jax.ShapeDtypeStruct(shape, dtype, **fields)


@functools.lru_cache(4096)
def _plain(shape: tuple[int, ...], dtype: Hashable, weak_type: bool) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak_type)


def unchecked_axes() -> frozenset[Any]:
    """Returns the mesh axes of an enclosing `shard_map` that does not check what varies."""
    axes = jax.sharding.get_abstract_mesh().manual_axes
    checked = not axes or varying(jax.lax.axis_index(axes[0]))
    return frozenset() if checked else frozenset(axes)


def may_be_cut_over(tree: Any) -> frozenset[Any]:
    """Returns the mesh axes over which an enclosing `shard_map` may have sharded `tree`."""
    return unchecked_axes().union(*map(varying, jax.tree.leaves(tree)))


def vary_with(x: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
    """Makes `x` vary over all mesh axes over which `others` do."""
    missing = frozenset().union(*map(varying, others)) - varying(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def is_concrete(x: object) -> bool:
    """Whether `x` has a value: it is neither a tracer nor a shape."""
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)  # pyright: ignore


def is_staged() -> bool:
    """Whether operations are being traced rather than computed, as under `jax.jit`."""
    return not is_concrete(jax.lax.full((), 0))


def evaluate_now(f: Callable[..., Any], *args: Any) -> Any:
    """Returns the array `f(*args)` if its value can be computed now, else None.

    Arrays that a traced function closes over have values, though operations on them are traced.
    """
    if not all(map(is_concrete, jax.tree.leaves(args))):
        return None
    with jax.ensure_compile_time_eval():
        found = f(*args)
    return found if is_concrete(found) else None


def place_of(x: object) -> Sharding | None:
    """Returns the sharding to which the user committed the array `x`, or None."""
    return x.sharding if isinstance(x, jax.Array) and is_concrete(x) and x.committed else None
