"""Messages of other libraries that a page explains: they are raised, and the remedy works."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from small import KEY, X, array, dense

import jlora

PAGE = pathlib.Path(__file__).parents[2] / "notebooks" / "errors.md"
LORA = jlora.transform(dense, jlora.LoRA("w", rank=2, dropout=0.5))
PARAMS = {"w": array(4, 6)}


def made() -> tuple[Any, Any]:
    """Base and adapter, which a step may donate."""
    return LORA.init(KEY, PARAMS, X)


def loss(adapter: Any, base: Any, x: jax.Array = X) -> jax.Array:
    return LORA.apply(base, adapter, x).sum()


def of_codes(remedy: bool) -> Any:
    base = jlora.quantize({"w": array(64, 64)}, jlora.NF4("w"))
    base, adapter = LORA.init(KEY, base, x := array(2, 64))
    return jax.grad(loss, 0 if remedy else 1)(adapter, base, x)


def of_keys(remedy: bool) -> Any:
    base, adapter = made()
    if remedy:
        return jax.grad(lambda a: loss(jlora.dropout(a, KEY), base))(adapter)
    return jax.grad(loss)(jlora.dropout(adapter, KEY), base)


def donated(remedy: bool) -> Any:
    base, adapter = made()
    step = jax.jit(lambda a: jax.tree.map(lambda x: x + 1, a), donate_argnums=0)
    new = step(adapter)
    return loss(new if remedy else adapter, base)


def of_jit(remedy: bool) -> Any:
    f = jax.jit(lambda lora, *trees: lora.apply(*trees, X), static_argnames="lora" * remedy or None)
    return f(LORA, *made())


def of_explicit_axes(remedy: bool) -> Any:
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Explicit,))
    lora = jlora.transform(lambda p, x: jax.nn.softmax(dense(p, x)) ** 2, jlora.LoRA("w", rank=2))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
        base, adapter = lora.init(KEY, PARAMS, x)
        grad = jax.grad(lambda a: lora.apply(base, a, x).sum())
        return (jax.jit(grad) if remedy else grad)(adapter)


def decayed(remedy: bool) -> Any:
    tx, adapter = jlora.optimizer(optax.adamw(1e-3)), made()[1]
    return tx.update(adapter, tx.init(adapter), *[adapter] * remedy)


def routed(remedy: bool) -> Any:
    base, adapter = made()
    route = jlora.many.route(LORA.apply if remedy else dense)
    return route(base, jlora.many.stack([adapter] * 2), jnp.array([0, 1]), X)


def of_keras(remedy: bool) -> Any:
    import keras

    import jlora.keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    adapted = jlora.keras.adapt(model, jlora.LoRA(rank=2), example=X)
    if remedy:
        adapted.compile("sgd", "mse")
    return adapted.fit(X, X[:, :3], verbose=0)


# In the order of the page.
PROVOKED: list[Callable[[bool], Any]] = [
    of_codes, of_keys, donated, of_jit, of_explicit_axes, decayed, routed, of_keras
]  # fmt: skip
ROWS = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text("utf-8").partition("## Messages")[2], re.M)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.parametrize(("message", "provoke"), [*zip(ROWS, PROVOKED, strict=True)])
def test_a_message_of_the_page(message: str, provoke: Callable[[bool], Any]) -> None:
    """JAX 0.10 computes gradients on explicit axes outside of `jit` too."""
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    provoke(True)
    if provoke is of_explicit_axes and jax.__version_info__ < (0, 11):
        provoke(False)
        return
    with pytest.raises(Exception, match=pattern) as caught:
        provoke(False)
    if provoke is of_explicit_axes:
        assert "jax.jit" in caught.value.__notes__[0]
