"""Operations on arrays under any promotion rules and along explicit mesh axes; leaves of trees."""

import contextlib
import functools
import math
import string
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from . import _compat

AnyArray = jax.Array | np.ndarray | jax.ShapeDtypeStruct  # with values, or only its type
AnyMesh = Mesh | AbstractMesh
F = TypeVar("F", bound=Callable[..., Any])


def explicit(x: object) -> NamedSharding | None:
    """Returns the sharding of an array or a type, or None if no axis of its mesh is explicit."""
    aval = jax.typeof(x) if isinstance(x, jax.Array) else x
    found = getattr(aval, "sharding", None)
    if not isinstance(found, NamedSharding) or AxisType.Explicit not in found.mesh.axis_types:
        return None
    return found


def follow(known: NamedSharding, x: AnyArray, axes: Sequence[int | None]) -> NamedSharding:
    """Returns the sharding of an array whose axes follow the axes `axes` of one sharded as `known`.

    None in `axes` is an axis that follows no other.
    """
    spec = [None if d is None else known.spec[d] for d in axes]
    return NamedSharding(known.mesh, fit_spec(spec, x.shape, known.mesh))


def automatically(f: Callable[..., Any], place: Any) -> Callable[..., Any]:
    """Lets XLA shard what `f` computes; along explicit mesh axes its result is sharded as `place`.

    None for `place` means that there are no explicit axes.
    """
    return f if place is None else jax.sharding.auto_axes(f, out_sharding=place)


def replicate(f: F) -> F:
    """Lets a function take arrays along explicit mesh axes; its results are replicated there."""

    @functools.wraps(f)
    def anywhere(*args: Any, **kwargs: Any) -> Any:
        given = (args, kwargs)
        known = next(filter(None, map(explicit, jax.tree.leaves(given))), None)
        arrays, put = pick(given, lambda x: isinstance(x, jax.Array))

        def of_arrays(*arrays: jax.Array) -> Any:
            args, kwargs = put(arrays)
            return f(*args, **kwargs)

        place = known and NamedSharding(known.mesh, PartitionSpec())
        return automatically(of_arrays, place)(*arrays)

    return cast("F", anywhere)


def lie_along(x: jax.Array, like: jax.Array) -> jax.Array:
    """Reshards `x`, which has the axes of `like` or length 1, like it along explicit mesh axes."""
    known = explicit(like)
    return x if known is None else jax.sharding.reshard(x, follow(known, x, range(x.ndim)))


def put(x: np.ndarray, copy: bool = True) -> jax.Array:
    """Copies an array to the default device, or to all devices of the mesh in scope.

    `jnp.asarray` does so too, but compiles a program for each shape. Without `copy`, x must not
    change afterwards.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.asarray(x)
    # Without a copy, JAX may use the memory of x, which may be a mapped file.
    return jax.device_put(np.array(x) if copy else x)


def put_like(x: Any, like: object) -> jax.Array:
    """Puts an array on the mesh of `like`, if it has one; x must not change afterwards."""
    place = getattr(like, "sharding", None)
    return jax.device_put(x, place) if isinstance(place, NamedSharding) else put(x, copy=False)


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Lets the host's CPU compute, whatever mesh is in scope."""
    cpu = jax.local_devices(backend="cpu")[:1]
    return jax.set_mesh(Mesh(cpu, ("host",), axis_types=(AxisType.Auto,)))


def is_on_host(x: object) -> bool:
    """Whether `x` is an array in host memory, such as `pinned_host`, where JAX computes nothing."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host


def to_device(tree: Any) -> Any:
    """Copies the arrays that are in host memory to the memory of their devices."""
    move = lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x  # noqa: E731
    return jax.tree.map(move, tree)


def back(tree: Any, like: Any) -> Any:
    """Copies `tree` to host memory if `like` is in host memory."""
    if not any(map(is_on_host, jax.tree.leaves(like))):
        return tree
    # Without `src`, JAX would leave cotangents in host memory.
    return jax.device_put(tree, jax.memory.Space.Host, src=jax.memory.Space.Device)


def count_not_finite(x: Any) -> int | None:
    """Counts the values that are NaN or infinite, in one program; None if none are known yet."""
    found = _compat.evaluate_now(_count_not_finite, x)
    return None if found is None else int(found)


@jax.jit
def _count_not_finite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(to_device(x)))


def abstract(x: AnyArray) -> jax.ShapeDtypeStruct:
    """Returns the type of an array: its shape, its dtype in JAX, how it is sharded and varies."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    return _compat.abstract(x.shape, dtype, explicit(x), like=x)


