"""`examples/image_lora.py` in a few steps: measures of styles, and a file that diffusers loads."""

import numpy as np
import pytest

pytest.importorskip("jlora.torch._apply")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

import image_lora
from PIL import Image
from safetensors.numpy import load_file

# What torchax, PEFT and diffusers warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")


def test_a_short_run(tmp_path, monkeypatch):
    monkeypatch.setitem(image_lora.UNET, "block_out_channels", (8, 16))
    for name, few in {"BATCH": 4, "RANK": 2, "DENOISE": 2, "EACH": 2}.items():
        monkeypatch.setattr(image_lora, name, few)
    found, difference = image_lora.main(["--steps=2", "--style-steps=2", f"--out={tmp_path}"])
    assert [*found] == ["base", "slant", "stripe", "both", "data"]
    assert np.isfinite([*found.values()]).all()
    assert difference < 1e-5
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (6 * 11 * 10, 6 * 8 * 10)
    for name in image_lora.STYLES:
        tensors = load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        assert all(key.startswith("unet.") and np.isfinite(x).all() for key, x in tensors.items())
        assert any(key.endswith("lora_B.weight") and x.any() for key, x in tensors.items())


@pytest.mark.slow
def test_styles_are_seen(tmp_path):
    found, _ = image_lora.main([f"--out={tmp_path}"])
    assert found["base"].read > 0.9 and found["both"].read > 0.6
    for name in ("slant", "both"):
        assert found[name].slant > found["base"].slant + 0.2
    for name in ("stripe", "both"):
        assert found[name].stripes > found["base"].stripes + 0.5
    assert abs(found["stripe"].slant - found["base"].slant) < 0.1
    assert abs(found["slant"].stripes - found["base"].stripes) < 0.1
