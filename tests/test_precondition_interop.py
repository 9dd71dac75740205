"""Riemannian preconditioning against PEFT's optimizer on PyTorch. Needs the extra `interop`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

import jlora  # noqa: E402

DAMPING, RATE = 1e-2, 0.05


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_ten_steps_of_regression(name: str) -> None:
    """The same A and B, from the same ones."""
    from peft.optimizers import create_riemannian_optimizer

    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    config = hf_peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = hf_peft.get_peft_model(layer, config)
    module = model.base_model.model[0]
    x, y = (torch.randn(16, n) for n in (8, 6))
    pair = module.lora_A["default"].weight, module.lora_B["default"].weight
    a, b, w = (jnp.asarray(p.detach().numpy().T) for p in (*pair, module.base_layer.weight))

    lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=3, alpha=6))
    base, adapter = lora.init(jax.random.key(0), {"w": w}, x.numpy())
    adapter = {"w": adapter["w"]._replace(a=a, b=b)}
    own = {"sgd": optax.sgd(RATE), "adamw": optax.adamw(RATE, weight_decay=0.01)}[name]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    theirs = create_riemannian_optimizer(model, kind, lr=RATE, reg=DAMPING)

    def loss(adapter: Any) -> jax.Array:
        return ((lora.apply(base, adapter, x.numpy()) - y.numpy()) ** 2).mean()

    tx = jlora.optimizer(optax.chain(jlora.precondition(DAMPING), own))
    state, slope = tx.init(adapter), jax.jit(jax.grad(loss))
    for _ in range(10):
        updates, state = tx.update(slope(adapter), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        theirs.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        theirs.step()
    assert np.abs(adapter["w"].b - b).max() > 0.05
    for actual, expected in zip((adapter["w"].a, adapter["w"].b), pair, strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy().T, rtol=2e-5, atol=2e-5)
