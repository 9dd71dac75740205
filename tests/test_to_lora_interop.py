"""AdaLoRA, VeRA, LoKr and MiSS of the real PEFT, written as LoRA. Needs the extra `interop`."""

import copy
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

from jlora import peft  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

TARGETS = ["up", "down"]
CONFIGS = {
    "adalora": lambda: hf_peft.AdaLoraConfig(
        init_r=4, lora_alpha=3, total_step=10, target_modules=TARGETS
    ),
    "adalora_without_alpha": lambda: hf_peft.AdaLoraConfig(
        init_r=4, lora_alpha=0, total_step=10, target_modules=TARGETS
    ),
    "adalora_pruned": lambda: hf_peft.AdaLoraConfig(
        init_r=4, total_step=10, target_modules=TARGETS
    ),
    "vera": lambda: hf_peft.VeraConfig(r=4, target_modules=TARGETS, modules_to_save=["head"]),
    "vera_with_biases": lambda: hf_peft.VeraConfig(r=4, target_modules=TARGETS, bias="vera_only"),
    "miss": lambda: hf_peft.MissConfig(r=4, target_modules=TARGETS, init_weights=False),
    "miss_that_does_not_divide": lambda: hf_peft.MissConfig(
        r=5, target_modules=TARGETS, bias="MiSS_only", modules_to_save=["head"]
    ),
    "lokr": lambda: hf_peft.LoKrConfig(
        r=2, alpha=3, target_modules=TARGETS, decompose_factor=4, init_weights=False
    ),
    "lokr_of_four": lambda: hf_peft.LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, decompose_both=True, init_weights=False
    ),
    "lokr_by_patterns": lambda: hf_peft.LoKrConfig(
        r=2, alpha=3, target_modules=TARGETS, decompose_factor=4, init_weights=False,
        rank_pattern={"down": 1}, alpha_pattern={"up": 5},
    ),
}  # fmt: skip


class Model(torch.nn.Module):
    """Three layers, of which two are adapted."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.up = torch.nn.Linear(16, 36)
        self.down = torch.nn.Linear(36, 16)
        self.head = torch.nn.Linear(16, 2)

    def forward(self, x: Any) -> Any:
        """(batch, 16) to (batch, 2)."""
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_loads_the_same_model(name: str, tmp_path: pathlib.Path) -> None:
    """As its own adapter and as one of LoRA PEFT computes the same; merged by jlora too."""
    torch.manual_seed(0)
    plain = Model()
    model = hf_peft.get_peft_model(copy.deepcopy(plain), CONFIGS[name]())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    if name == "adalora_pruned":
        kept = {"up": [True, False, True, False], "down": [False] * 4}
        config = model.peft_config["default"]
        config.rank_pattern = {f"{m}.lora_E.default": x for m, x in kept.items()}
        with torch.no_grad():
            for module, each in kept.items():
                layer = getattr(model.base_model.model, module)
                layer.lora_E["default"] *= torch.tensor(each)[:, None]
    model.save_pretrained(tmp_path / "own")
    base = tmp_path / "base"
    base.mkdir()
    save_file({k: x.numpy() for k, x in plain.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    peft.to_lora(tmp_path / "own", tmp_path / "lora", base)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    x = torch.randn(5, 16)
    expected = hf_peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "own").eval()(x)
    found = hf_peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()(x)
    assert not torch.allclose(expected, plain(x), atol=1e-2)
    np.testing.assert_allclose(found.detach(), expected.detach(), atol=2e-5)
    peft.export_merged(base, tmp_path / "lora", tmp_path / "merged")
    from safetensors.torch import load_file

    if name.startswith("miss"):
        rows = peft.Name(r"(\w+)/kernel", r"\1", "io"), peft.Name(r"(\w+)/bias", r"\1", "o", "bias")
        params = {
            m: {"kernel": layer.weight.detach().numpy().T, "bias": layer.bias.detach().numpy()}
            for m, layer in plain.named_children()
        }
        adapter = peft.load(tmp_path / "own", params, rows)
        config = peft.read_config(tmp_path / "own")
        peft.save(tmp_path / "again", params, adapter, rows, config=config)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            again, own = (tmp_path / folder / file for folder in ("again", "own"))
            assert again.read_bytes() == own.read_bytes()
    merged = Model()
    merged.load_state_dict(load_file(tmp_path / "merged/model.safetensors"))
    np.testing.assert_allclose(merged(x).detach(), expected.detach(), atol=2e-5)
