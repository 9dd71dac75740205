"""What `jlora combine` writes in the real PEFT on PyTorch. Needs the extra `interop`."""

import pathlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

import peft_models as models  # noqa: E402

from tests.cli.test_combine import CASES, LLAMAS, combine, other  # noqa: E402
from tests.peft.test_peft_interop import in_peft  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

Folder = pathlib.Path


def deltas(name: str, folder: Folder) -> dict[str, np.ndarray]:
    """ΔW of each module of a fixture's model, as PEFT computes it for the adapter in `folder`."""
    modules = in_peft(name, folder).base_model.model.named_modules()
    return {
        module: layer.get_delta_weight("default").detach().double().numpy()
        for module, layer in modules
        if hasattr(layer, "get_delta_weight")
    }


def check(name: str, folders: list[Folder], out: Folder, weights: tuple[float, ...]) -> None:
    combine(folders, out, weights)
    each, found = [deltas(name, folder) for folder in folders], deltas(name, out)
    assert found.keys() == set().union(*each)
    for module, x in found.items():
        pairs: Any = zip(weights, each, strict=True)
        expected = sum(w * d[module] for w, d in pairs if module in d)
        np.testing.assert_allclose(x, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_sum(name: str, tmp_path: Folder) -> None:
    """Of rsLoRA too, which PEFT's own sum scales by the root of its rank once more."""
    folders = [models.FIXTURES / name, other(tmp_path / "b", name)]
    check(name, folders, tmp_path / "out", (0.7, -0.3))


def test_different_modules_ranks_and_scales(tmp_path: Folder) -> None:
    folders = [other(tmp_path / name, name) for name in LLAMAS[:3]]
    folders.append(other(tmp_path / "rs", "all_linear", use_rslora=True))
    check("all_linear", folders, tmp_path / "out", (0.5, -2.0, 1.0, 0.25))
