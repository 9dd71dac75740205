"""Parameters in every container, and leaves that are no JAX arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from jlora import Full, LoRA

from ._case import Case, Problem, entry, normal, normals

CASES: list[Case] = []
case = partial(entry, CASES)
LORA = LoRA(rank=2, alpha=4)  # all-linear
WEIGHT, BIAS, HEAD = (6, 5), (5,), (5, 4)
BOTH = 2 * (6 + 5) + 2 * (5 + 4)  # weight, head


class Pair(NamedTuple):
    """A layer."""

    weight: Any
    bias: Any


@struct.dataclass
class FlaxLayer:
    """A layer with a static field."""

    weight: Any
    bias: Any
    name: str = struct.field(pytree_node=False, default="layer")


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["name"])
@dataclass
class JaxLayer:
    """The same without Flax."""

    weight: Any
    bias: Any
    name: str = "layer"


@jax.tree_util.register_pytree_node_class
class Opaque:
    """A container registered without keys: its children are numbered."""

    def __init__(self, weight: Any, bias: Any):
        """Keeps both."""
        self.weight, self.bias = weight, bias

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        """Children, and nothing static."""
        return (self.weight, self.bias), None

    @classmethod
    def tree_unflatten(cls, static: None, children: tuple[Any, Any]) -> Opaque:
        """From children."""
        return cls(*children)


def dense(x, weight, bias):
    """tanh(x·w + b)."""
    return jnp.tanh(x @ weight + bias[None])


def container(name, make, read, *, rules=(LORA,), sites=2, trainable=BOTH, **flags):
    """Adds params `make(weight, bias, head)`, from which `read` gets the three again."""

    def build(dtype):
        def apply(params, x):
            weight, bias, head = read(params)
            return dense(x, weight, bias) @ head

        leaves = normals(dtype, weight=WEIGHT, bias=BIAS, head=HEAD).values()
        return Problem(apply, make(*leaves), (normal("x", (3, 6), dtype),))

    CASES.append(
        Case(
            name=name,
            subject="tree",
            build=build,
            rules=rules,
            sites=sites,
            trainable=trainable,
            **flags,
        )
    )


def by_name(tree):
    """The leaves of {"layer": {"weight", "bias"}, "head"}."""
    return tree["layer"]["weight"], tree["layer"]["bias"], tree["head"]


def by_attribute(tree):
    """The leaves of {"layer": an object, "head"}."""
    return tree["layer"].weight, tree["layer"].bias, tree["head"]


def named(weight, bias, head):
    """A nested dict."""
    return {"layer": {"weight": weight, "bias": bias}, "head": head}


WEIGHT_ONLY = {"sites": 1, "trainable": 2 * (6 + 5)}
container("tree_dict", named, by_name)
container(
    "tree_nnx_state_of_params",
    lambda *leaves: nnx.State(jax.tree.map(nnx.Param, named(*leaves))),
    lambda tree: tuple(leaf[...] for leaf in by_name(tree)),
    rules=(LoRA("^layer/weight$", rank=2, alpha=4), Full("^head$")),
    sites=1,
    trainable=2 * (6 + 5) + 5 * 4,
)
container("tree_named_tuple", lambda w, b, h: {"layer": Pair(w, b), "head": h}, by_attribute)
container(
    "tree_list_by_path",
    lambda w, b, h: [[w, b], [h]],
    lambda p: (*p[0], *p[1]),
    rules=(LoRA("^0/0$", rank=2, alpha=4), Full("^0/1$|^1/0$")),
    sites=1,
    trainable=2 * (6 + 5) + 5 + 5 * 4,
)
container("tree_without_keys", lambda w, b, h: {"layer": Opaque(w, b), "head": h}, by_attribute)
container("tree_integer_keys", lambda w, b, h: {0: w, 1: b, 10: h}, lambda p: (p[0], p[1], p[10]))
container(
    "tree_with_nothing",
    lambda w, b, h: {"layer": [None, w, {}], "bias": b, "head": (h, ()), "no": None},
    lambda p: (p["layer"][1], p["bias"], p["head"][0]),
)
container("tree_numpy", lambda *leaves: jax.tree.map(np.asarray, named(*leaves)), by_name)
container(  # two leaves, one buffer: an adapter for each
    "tree_one_array_twice",
    lambda w, b, h: {"first": w, "second": w, "bias": b, "head": h},
    lambda p: (jnp.concatenate([p["first"], p["second"]], axis=1)[:, 2:7], p["bias"], p["head"]),
    sites=3,
    trainable=2 * (6 + 5) + BOTH,
    exact_at_zero=False,
)


@case(subject="tree", rules=(LORA,), sites=1, trainable=2 * (6 + 5))
def tree_bare_array(dtype):
    """The parameters are one array."""
    return Problem(
        lambda w, x: jnp.tanh(x @ w), normal("w", WEIGHT, dtype), (normal("x", (3, 6), dtype),)
    )


@case(subject="tree", rules=(LORA,), sites=1, trainable=2 * (6 + 5))
def tree_with_integers_and_scalars(dtype):
    """Integer arrays, keys and Python scalars beside the weights."""
    params = {
        **normals(dtype, w=WEIGHT),
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
