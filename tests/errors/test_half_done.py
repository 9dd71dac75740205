"""A call that is refused leaves nothing half done."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import refused
from small import KEY, PARAMS, W, X, assert_close, dense, model, set_up_noisy

import jlora
from jlora import LoRA


def failing(key: Any, w: Any, site: Any, rule: Any) -> Any:
    """An initializer that raises at the second site."""
    if site.path == "layer/kernel":
        raise RuntimeError("no memory left")
    return jlora.initializers.gaussian(key, w, site, rule)


@pytest.mark.parametrize(
    ("rules", "error", "got"),
    [
        ((LoRA("kernel", rank=2), LoRA("fused", rank=7)), ValueError, "is 7, above"),
        ((LoRA("kernel|fused", rank=2, init=failing),), RuntimeError, "no memory left"),
    ],
)
def test_failed_init_leaves_inputs(rules: Any, error: Any, got: str) -> None:
    """It changes neither the parameters nor the transform; errors of initializers pass."""
    params = copy.deepcopy(jax.tree.map(np.asarray, PARAMS))
    leaves, before = jax.tree.leaves(params), copy.deepcopy(params)
    lora = jlora.transform(model, *rules)
    for _ in range(2):
        with refused(error, "", got):
            lora.init(KEY, params, X)
    assert all(x is y for x, y in zip(jax.tree.leaves(params), leaves, strict=True))
    assert_close(params, before, 0.0)


def test_failed_apply_leaves_inputs() -> None:
    """After a call that raises, the next call on the same trees is right."""

    def switchable(p: Any, x: jax.Array, odd: bool = False) -> jax.Array:
        return x @ (jnp.sin(p["w"]) if odd else p["w"])

    lora, base, adapter = set_up_noisy(switchable, LoRA("w", rank=2), W, X)
    before = jax.tree.map(np.array, (base, adapter))
    expected = dense(jlora.merge(base, adapter), X)
    with refused(NotImplementedError, "sin", "the weight 'w'"):
        lora.apply(base, adapter, X, odd=True)
    with pytest.raises(TypeError, match="dot_general"):
        lora.apply(base, adapter, X[:, :3])
    with refused(ValueError, "adapter", "w"):
        jlora.merge({"w": X}, adapter)
    assert_close(lora.apply(base, adapter, X), expected)
    assert_close((base, adapter), jax.tree.map(jnp.asarray, before), 0.0)
    assert base["w"] is W["w"]
