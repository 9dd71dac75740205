"""MiSS of the real PEFT, loaded and written again. Needs the extra `interop`."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

import jlora  # noqa: E402
from jlora import peft  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")
NAMES = [peft.Name(r"(\w+)/kernel", r"\1", "io"), peft.Name(r"(\w+)/bias", r"\1", "o", "bias")]
CONFIGS = {
    "a rank that divides": {"r": 4, "init_weights": False},
    "one that does not": {"r": 5, "bias": "MiSS_only", "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_model_and_the_same_bytes(name: str, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    sizes = {"up": (16, 36), "down": (36, 16), "head": (16, 2)}
    layers = {module: torch.nn.Linear(*size) for module, size in sizes.items()}
    plain = torch.nn.Sequential()
    for module, layer in layers.items():
        plain.add_module(module, layer)
    params = {
        module: {
            "kernel": layer.weight.detach().numpy().T.copy(),
            "bias": layer.bias.detach().numpy().copy(),
        }
        for module, layer in layers.items()
    }
    config = hf_peft.MissConfig(target_modules=["up", "down"], **CONFIGS[name])
    model = hf_peft.get_peft_model(plain, config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "own")
    adapter = peft.load(tmp_path / "own", params, NAMES)
    merged, x = jlora.merge(params, adapter), torch.randn(5, 16)
    found = jnp.asarray(x.numpy())
    for module in layers:
        found = found @ merged[module]["kernel"] + merged[module]["bias"]
    np.testing.assert_allclose(found, model.eval()(x).detach(), atol=5e-5)
    fields = peft.read_config(tmp_path / "own")
    peft.save(tmp_path / "again", params, adapter, NAMES, config=fields)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        again, own = (tmp_path / folder / file for folder in ("again", "own"))
        assert again.read_bytes() == own.read_bytes()
