"""The README's code for NNX: it runs as it is written there, and does what is said of it."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jlora

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
[STATELESS] = [b for b in BLOCKS if "lambda model, x: model(x)" in b]
[STATEFUL] = [b for b in BLOCKS if "nnx.split" in b]
X = jax.random.normal(jax.random.key(1), (8, 16))


class Mlp(nnx.Module):
    """Two layers, and between them what a test asks for."""

    def __init__(self, *between: Any, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        self.up = nnx.Linear(16, 12, rngs=rngs)
        self.between = nnx.List(between)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 16) to (batch, 8)."""
        x = self.up(x)
        for layer in self.between:
            x = layer(x)
        return self.down(nnx.relu(x))


def stateful() -> Mlp:
    """With batch statistics and dropout."""
    rngs = nnx.Rngs(0)
    return Mlp(nnx.BatchNorm(12, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), rngs=rngs)


def run(block: str, model: Any) -> dict[str, Any]:
    """What a block leaves behind, with what it takes for granted."""
    given = {"model": model, "x": X, "key": jax.random.key(0), "labels": jnp.arange(8)}
    names = {"jax": jax, "jlora": jlora, "nnx": nnx, "optax": optax} | given
    exec(compile(block, str(README), "exec"), names)
    return names


def test_no_other_code_for_nnx() -> None:
    """So that all of it is run here."""
    assert [b for b in BLOCKS if "nnx" in b] == [STATEFUL]


def test_module_without_state() -> None:
    """The module is the parameters; the adapter knows its paths, and what is merged is a module."""
    model = Mlp(rngs=nnx.Rngs(0))
    found = run(STATELESS, model)
    np.testing.assert_array_equal(found["y"], model(X))
    lora, base = found["lora"], found["base"]
    assert isinstance(base, Mlp)
    assert list(found["adapter"]) == ["down", "up"]
    assert [s.path for s in lora.sites(model, X)] == ["down/kernel", "up/kernel"]
    moved = jax.tree.map(lambda a: a + 0.1, found["adapter"])
    merged = jlora.merge(base, moved)
    assert isinstance(merged, Mlp)
    for apply in (lora.apply, jax.jit(lora.apply)):
        np.testing.assert_allclose(apply(base, moved, X), merged(X), atol=1e-4)
    assert np.abs(merged(X) - model(X)).max() > 0.1


def test_module_with_state() -> None:
    """Statistics and masks go on from step to step, as those of the module itself do."""
    found = run(STATEFUL, stateful())
    lora, base, adapter, step = (found[name] for name in ("lora", "base", "adapter", "step"))
    assert jnp.isfinite(found["loss"])
    served = found["model"]
    assert isinstance(served, Mlp)

    # The same model, with the weights merged and its state where NNX keeps it.
    same = nnx.merge(found["graph"], jlora.merge(base, adapter), found["rest"], copy=True)
    rest, outputs = found["rest"], []
    for _ in range(3):
        y, rest = lora.apply(base, adapter, rest, X)
        np.testing.assert_allclose(y, same(X), atol=1e-4)
        outputs.append(np.asarray(y))
    assert not np.array_equal(outputs[0], outputs[1])  # another mask
    assert not np.array_equal(served.between[0].mean[...], same.between[0].mean[...])
    np.testing.assert_allclose(
        rest["between"][0]["mean"][...], same.between[0].mean[...], atol=1e-5
    )
    assert int(rest["between"][1]["rngs"]["count"][...]) == int(same.between[1].rngs.count[...])

    state, rest, losses = found["state"], found["rest"], []
    for _ in range(20):
        adapter, state, rest, loss = step(adapter, state, rest, X, found["labels"])
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_state_that_is_closed_over_stays() -> None:
    """Why the recipe returns the state: one that drops it repeats its mask in every step."""
    graph, params, rest = nnx.split(stateful(), nnx.Param, ...)
    frozen = lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)  # noqa: E731
    lora = jlora.transform(frozen, jlora.LoRA("kernel", rank=2))
    base, adapter = lora.init(jax.random.key(0), params, X)
    first, second = (lora.apply(base, adapter, X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
