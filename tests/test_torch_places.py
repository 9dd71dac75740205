"""Where `transformers` stores parameters: the file against the library, and merges against PEFT.

All classes of `transformers` in the long run; some each time that its version 5 is there.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5")

import make_places  # noqa: E402
import tiny_models  # noqa: E402
from small import some  # noqa: E402

from jlora import peft  # noqa: E402
from jlora.peft.places._find import load_table  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

TABLE = load_table()
# Of each kind: renamed, joined, split, with other submodels, by their class alone, as they are.
DAILY = [
    "ViTForImageClassification",
    "MixtralForCausalLM",
    "GteForMaskedLM",
    "LlavaForConditionalGeneration",
    "VisionEncoderDecoderModel",
    "GPTNeoXForCausalLM",
    "BertForMaskedLM",
]


def entry_of(model: Any) -> Mapping[str, Any]:
    """What the file says of a model."""
    name, kind = type(model).__name__, model.config.model_type
    return TABLE["classes"].get(name) or TABLE["models"].get(kind, {})


@pytest.mark.parametrize("name", DAILY)
def test_a_class_is_as_the_file_says(name: str) -> None:
    model = tiny_models.make_model(getattr(transformers, name))
    made = make_places.make(model)
    assert not make_places.differs(made, entry_of(model))
    assert bool(made.rows) == (name != "BertForMaskedLM")


@pytest.mark.slow
def test_the_file_is_what_the_library_does() -> None:
    """If not, make it again: `python tests/make_places.py`."""
    made = list(make_places.make_all(tiny_models.list_classes()))
    found = make_places.gather(made)
    assert len(made) > 1_500 and sum(bool(x.rows) for x in made) > 300
    for key in ("models", "classes"):
        assert found[key] == TABLE[key]


@pytest.mark.parametrize("is_original", [True, False])
@pytest.mark.parametrize("name", some(list(DAILY), *DAILY[:2]))
def test_merged_as_peft_merges(name: str, is_original: bool, tmp_path: pathlib.Path) -> None:
    """All linear modules, into either form of a folder: `transformers` reads PEFT's values."""
    cls = getattr(transformers, name)
    model = tiny_models.make_model(cls)
    model.save_pretrained(tmp_path / "base", save_original_format=is_original)
    options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = hf_peft.get_peft_model(model, hf_peft.LoraConfig(**options))
    adapted.save_pretrained(tmp_path / "adapter")
    theirs = adapted.merge_and_unload().state_dict()
    peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = cls.from_pretrained(tmp_path / "out").state_dict()
    before = cls.from_pretrained(tmp_path / "base").state_dict()
    assert any(not torch.equal(x, before[key]) for key, x in merged.items())
    for key, x in theirs.items():
        torch.testing.assert_close(merged[key], x, rtol=1e-5, atol=1e-6, msg=key)
