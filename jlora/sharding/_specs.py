r"""How an adapter is sharded: each factor like the axes of W that it has.

$$W: (s, i, o) \quad\Rightarrow\quad A: (s, i, \varnothing), \quad B: (s, \varnothing, o)$$

where s, i and o are the entries of W's PartitionSpec for stack, inputs and outputs. The rank is
replicated.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .._adapters import AdapterLeaf, Node, arrays, is_node, is_table, weight_shape
from .._arrays import AnyMesh, count_pieces, mesh_axes
from .._errors import InputError, stop
from .._quantized import Quantized, is_quantized
from .._rules import near_misses
from .._tree import adapter_leaves, is_abstract, is_empty, leaves_by_path, name_of, problems_at
from .._types import Path, PyTree
from ._places import (
    Misfit,
    Place,
    Unknown,
    check_blocks,
    describe,
    everywhere,
    in_device_memory,
    places_of,
    with_spec,
)


def specs(base: PyTree, adapter: PyTree, mesh: AnyMesh | None = None) -> PyTree:
    r"""Returns the shardings of an adapter, which follow those of its base.

    A is sharded like W's stack and inputs, B like W's stack and outputs; ranks and slots are
    replicated. Leaves trained in full are sharded like W. So each device holds the rows of A and
    the columns of B that belong to its shard of W.

    If the number of devices over which W's fused output axis is sharded does not divide the length
    of a slot, B is replicated along this axis.

    Args:
        base: a tree with the paths of the base. Its leaves are one of these:

            - `PartitionSpec`, with mesh axes or Flax's logical axes, or None for replicated;
            - `NamedSharding`, or any sharding on one device;
            - arrays or `jax.ShapeDtypeStruct`s with a sharding. Under `jit`, arrays have one only
              along explicit mesh axes;
            - Flax's boxes (`nn.with_partitioning`, `nn.with_logical_partitioning`) and NNX
              variables with `out_sharding`. If their array is on a mesh, its sharding counts
              instead. Leaves beside them that have no sharding are replicated, as by
              `get_partition_spec`.
        adapter: an adapter from `init`, of arrays or `jax.ShapeDtypeStruct`s; or a table of
            `jlora.many`, whose slots are replicated; or a base with quantized weights, whose codes
            and scales are sharded like W.
        mesh: a mesh, to get NamedShardings on it instead of PartitionSpecs.

    Returns:
        A tree with the structure of `adapter`, with its LowRank nodes. It has PartitionSpecs where
        `base` has them, and NamedShardings with the same mesh where `base` has those. Give it to
        `device_put`, `jax.shard_map`, `jax.ShapeDtypeStruct`, or `jax.jit` as `out_shardings`. If
        `base` is in the host's memory, codes and scales are too, but not what is trained.

    Raises:
        TypeError: if a leaf of `base` has no sharding, or `adapter` is not an adapter.
        ValueError: if `base` lacks a path of the adapter, or a PartitionSpec has more entries than
            the weight has axes. With a mesh also if it lacks an axis, an axis is used twice, a
            length cannot be divided, or a device would get only a part of a block of a quantized
            weight. The mesh is that of a NamedSharding, `mesh`, or that of `jax.set_mesh` if it has
            all axes that a PartitionSpec names.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jax.sharding import PartitionSpec as P
        >>> from jlora import sharding
        >>> params, x = {"w": jnp.ones((4, 6))}, jnp.ones((1, 4))
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> _, adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
        >>> found = sharding.specs({"w": P("fsdp", "tensor")}, adapter)
        >>> found["w"].a, found["w"].b
        (P('fsdp', None), P(None, 'tensor'))
    """
    places = places_of(base)
    found = _leaves(adapter)
    _check_known(places, found)
    own, wrong = [], {}
    before = (None,) * any(is_node(x) and is_table(x) for x in found.values())
    for path, leaf in found.items():
        try:
            own.append(_follow(places[path], leaf, mesh, before))
        except Misfit as e:
            wrong[path] = str(e)
    why = f"has shardings that do not fit at {len(wrong)} of {len(found)} paths of `adapter`."
    stop(problems_at(wrong), "base", why, "Correct them in `base`: the adapter follows W.")
    structure = jax.tree.structure(adapter, is_leaf=lambda x: is_node(x) or is_quantized(x))
    return jax.tree.unflatten(structure, own)


def place_codes(path: Path, leaf: Quantized, place: object, argument: str) -> Quantized:
    """Shards a quantized leaf, or its shapes, like the weight at `path` of the tree `argument`.

    It stays as it is if the weight is at a `place` that is on no mesh.
    """
    if not isinstance(place, NamedSharding):
        return leaf
    try:
        places = _follow(place, leaf, None, ())
    except Misfit as e:
        raise InputError(
            argument,
            "has a weight that is not sharded along whole blocks of codes.",
            problems=problems_at({path: str(e)}),
            remedy="Shard its other axes.",
        ) from None
    if is_abstract(leaf.data):
        return jax.tree.map(lambda x, place: x.update(sharding=place), leaf, places)
    return jax.device_put(leaf, places)


def _leaves(adapter: PyTree) -> dict[Path, Any]:
    leaves = leaves_by_path(adapter, is_node)
    is_base = any(is_quantized(x) for _, x in leaves)
    return dict(leaves) if is_base or is_empty(adapter) else adapter_leaves(adapter)


def replicated(specs: PyTree, *axes: str) -> PyTree:
    """Returns the same shardings, but replicated over some axes of the mesh.

    FSDP-sharded A and B would be all-gathered in every layer. Gather them once a step: keep A, B
    and their moments sharded as `specs`, and write
    `adapter = jax.lax.with_sharding_constraint(adapter, replicated(specs, "fsdp"))` in the loss
    function.

    Args:
        specs: a tree of PartitionSpecs or NamedShardings, such as the result of `specs`.
        *axes: names of mesh axes; the result is not sharded over them.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: if the mesh of a NamedSharding has no such axis.

    Examples:
        >>> from jax.sharding import PartitionSpec as P
        >>> from jlora import sharding
        >>> sharding.replicated({"a": P(None, ("fsdp", "tensor")), "b": P("fsdp")}, "fsdp")
        {'a': P(None, 'tensor'), 'b': P(None,)}
    """

    def keep(entry: object) -> Any:
        if entry is PartitionSpec.UNCONSTRAINED:
            return entry
        return tuple(name for name in mesh_axes(entry) if name not in axes)

    def place(x: Place) -> Place:
        if isinstance(x, NamedSharding) and (unknown := set(axes) - set(x.mesh.axis_names)):
            raise InputError(
                "axes",
                f"must be axes of the mesh of `specs`, which are "
                f"{', '.join(x.mesh.axis_names)}; got {', '.join(map(repr, sorted(unknown)))}.",
            )
        spec = x if isinstance(x, PartitionSpec) else getattr(x, "spec", None)
        return x if spec is None else with_spec(x, PartitionSpec(*map(keep, spec)))

    return jax.tree.map(place, specs, is_leaf=lambda x: isinstance(x, Place))


def moments(state: PyTree, adapter: PyTree, specs: PyTree) -> PyTree:
    """Returns the shardings of an optimizer's state, which follow those of the adapter.

    Use it as `out_shardings` of `jax.jit(tx.init)`. Under `jax.jit`, `tx.init` makes zeros that
    depend on nothing, so XLA would put all of them on one device. Outside of `jax.jit` you do not
    need it.

    Args:
        state: from `jax.eval_shape(tx.init, adapter)`, for any optax transformation.
        adapter: the adapter, of arrays or `jax.ShapeDtypeStruct`s.
        specs: its shardings, from `specs`.

    Returns:
        A tree with the structure of `state`. An array gets the sharding of a leaf of `adapter` if
        it has the shape of the leaf, and its path ends in the path of the leaf. Everything else,
        such as a step count, is replicated.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> from jax.sharding import PartitionSpec as P
        >>> from jlora import sharding
        >>> params, x = {"w": jnp.ones((4, 6))}, jnp.ones((1, 4))
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> _, adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
        >>> state = jax.eval_shape(optax.trace(0.9).init, adapter)
        >>> found = sharding.specs({"w": P("fsdp", "tensor")}, adapter)
        >>> sharding.moments(state, adapter, found).trace["w"].b
        P(None, 'tensor')
    """
    flat = jax.tree_util.tree_flatten_with_path(adapter)[0]
    places = jax.tree.structure(adapter).flatten_up_to(specs)
    known = {path: (x.shape, place) for (path, x), place in zip(flat, places, strict=True)}
    rest = everywhere(places)

    def place(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> Place:
        ends = (known.get(path[i:]) for i in range(len(path) + 1))
        return next((place for shape, place in filter(None, ends) if shape == x.shape), rest)

    return jax.tree_util.tree_map_with_path(place, state)


# ------------------------------------------------------------------------------ what is missing


def _check_known(places: Mapping[Path, Any], found: Mapping[Path, Any]) -> None:
    """Raises for the paths at which `base` has no leaf, or a leaf without a sharding."""
    missing = {path: _explain(path, places) for path in found if path not in places}
    why = f"lacks {len(missing)} of {len(found)} paths of `adapter`."
    remedy = "Give the shardings of the parameters that you gave to `init`, with the same paths."
    stop(problems_at(missing), "base", why, remedy)
    unknown = {p: f"got {places[p].got}" for p in found if isinstance(places[p], Unknown)}
    if unknown:
        raise TypeError(
            "`base` must be a tree of PartitionSpec or NamedSharding, of arrays or "
            "jax.ShapeDtypeStructs that have one, or of Flax's partitioned parameters; it has no "
            f"sharding at {len(unknown)} of {len(found)} paths of `adapter`:\n"
            + "\n".join(f"  {problem}" for problem in problems_at(unknown))
        )


def _explain(path: Path, places: Mapping[Path, Any]) -> str:
    """Says what `base` has at a path where it has no leaf."""
    if below := [p for p in places if p[: len(path)] == path]:
        return (
            f"a container of {len(below)} leaves instead of one; a tuple is a container, "
            "PartitionSpec(...) a leaf"
        )
    return f"not in `base`. {near_misses(name_of(path), [name_of(p) for p in places])}".rstrip()


# ----------------------------------------------------------------------------- how a leaf follows


def _follow(
    place: Place, leaf: AdapterLeaf | Quantized, mesh: AnyMesh | None, before: tuple[None, ...]
) -> Any:
    """Returns the places of the arrays of a leaf of the adapter, for a W at `place`.

    The arrays have axes `before` those that follow W: that of the slots of a table.
    """
    if not isinstance(place, PartitionSpec | NamedSharding):
        if len(place.device_set) == 1:
            return _each(leaf, (), lambda _: place)
        raise Misfit(f"a {type(place).__name__} names no axes; expected a NamedSharding")
    spec = place if isinstance(place, PartitionSpec) else place.spec
    shape = weight_shape(leaf) if isinstance(leaf, Node) else tuple(leaf.shape)[len(before) :]
    if len(spec) > len(shape):
        raise Misfit(f"{spec} has {len(spec)} entries for a weight of shape {shape}")
    entries = dict(enumerate((*spec, *[None] * (len(shape) - len(spec)))))
    known = _mesh_of(place, entries.values(), mesh)
    if known is not None:
        _check_entries(entries.values(), shape, known)
        if is_quantized(leaf):
            check_blocks(entries, leaf, known)
        if is_node(leaf) and leaf.layout.slots is not None:
            count, _, axis = leaf.layout.slots
            if shape[axis] // count % count_pieces(entries[axis], known):
                del entries[axis]  # a slot that cannot be divided is replicated
    if isinstance(place, PartitionSpec) and mesh is not None:
        place = NamedSharding(mesh, spec)

    def place_along(dims: Sequence[Any]) -> Place:
        return with_spec(place, PartitionSpec(*before, *(entries.get(d) for d in dims)))

    return _each(leaf, range(len(spec)), place_along)


def _each(
    leaf: AdapterLeaf | Quantized, dims: Sequence[int], place: Callable[[Sequence[Any]], Place]
) -> Any:
    """Replaces each array of `leaf` by `place` of the axes of W that its axes follow."""
    if is_quantized(leaf):
        return leaf.map_arrays(lambda _, dims: place(dims))
    if not is_node(leaf):
        return in_device_memory(place(dims))
    axes = leaf.axes(leaf.layout)
    return leaf._replace(**{n: in_device_memory(place(axes[n])) for n in arrays(leaf)})


def _mesh_of(place: Place, entries: Collection[Any], given: AnyMesh | None) -> AnyMesh | None:
    """Returns the mesh of `entries`; None if they have names that the mesh in scope lacks."""
    if isinstance(place, NamedSharding) or given is not None:
        return place.mesh if isinstance(place, NamedSharding) else given
    scope = jax.sharding.get_abstract_mesh()
    return scope if {n for e in entries for n in mesh_axes(e)} <= set(scope.axis_names) else None


def _check_entries(entries: Collection[Any], shape: tuple[int, ...], mesh: AnyMesh) -> None:
    names = [name for entry in entries for name in mesh_axes(entry)]
    for name in names:
        if name not in mesh.axis_names:
            raise Misfit(f"the mesh has no axis {name!r}; it has {', '.join(mesh.axis_names)}")
        if names.count(name) > 1:
            raise Misfit(f"the mesh axis {name!r} is used for more than one axis")
    for axis, (entry, length) in enumerate(zip(entries, shape, strict=True)):
        n = count_pieces(entry, mesh)
        if length % n:
            over = describe(entry, mesh)
            raise Misfit(f"axis {axis} of length {length} cannot be divided over {over}")
