"""Rows of the real PEFT on PyTorch, and back; MiSS, which PEFT converts. Needs `interop`."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

from peft_files import Folder, assert_close, assert_equal, assert_same_files, config_of  # noqa: E402

from jlora import peft  # noqa: E402
from tests.peft.test_peft_interop import TOLERANCE, in_peft, make, models, outputs  # noqa: E402

ROWS = [9, 2, 3]


def rows(rows: Any = ROWS, **options: Any) -> Any:
    options = {"r": 2, "target_modules": ["q_proj"]} | options
    return hf_peft.LoraConfig(trainable_token_indices=rows, **options)


TWO = {"word_embeddings": [1], "position_embeddings": [3, 0]}
# A fixture's model, and the configuration of PEFT's adapter.
FORMS: dict[str, tuple[str, Any]] = {
    "list": ("tied", rows()),
    "by name": ("tied", rows({"embed_tokens": ROWS})),
    "head listed too": ("tied", rows({"embed_tokens": ROWS, "lm_head": ROWS})),
    "tied by word": ("tied", rows(ensure_weight_tying=True)),
    "untied": ("all_linear", rows()),
    "beside head": ("all_linear", rows(target_modules=["lm_head", "q_proj"])),
    "two": ("qv", rows(TWO, target_modules=["query"])),
    "bfloat16": ("bf16", rows()),
    "with DoRA": ("all_linear", rows(use_dora=True)),
    "alone": ("all_linear", rows(target_modules="dummy-target-modules")),
    "alone, tied": ("tied", rows({"embed_tokens": ROWS}, target_modules="dummy-target-modules")),
}


def adapted(name: str, config: Any) -> Any:
    """The model of a fixture with random values in an adapter of PEFT's."""
    model = hf_peft.get_peft_model(make.base_model(name), config)
    make.fill([(n, p) for n, p in model.named_parameters() if p.requires_grad], 1, 0.3)
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_files_both_ways(form: str, tmp_path: Folder) -> None:
    """PEFT's bytes come back; what is written without its configuration means the same to it."""
    name, config = FORMS[form]
    case, model = models.case(name), adapted(name, config)
    model.save_pretrained(tmp_path / "theirs")
    adapter = peft.load(tmp_path / "theirs", case.base, case.names)
    fields = config_of(tmp_path / "theirs")
    peft.save(tmp_path / "again", case.base, adapter, case.names, config=fields)
    assert_same_files(tmp_path / "again", tmp_path / "theirs")
    expected = make.outputs(name, model).numpy()
    assert_close(outputs(case, adapter), expected, TOLERANCE.get(name, 1e-5))
    peft.save(tmp_path / "ours", case.base, adapter, case.names)
    found = make.outputs(name, in_peft(name, tmp_path / "ours")).numpy()
    assert np.array_equal(found, expected)
    assert_equal(peft.load(tmp_path / "ours", case.base, case.names), adapter)


def test_miss_is_converted_by_peft(tmp_path: Folder) -> None:
    """The remedy of the refusal: `save_as_lora` writes a LoRA that computes the same."""
    config = hf_peft.MissConfig(target_modules=["query", "value"], r=4, init_weights=False)
    case, model = models.case("qv"), adapted("qv", config)
    hf_peft.save_as_lora(tmp_path / "theirs", model, rank=4)
    adapter = peft.load(tmp_path / "theirs", case.base, case.names)
    assert_close(outputs(case, adapter), make.outputs("qv", model).numpy())
