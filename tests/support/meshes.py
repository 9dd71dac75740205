"""What tests on eight devices share: meshes, where trees lie, and what a program moves."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small import normal as normal

KINDS = (AxisType.Auto, AxisType.Explicit)


def mesh_of(
    kind: AxisType = AxisType.Auto,
    shape: tuple[int, ...] = (4, 2),
    names: tuple[str, ...] = ("fsdp", "tensor"),
) -> jax.sharding.Mesh:
    """A mesh of the first devices, all of whose axes are of one kind."""
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, names, (kind,) * len(shape), devices=devices)


def lines() -> dict[AxisType, jax.sharding.Mesh]:
    """A mesh of four devices in a row, for each kind of axes."""
    return {kind: mesh_of(kind, (4,), ("d",)) for kind in KINDS}


def adapter_of(lora: Any, params: Any, *args: Any) -> Any:
    """An adapter of normal values, so that B is not zero; nothing is compiled."""
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, *args)[1]
    return jax.tree.map(lambda s: normal(s.size, *s.shape), shapes)


def on(mesh: Any, specs: Any) -> Any:
    """NamedShardings in place of PartitionSpecs; None is replicated."""
    is_spec = lambda x: x is None or isinstance(x, P)  # noqa: E731
    return jax.tree.map(lambda s: NamedSharding(mesh, s or P()), specs, is_leaf=is_spec)


def put(tree: Any, mesh: Any, specs: Any) -> Any:
    """The tree where `specs` says: a tree of the same form, or one spec for all."""
    structure = jax.tree.structure(tree)
    own = [specs] * structure.num_leaves if isinstance(specs, P) else structure.flatten_up_to(specs)
    return jax.device_put(jax.device_get(tree), jax.tree.unflatten(structure, on(mesh, own)))


def assert_lies(tree: Any, expected: Any) -> None:
    """Each leaf must lie where the expected array, or sharding, does."""
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        place = getattr(y, "sharding", y)
        assert x.sharding.is_equivalent_to(place, x.ndim), (x.sharding, place)


def compiled(f: Any, *args: Any) -> Any:
    """The program of `f`."""
    return jax.jit(f).lower(*args).compile()


def moved(program: Any) -> list[tuple[str, int]]:
    """The kind of each collective of a program, and how many elements its result has."""
    return sorted((c.kind, elements(c.shape)) for c in collectives(program.as_text()))


def elements(shape: str) -> int:
    """The elements of the arrays in a type of HLO: `(f32[2,3], f32[])` has 7."""
    return sum(
        math.prod(map(int, filter(None, n.split(",")))) for n in re.findall(r"\[([\d,]*)\]", shape)
    )


def value_and_slope(f: Any, adapter: Any) -> Any:
    """A number that depends on all that `f` gives, and its gradient, by one program."""
    return jax.jit(jax.value_and_grad(lambda a: jnp.sin(f(a)).sum()))(adapter)
