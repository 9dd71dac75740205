"""Sketches and their starts against the real PEFT on PyTorch. Needs the extra `interop`."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

from peft.tuners.lora.eva import get_eva_state_dict  # noqa: E402
from peft.tuners.lora.loraga import preprocess_loraga  # noqa: E402

import jlora  # noqa: E402
from jlora import LoRA  # noqa: E402
from jlora.initializers import eva, lora_ga  # noqa: E402

RANK, ALPHA, WIDTH = 3, 5, 24


def model() -> Any:
    """Layers of one size, so that each rank costs the same."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])


def params_of(model: Any) -> dict[str, jax.Array]:
    return {
        name.split(".")[0]: jnp.asarray(w.detach().numpy().T)
        for name, w in model.named_parameters()
    }


def apply(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ p["0"]) @ p["2"]) @ p["4"]


def loss(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.mean(apply(p, x) ** 2)


def data() -> np.ndarray:
    """Inputs whose variances fall, around a mean."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((400, WIDTH)) @ np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    return (z * 1.0 / (1 + np.arange(WIDTH)) + 0.3).astype(np.float32)


def config_of(start: str, **options: Any) -> Any:
    return hf_peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["0", "2", "4"], init_lora_weights=start, **options
    )


def test_eva() -> None:
    """Subspaces, and the ranks that PEFT distributes."""
    x, theirs = data(), model()
    config = config_of("eva", eva_config=hf_peft.EvaConfig(rho=2.0))
    found = get_eva_state_dict(
        theirs,
        [torch.from_numpy(x)],
        config,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    params, rule = params_of(theirs), LoRA(rank=RANK, alpha=ALPHA)
    sketch = jlora.sketch(loss, params, rule, [jnp.asarray(x)], kind="inputs", passes=8)
    rules = jlora.allocate(sketch, LoRA(rank=RANK, alpha=ALPHA, init=eva(sketch)))
    _, adapter = jlora.transform(apply, *rules).init(jax.random.key(0), params, x)
    ranks = {name: len(a) for name, a in found.items() if len(a)}
    assert {name: node.a.shape[-1] for name, node in adapter.items()} == ranks
    for name, node in adapter.items():
        overlap = np.linalg.svd(found[name].numpy() @ np.asarray(node.a), compute_uv=False)
        np.testing.assert_allclose(overlap, 1, atol=1e-3)
        np.testing.assert_allclose(node.scale, ALPHA / RANK)


def test_lora_ga() -> None:
    """A and B up to their signs, and so W - s·A·B; the model begins as it was."""
    x, theirs = data(), model()
    params, before = params_of(theirs), theirs(torch.from_numpy(x)).detach().numpy()
    config = config_of("lora_ga", lora_ga_config=hf_peft.LoraGAConfig())
    tuned = copy.deepcopy(theirs)
    preprocess_loraga(tuned, config, lambda: (tuned(torch.from_numpy(x)) ** 2).mean().backward())
    tuned = hf_peft.get_peft_model(tuned, config)

    rule = LoRA(rank=RANK, alpha=ALPHA)
    sketch = jlora.sketch(loss, params, rule, [jnp.asarray(x)], kind="gradient", passes=8)
    lora = jlora.transform(apply, LoRA(rank=RANK, alpha=ALPHA, init=lora_ga(sketch)))
    base, adapter = lora.init(jax.random.key(0), params, x)
    np.testing.assert_allclose(lora.apply(base, adapter, x), before, atol=1e-5)
    for name, node in adapter.items():
        module = tuned.base_model.model[int(name)]
        a = module.lora_A["default"].weight.detach().numpy().T
        b = module.lora_B["default"].weight.detach().numpy().T
        of_a = np.sign(np.sum(a * np.asarray(node.a), 0))
        of_b = np.sign(np.sum(b * np.asarray(node.b), 1))[:, None]
        np.testing.assert_allclose(node.a * of_a, a, atol=1e-3)
        np.testing.assert_allclose(node.b * of_b, b, atol=1e-3 * np.abs(b).max())
        expected, ours = (params[name] - node.scale * p @ q for p, q in ((a, b), (node.a, node.b)))
        np.testing.assert_allclose(module.base_layer.weight.detach().numpy().T, expected, atol=1e-6)
        np.testing.assert_allclose(base[name], ours, atol=1e-6)
