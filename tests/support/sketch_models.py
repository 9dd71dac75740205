"""Small models of every kind of site, and what they multiply with their weights, written out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
from jax import lax
from small import normal as normal

from jlora import LoRA, Slots

Batch = Any
D, F, LAYERS = 6, 5, 3


class Model(NamedTuple):
    """A model, and what it multiplies with its weights, written out.

    Attributes:
        params: of it.
        apply: `(params, batch) -> outputs`.
        inputs: for each site the inputs, (tokens, inputs), of each matrix and slot.
        batch: of a seed.
        rules: of any rank.
    """

    params: Any
    apply: Callable[[Any, Batch], jax.Array]
    inputs: Callable[[Any, Batch], dict[str, list[jax.Array]]]
    batch: Callable[[int], Batch]
    rules: tuple[Any, ...] = (LoRA(rank=1),)

    def loss(self, params: Any, batch: Batch) -> jax.Array:
        """A scalar that depends on every output in its own way."""
        return laws.scalar(self.apply(params, batch))


def flat(x: jax.Array, n: int = 1) -> jax.Array:
    """(tokens, inputs) of which the last `n` axes are the inputs."""
    return x.reshape(-1, int(np.prod(x.shape[x.ndim - n :])))


def layer(p: Any, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def unrolled(p: Any, x: jax.Array) -> jax.Array:
    for i in range(len(p["up"])):
        x = layer(jax.tree.map(lambda w, i=i: w[i], p), x)
    return x


def scanned(layer: Any) -> Any:
    return lambda p, x: lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]


def of_layers(p: Any, x: jax.Array) -> dict[str, list[jax.Array]]:
    found: dict[str, list[jax.Array]] = {"up": [], "down": []}
    for up, down in zip(p["up"], p["down"], strict=True):
        h = jnp.tanh(x @ up)
        found["up"].append(flat(x))
        found["down"].append(flat(h))
        x = x + h @ down
    return found


def layers(apply: Any) -> Model:
    params = {"up": normal(0, LAYERS, D, F), "down": normal(1, LAYERS, F, D)}
    return Model(params, apply, of_layers, lambda seed: normal(seed, 2, 9, D))


def experts() -> Model:
    params = {"up": normal(0, LAYERS, D, F), "down": normal(1, LAYERS, F, D)}

    def inputs(p: Any, x: jax.Array) -> dict[str, list[jax.Array]]:
        return {"up": list(x), "down": list(jnp.tanh(jax.vmap(jnp.matmul)(x, p["up"])))}

    return Model(params, jax.vmap(layer), inputs, lambda seed: normal(seed, LAYERS, 9, D))


def groups() -> Model:
    """`ragged_dot`, with rows in no group."""
    sizes = [8, 0, 11]

    def inputs(p: Any, x: jax.Array) -> dict[str, list[jax.Array]]:
        return {"w": [*jnp.split(x[: sum(sizes)], np.cumsum(sizes)[:-1])]}

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(lax.ragged_dot(x, p["w"], jnp.asarray(sizes, jnp.int32)))

    return Model({"w": normal(0, 3, D, F)}, apply, inputs, lambda seed: normal(seed, 21, D))


def convolution() -> Model:
    numbers = ("NHWC", "HWIO", "NHWC")

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", None, None, numbers))

    def inputs(p: Any, x: jax.Array) -> dict[str, list[jax.Array]]:
        z = lax.conv_general_dilated_patches(x, (3, 2), (1, 1), "SAME", None, None, numbers)
        return {"w": [flat(z.reshape(*z.shape[:-1], 2, 3, 2).transpose(0, 1, 2, 4, 5, 3), 3)]}

    return Model(
        {"w": normal(0, 3, 2, 2, 13)}, apply, inputs, lambda seed: normal(seed, 2, 5, 4, 2)
    )


def fused() -> Model:
    rule = LoRA("w", rank=1, slots=Slots(3, (2, 0)))
    apply = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    inputs = lambda p, x: {"w": [flat(x), flat(x)]}  # noqa: E731
    return Model({"w": normal(0, D, 3 * F)}, apply, inputs, lambda s: normal(s, 2, 9, D), (rule,))


def heads() -> Model:
    params = {"q": normal(0, 8, 2, 3), "o": normal(1, 2, 3, 7)}

    def hidden(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["q"]))

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("bthk,hkd->btd", hidden(p, x), p["o"])

    def inputs(p: Any, x: jax.Array) -> dict[str, list[jax.Array]]:
        return {"q": [flat(x)], "o": [flat(hidden(p, x), 2)]}

    return Model(params, apply, inputs, lambda seed: normal(seed, 2, 9, 8))


def twice() -> Model:
    """One weight for two products, one of them with the weight turned."""
    apply = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]  # noqa: E731

    def inputs(p: Any, x: jax.Array) -> dict[str, list[jax.Array]]:
        return {"w": [jnp.concatenate([flat(x), flat(jnp.tanh(x @ p["w"]))])]}

    return Model({"w": normal(0, D, D)}, apply, inputs, lambda seed: normal(seed, 2, 9, D))


MODELS: dict[str, Callable[[], Model]] = {
    "unrolled": lambda: layers(unrolled),
    "scan": lambda: layers(scanned(layer)),
    "remat": lambda: layers(scanned(jax.checkpoint(layer))),
    "jit": lambda: layers(jax.jit(scanned(jax.jit(layer)))),
    "experts": experts,
    "groups": groups,
    "convolution": convolution,
    "fused": fused,
    "heads": heads,
    "twice": twice,
}


def covariance(inputs: list[jax.Array]) -> np.ndarray:
    """That of each matrix, unnormalized."""
    centered = [np.asarray(z - z.mean(0)) if len(z) else np.zeros_like(z) for z in inputs]
    return np.stack([z.T @ z for z in centered])


def of_all(model: Model, batches: list[Batch]) -> dict[str, np.ndarray]:
    """The covariances of the inputs of all batches."""
    each = [model.inputs(model.params, batch) for batch in batches]
    return {
        path: covariance([jnp.concatenate(zs) for zs in zip(*(x[path] for x in each), strict=True)])
        for path in each[0]
    }