def join_shardings(
    x: Sequence[Hashable], y: Sequence[Hashable], out: Sequence[Hashable], *values: Any
) -> NamedSharding | None:
    """Shards each axis of `out` as in x, or else as in y, but uses no mesh axis twice."""
    entries: dict[Hashable, Any] = {}
    of_x, of_y = map(explicit, values)
    for axes, sharding in ((y, of_y), (x, of_x)):
        spec = sharding.spec if sharding else ()
        entries |= {a: e for a, e in zip(axes, spec, strict=False) if e is not None}
    used: set[Any] = set()
    for a in sorted(out, key=lambda a: a not in x):
        names = {*mesh_axes(entries.get(a))}
        entries[a] = None if names & used else entries.get(a)
        used |= names
    known = of_x or of_y
    return known and NamedSharding(known.mesh, PartitionSpec(*map(entries.get, out)))


def mesh_axes(entry: object) -> tuple[Any, ...]:
    """Lists the mesh axes in an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def count_pieces(entry: object, mesh: AnyMesh) -> int:
    """Counts the pieces into which an entry of a PartitionSpec splits an axis over a mesh."""
    return math.prod(mesh.shape[name] for name in mesh_axes(entry))


def fit_spec(entries: Sequence[Any], shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """Makes a PartitionSpec of those entries that split their axes into equal pieces."""
    pairs = zip(entries, shape, strict=True)
    return PartitionSpec(*(e if n % count_pieces(e, mesh) == 0 else None for e, n in pairs))


def einsum(
    x: Sequence[Hashable],
    y: Sequence[Hashable],
    out: Sequence[Hashable],
    x_value: jax.Array,
    y_value: jax.Array,
    *,
    precision: PrecisionLike,
    dtype: DTypeLike | None = None,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """Computes the Einstein sum of two arrays in `dtype`, by default float32 or better.

    `x`, `y` and `out` name the axes of the arrays and of the result by any hashable values. Along
    explicit mesh axes the result has `sharding`; by default each of its axes is sharded as in x, or
    else as in y, and contracted axes are summed over the mesh.
    """
    of_x, of_y, of_out = spell(x, y, out)
    return jnp.einsum(
        f"{of_x},{of_y}->{of_out}",
        x_value,
        y_value,
        precision=precision,
        preferred_element_type=dtype or promote(x_value.dtype, jnp.float32),
        out_sharding=sharding or join_shardings(x, y, out, x_value, y_value),
    )


def spell(*each: Sequence[Hashable]) -> list[str]:
    """Replaces names by letters, for `jnp.einsum`."""
    names = dict.fromkeys(name for names in each for name in names)
    letters = dict(zip(names, string.ascii_letters, strict=False))
    return ["".join(letters[name] for name in names) for names in each]


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """Returns the dtype that holds all `dtypes`, also where implicit promotion is an error."""
    # JAX promotes nothing to or from float8.
    wide = [jnp.bfloat16 if _is_float8(dtype) else dtype for dtype in dtypes]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*wide)


def is_floating(dtype: DTypeLike) -> bool:
    """Whether `dtype` is a dtype of real floating-point numbers."""
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _is_float8(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def pick(
    tree: Any, is_picked: Callable[[Any], bool], is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Picks leaves of a tree; returns them, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    at = [i for i, x in enumerate(leaves) if is_picked(x)]
    picked = [leaves[i] for i in at]
    for i in at:  # so that `put` keeps nothing alive
        leaves[i] = None

    def put(values: Sequence[Any]) -> Any:
        full = dict(enumerate(leaves)) | dict(zip(at, values, strict=True))
        return jax.tree.unflatten(structure, list(full.values()))

    return picked, put
