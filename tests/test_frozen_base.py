"""What freezes a base and what does not: masks, partitions, nestings, and leaves without a sum.

The docstrings of `jlora.mask` and `jlora.optimizer` say what is tested here.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import raw

import jlora

KEY = jax.random.key(0)
X = jnp.ones((1, 4))


def setup(**others: Any) -> jlora.Params:
    """A base with `others` beside its weight, and an adapter."""
    lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
    return jlora.Params(*lora.init(KEY, {"w": jnp.ones((4, 3))} | others, X))


def step(tx: Any, params: Any, steps: int = 1) -> tuple[Any, Any]:
    """Parameters and state after steps whose gradients are all ones, also those of the base."""
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def group(params: Any) -> Any:
    """As in the docstring of `jlora.mask`."""
    words = {True: "trained", False: "frozen"}
    return jax.tree.map(words.get, jlora.mask(params))


SGD = optax.sgd(0.5)
FREEZING = {
    "optimizer": jlora.optimizer(SGD),
    "by mask": optax.partition({"trained": SGD, "frozen": optax.set_to_zero()}, group),
    "by labels": optax.partition(
        {"a": SGD, "b": SGD, "full": SGD, "base": optax.set_to_zero()}, jlora.labels
    ),
}


@pytest.mark.parametrize("name", list(FREEZING))
def test_what_freezes_the_base(name: str) -> None:
    """The base stays as it is, the adapter takes SGD's step."""
    params = setup()
    after, _ = step(FREEZING[name], params)
    assert raw(after.base) == raw(params.base)
    assert raw(after.adapter) == raw(jax.tree.map(lambda x: x - 0.5, params.adapter))


def test_masked_freezes_nothing() -> None:
    """As the docstring of `jlora.mask` says: raw gradients are added to the base."""
    params = setup()
    after, _ = step(optax.masked(SGD, jlora.mask), params)
    assert raw(after.base) == raw(jax.tree.map(lambda x: x + 1, params.base))


def test_mask_of_weight_decay() -> None:
    """What `jlora.mask` is for: a transformation that acts on the adapter only."""
    params = setup()
    tx = optax.add_decayed_weights(0.5, mask=jlora.mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert not np.any(updates.base["w"])
    assert raw(updates.adapter) == raw(jax.tree.map(lambda x: 0.5 * x, params.adapter))


def shapes(state: Any) -> set[tuple[int, ...]]:
    """The shapes of all arrays of a state."""
    return {x.shape for x in jax.tree.leaves(state)}


def test_nesting_of_multi_steps() -> None:
    """Inside, it accumulates the adapter; outside, the base as well. Both freeze the base."""
    params = setup()
    inside, state = step(jlora.optimizer(optax.MultiSteps(SGD, 2)), params, 2)
    assert params.base["w"].shape not in shapes(state)
    outside, state = step(optax.MultiSteps(jlora.optimizer(SGD), 2), params, 2)
    assert params.base["w"].shape in shapes(state)
    assert raw(inside) == raw(outside) == raw(step(jlora.optimizer(SGD), params)[0])


def refusal(paths: str) -> str:
    """The message for keys at `paths`."""
    return re.escape(
        f"`params` of jlora.optimizer has PRNG keys, to which no update can be added, at {paths}. "
        "Pass them to the model beside the parameters (in NNX: graph, params, rest = "
        "nnx.split(model, nnx.Param, ...)), or train the adapter alone."
    )


def test_keys_in_the_base() -> None:
    """`optax.apply_updates` cannot add to a key, so `init` says it, also of shapes."""
    params, tx = (
        setup(rngs={"key": KEY}),
        jlora.optimizer(optax.adam(1e-3)),
    )
    for init in (tx.init, lambda p: jax.eval_shape(tx.init, p), jax.jit(tx.init)):
        with pytest.raises(TypeError, match=refusal("base/rngs/key")):
            init(params)
    tx.init(params.adapter)


def test_old_keys_and_integers_in_the_base() -> None:
    """Arrays of integers, among them keys of the old kind, take an update of zero."""
    params = setup(seed=jax.random.PRNGKey(7), steps=jnp.arange(3))
    after, _ = step(jlora.optimizer(SGD), params, 2)
    assert raw(after.base) == raw(params.base)
