"""Rows against the real PEFT on PyTorch: `trainable_token_indices`. Needs the extra `interop`."""

import pathlib
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

from peft_files import CONFIG, TENSORS, assert_equal  # noqa: E402
from test_peft_interop import make, models  # noqa: E402

import jlora  # noqa: E402
from jlora import LoRA, peft  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

Folder = pathlib.Path
ROWS = [9, 2, 3]


# A fixture's model, and what PEFT is told of rows.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("tied", {"trainable_token_indices": ROWS}),
    "by name": ("tied", {"trainable_token_indices": {"embed_tokens": ROWS}}),
    "head listed too": (
        "tied",
        {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
    ),
    "tied by word": ("tied", {"trainable_token_indices": ROWS, "ensure_weight_tying": True}),
    "untied": ("all_linear", {"trainable_token_indices": ROWS}),
    "beside head": (
        "all_linear",
        {"trainable_token_indices": ROWS, "target_modules": ["lm_head", "q_proj"]},
    ),
    "two": (
        "qv",
        {"trainable_token_indices": {"word_embeddings": [1], "position_embeddings": [3, 0]}},
    ),
    "bfloat16": ("bf16", {"trainable_token_indices": ROWS}),
    "with DoRA": ("all_linear", {"trainable_token_indices": ROWS, "use_dora": True}),
}


def adapted(name: str, config: Any) -> Any:
    """The model of a fixture with random values in an adapter of PEFT's."""
    model = hf_peft.get_peft_model(make.base_model(name), config)
    make.fill([(n, p) for n, p in model.named_parameters() if p.requires_grad], 1, 0.3)
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_files_both_ways(form: str, tmp_path: Folder) -> None:
    """PEFT's bytes come back; what is written without its configuration means the same to it."""
    name, options = FORMS[form]
    target = "query" if name == "qv" else "q_proj"
    config = hf_peft.LoraConfig(r=2, **{"target_modules": [target], **options})
    both_ways(name, config, tmp_path)


@pytest.mark.parametrize("target", [None, "embed_tokens", ["embed_tokens"]], ids=str)
@pytest.mark.parametrize("name", ["tied", "all_linear"])
def test_files_of_rows_alone(name: str, target: Any, tmp_path: Folder) -> None:
    """Of `TRAINABLE_TOKENS`."""
    if target == "embed_tokens":
        target = ".*embed_tokens"
    config = hf_peft.TrainableTokensConfig(token_indices=ROWS, target_modules=target)
    both_ways(name, config, tmp_path)


def both_ways(name: str, config: Any, folder: Folder) -> None:
    case, model = models.case(name), adapted(name, config)
    model.save_pretrained(folder / "theirs")
    adapter = peft.load(folder / "theirs", case.base, case.names)
    fields = peft.read_config(folder / "theirs")
    peft.save(folder / "again", case.base, adapter, case.names, config=fields)
    for file in (CONFIG, TENSORS):
        assert (folder / "again" / file).read_bytes() == (folder / "theirs" / file).read_bytes()
    tolerance = 2e-2 if name == "bf16" else 1e-5
    lora = jlora.transform(case.apply, LoRA())
    expected = make.outputs(name, model).numpy()
    y = lora.apply(case.base, adapter, jnp.asarray(case.torch["inputs"]))
    np.testing.assert_allclose(
        np.asarray(y, np.float32), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )
    peft.save(folder / "ours", case.base, adapter, case.names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back = hf_peft.PeftModel.from_pretrained(make.base_model(name), folder / "ours").eval()
    assert not [w for w in caught if "adapter keys" in str(w.message)]
    assert torch.equal(make.outputs(name, back), make.outputs(name, model))
    assert_equal(peft.load(folder / "ours", case.base, case.names), adapter)


@pytest.mark.parametrize("form", ["list", "untied", "two", "bfloat16", "with DoRA", "alone"])
def test_merged_checkpoint(form: str, tmp_path: Folder) -> None:
    """From the files and from the tree: the rows are PEFT's to the bit."""
    if form == "alone":
        name, config = "tied", hf_peft.TrainableTokensConfig(token_indices=ROWS)
    else:
        name, options = FORMS[form]
        target = "query" if name == "qv" else "q_proj"
        config = hf_peft.LoraConfig(r=2, **{"target_modules": [target], **options})
    case, model = models.case(name), adapted(name, config)
    make.base_model(name).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "theirs")
    adapter = peft.load(tmp_path / "theirs", case.base, case.names)
    peft.export_merged(tmp_path / "base", tmp_path / "theirs", tmp_path / "files")
    peft.export_merged(tmp_path / "base", adapter, tmp_path / "tree", names=case.names)
    merged, same = (models.read(tmp_path / x / "model.safetensors") for x in ("files", "tree"))
    assert {k: x.tobytes() for k, x in merged.items()} == {k: x.tobytes() for k, x in same.items()}
    after = model.merge_and_unload().state_dict()
    found = {key for key in merged if "embed_tokens" in key or "_embeddings" in key}
    assert found
    for key in found:
        bits = after[key].contiguous().view(torch.uint8).numpy().tobytes()
        assert merged[key].tobytes() == bits
