"""Parameters in every container, and leaves that are no JAX arrays."""

from __future__ import annotations

import collections
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from flax.core import FrozenDict

from jlora import Full, LoRA

from ._case import Case, Problem, entry, normal, normals

CASES: list[Case] = []
case = entry(CASES)
BOTH = 2 * (6 + 8) + 2 * (8 + 4)  # up, down


class Pair(NamedTuple):
    """Both weights."""

    up: Any
    down: Any


@struct.dataclass
class FlaxPair:
    """Both weights, with a static field."""

    up: Any
    down: Any
    name: str = struct.field(pytree_node=False, default="pair")


@partial(jax.tree_util.register_dataclass, data_fields=["up", "down"], meta_fields=["name"])
@dataclass
class JaxPair:
    """The same container without Flax."""

    up: Any
    down: Any
    name: str = "pair"


@jax.tree_util.register_pytree_node_class
class Opaque:
    """A container registered without keys: its children are numbered."""

    def __init__(self, up: Any, down: Any):
        """Keeps both."""
        self.up, self.down = up, down

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        """Children, and nothing static."""
        return (self.up, self.down), None

    @classmethod
    def tree_unflatten(cls, static: None, children: tuple[Any, Any]) -> Opaque:
        """From children."""
        return cls(*children)


def by_name(make: Any) -> tuple[Any, Any]:
    """A mapping: from both weights, and back."""
    return lambda u, d: make({"up": u, "down": d}), lambda p: (p["up"], p["down"])


def by_attribute(make: Any) -> tuple[Any, Any]:
    """An object: from both weights, and back."""
    return make, lambda p: (p.up, p.down)


# From the weights (up, down), and back.
CONTAINERS: dict[str, tuple[Any, Any]] = {
    "dict": by_name(dict),
    "ordered": by_name(collections.OrderedDict),
    "frozen": by_name(FrozenDict),
    "state": (
        lambda u, d: nnx.State({"up": nnx.Param(u), "down": nnx.Param(d)}),
        lambda p: (p["up"][...], p["down"][...]),
    ),
    "namedtuple": by_attribute(Pair),
    "flax_dataclass": by_attribute(FlaxPair),
    "dataclass": by_attribute(JaxPair),
    "opaque": by_attribute(Opaque),
    "list": (lambda u, d: [u, d], tuple),
    "tuple": (lambda u, d: (u, d), tuple),
    "integers": (lambda u, d: {0: u, 10: d}, lambda p: (p[0], p[10])),
    "nested": (
        lambda u, d: {"a": [None, u, {}], "b": ({"d": d}, ()), "no": None},
        lambda p: (p["a"][1], p["b"][0]["d"]),
    ),
}


def two_products(split: Any) -> Any:
    """A model of the two weights of a container."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        up, down = split(params)
        return jnp.tanh(x @ up) @ down

    return apply


for name, (make, split) in CONTAINERS.items():

    def build(dtype, make=make, split=split):
        """The container of both."""
        weights = normals(dtype, up=(6, 8), down=(8, 4)).values()
        return Problem(two_products(split), make(*weights), (normal("x", (3, 6), dtype),))

    rules, sites, trainable = (LoRA(rank=2, alpha=4),), 2, BOTH
    if name == "list":  # by path
        rules, sites = (LoRA("^0$", rank=2, alpha=4), Full("^1$")), 1
        trainable = 2 * (6 + 8) + 8 * 4
    case("tree", trainable, f"tree_{name}", rules=rules, sites=sites)(build)


@case("tree", 2 * 2 * (6 + 5), sites=2, exact_at_zero=False)
def tree_one_array_twice(dtype):
    """Two leaves, one buffer: an adapter for each."""
    w, x = normal("w", (6, 5), dtype), normal("x", (3, 6), dtype)

    def apply(p, x):
        return x @ jnp.concatenate([p["first"], p["second"]], axis=1)[:, 2:7]

    return Problem(apply, {"first": w, "second": w}, (x,))


@case("tree", 2 * (6 + 5))
def tree_bare_array(dtype):
    """The parameters are one array."""
    x = normal("x", (3, 6), dtype)
    return Problem(lambda w, x: jnp.tanh(x @ w), normal("w", (6, 5), dtype), (x,))


@case("tree", 2 * (6 + 5))
def tree_with_integers_and_scalars(dtype):
    """Integer arrays, keys, NumPy's arrays and Python scalars beside the weights."""
    params = {
        "w": np.asarray(normal("w", (6, 5), dtype)),
        "table": jnp.array([2, 0, 1]),
        "key": jax.random.key(0),
        "temperature": 2.0,
        "mask": np.array([True, False, True]),
    }

    def apply(p, x):
        x = jnp.where(p["mask"][:, None], x[p["table"]], x)
        noise = jax.random.bernoulli(p["key"], 0.5, (3, 5))
        return jnp.where(noise, x @ p["w"], 0) / p["temperature"]

    return Problem(apply, params, (normal("x", (3, 6), dtype),))
