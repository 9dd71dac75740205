"""Where `transformers` stores parameters: the file against the library, and merges against PEFT.

All classes of `transformers` in the long run; some each time that its version 5 is there.
"""

import collections
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5")

import ask_peft  # noqa: E402
import make_places  # noqa: E402
import tiny_models  # noqa: E402
from small import some  # noqa: E402

from jlora import peft  # noqa: E402
from jlora.peft.names._peft import ModuleRules, load_module_rules  # noqa: E402
from jlora.peft.places._find import load_table  # noqa: E402

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
    classes = TABLE["classes"]
    return classes.get(f"{kind}/{name}") or classes.get(name) or TABLE["models"].get(kind, {})


@pytest.mark.parametrize("name", DAILY)
def test_a_class_is_as_the_file_says(name: str) -> None:
    model = tiny_models.make_model(getattr(transformers, name))
    made = make_places.make(model)
    assert not make_places.differs(made, entry_of(model))
    assert bool(made.rows) == (name != "BertForMaskedLM")


@pytest.mark.slow
def test_the_file_is_what_the_library_does() -> None:
    """If not, make it again: `python tests/tools/make_places.py`."""
    made = list(make_places.make_all(tiny_models.list_pairs()))
    found = make_places.gather(made) | make_places.declare()
    assert len(made) > 1_500 and sum(bool(x.rows) for x in made) > 300
    assert found == TABLE | {"transformers": transformers.__version__}


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Mamba2ForCausalLM", "BertForMaskedLM"])
def test_peft_answers_as_the_file_says(name: str) -> None:
    model = tiny_models.make_model(getattr(transformers, name))
    found = {key: tuple(x) for key, x in ask_peft.ask(model).items()}
    assert ModuleRules(**found) == load_module_rules().get(model.config.model_type, ModuleRules())


def test_constants_are_pefts() -> None:
    """If not, ask again: `python tests/tools/ask_peft.py`."""
    text = json.loads(ask_peft.FILE.read_text())
    for key, x in ask_peft.ask_constants().items():
        assert json.loads(json.dumps(x)) == text[key]


@pytest.mark.slow
def test_all_answers_are_pefts() -> None:
    """If not, ask again: `python tests/tools/ask_peft.py`."""
    found = ask_peft.ask_all(tiny_models.list_classes())
    assert found == json.loads(ask_peft.FILE.read_text())["models"]


# ----------------------------------------------------------------------------- merging into them

# What the file has rows for: kinds of models, of which a class stands for all, and single classes.
KINDS = [kind for kind, x in TABLE["models"].items() if "rows" in x]
CLASSES = [name for name, x in TABLE["classes"].items() if "rows" in x and name not in DAILY]
# Models that do not compute at these sizes, or need more than tokens, images or sounds: only their
# tensors are compared.
NOT_RUN = """
    ASTForAudioClassification AXK1ForCausalLM AXK2ForCausalLM CHMv2ForDepthEstimation
    ColPaliForRetrieval DeepseekOcr2ForConditionalGeneration DeepseekOcr2Model
    DeepseekV2ForCausalLM DeepseekV3ForCausalLM DepthAnythingForDepthEstimation
    DepthProForDepthEstimation DepthProModel Dots3NoteAudioModel Ernie4_5_MoeForCausalLM
    Glm4MoeLiteForCausalLM Glm4vMoeForConditionalGeneration GraniteMoeHybridForCausalLM
    GroundingDinoForObjectDetection HYV4ForCausalLM HYV4VLForConditionalGeneration HYV4VLModel
    HYV4VLTextModel HunYuanVLForConditionalGeneration HunYuanVLModel JevForDecision
    Kimi_K25ForConditionalGeneration Kimi_K25Model Lfm3VlVisionModel LlavaOnevision15VisionModel
    LongcatFlashForCausalLM LwDetrForObjectDetection MMGroundingDinoForObjectDetection
    Mask2FormerForUniversalSegmentation MimiEncoderModel MistralLarge4ForConditionalGeneration
    MistralLarge4Model MistralLarge4TextModel NemotronHForCausalLM NemotronHModel
    OneFormerForUniversalSegmentation PI05ForConditionalGeneration PI05Model
    PI0ForConditionalGeneration PI0Model PPDocLayoutV2ForObjectDetection
    PPDocLayoutV3ForObjectDetection PPDocLayoutV4ForObjectDetection
    PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration PaliGemmaModel
    PromptDepthAnythingForDepthEstimation Qwen2_5OmniThinkerForConditionalGeneration
    Qwen3NextForQuestionAnswering Qwen3_5MoeForConditionalGeneration
    Qwen4ExpForConditionalGeneration RTDetrForObjectDetection RTDetrV2ForObjectDetection
    Sam3TrackerVideoModel Sam3VideoModel ShieldGemma2ForImageClassification
    Step3p7ForConditionalGeneration Step3p7Model TimesFm2_5ModelForPrediction
    Tipsv2DptForDensePrediction Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation
    Tipsv2DptForSemanticSegmentation UnlimitedOcrVisionModel VideoMAEForPreTraining
    ZoeDepthForDepthEstimation
"""
# Models that do not call all their linear modules: PEFT's model ignores A and B until it is merged.
NOT_CALLED = {"JambaForCausalLM", "MaskFormerForInstanceSegmentation"}
# What is tied is not clear from what `transformers` declares: a head that is adapted is refused.
UNCLEAR = {"ShieldGemma2ForImageClassification"}
# `transformers` does not read what it has saved in the original form.
NOT_READ = {"shieldgemma2/Gemma3ForConditionalGeneration"}


@functools.cache
def list_by_kind() -> Mapping[str, list[tiny_models.Pair]]:
    """Lists pairs of each kind: first those without rows of their own, and with heads."""
    pairs = collections.defaultdict[str, list[tiny_models.Pair]](list)
    for pair in tiny_models.list_pairs():
        pairs[pair.kind].append(pair)

    def order(pair: tiny_models.Pair) -> tuple[bool, bool]:
        name = pair.cls.__name__
        return name in TABLE["classes"], not re.search("For[A-Z]|LMHead", name)

    return {kind: sorted(own, key=order) for kind, own in pairs.items()}


def find_pair(case: str) -> tiny_models.Pair:
    """Finds the pair of a kind, of a class, or of "kind/class"."""
    kind, _, name = case.rpartition("/")
    if not kind and case in list_by_kind():
        return list_by_kind()[case][0]
    cls = getattr(transformers, name)
    return tiny_models.Pair(kind or cls.config_class.model_type, cls)


def list_linear(model: Any) -> list[str]:
    """Lists what PEFT can adapt; it refuses what its kernels of Mamba read past the modules."""
    heads = [model.get_output_embeddings()] if hasattr(model, "get_output_embeddings") else []
    refused = "out_proj" if model.config.model_type == "nemotron_h" else "-"
    return [
        name
        for name, x in model.named_modules()
        if type(x) is torch.nn.Linear and x.weight.numel() and not any(x is y for y in heads)
        if not name.endswith(refused)
    ]


def list_lost(model: Any, modules: Sequence[str]) -> list[str]:
    """Lists the weights of modules that are stored as no boxes."""
    lost = entry_of(model).get("lost", {})
    each = (f"{module}.weight" for module in modules)
    return [x for x in each if re.sub(r"(?<=\.)\d+(?=\.)", "{}", x) in lost]


@pytest.mark.parametrize("is_original", [True, False])
@pytest.mark.parametrize("case", some([*DAILY, *KINDS, *CLASSES], *DAILY[:2]))
def test_merged_as_peft_merges(case: str, is_original: bool, tmp_path: pathlib.Path) -> None:
    """Linear modules, into either form of a folder: `transformers` computes what PEFT's model does.

    What is stored in no boxes is refused by its name.
    """
    torch.manual_seed(0)
    cls = (pair := find_pair(case)).cls
    model = tiny_models.make_model(cls, config_class=pair.config_class)
    inputs = tiny_models.find_inputs(model)
    assert (inputs is None) == (cls.__name__ in NOT_RUN.split())
    model.save_pretrained(tmp_path / "base", save_original_format=is_original)
    saved = model.state_dict()
    modules = list_linear(model)
    lost = list_lost(model, modules) if is_original else []
    options = {"r": 2, "target_modules": modules, "init_lora_weights": False}
    adapted = hf_peft.get_peft_model(model, hf_peft.LoraConfig(**options)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    if lost:
        with pytest.raises(ValueError, match="nothing was written") as e:
            peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert all(f"{name}: in " in str(e.value) for name in lost[:9])
        return
    if cls.__name__ in UNCLEAR:
        with pytest.raises(ValueError, match="the model may read this weight twice"):
            peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        return
    peft.export_merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    config = type(model.config).from_pretrained(tmp_path / "base")  # the text's, of some pairs
    merged = cls.from_pretrained(tmp_path / "out", config=config).eval()
    before = cls.from_pretrained(tmp_path / "base", config=config).eval().state_dict()
    is_read = all(torch.equal(x, before[key]) for key, x in saved.items())
    assert is_read != (is_original and case in NOT_READ)
    if not is_read:
        return
    assert any(not torch.equal(x, before[key]) for key, x in merged.state_dict().items())
    if inputs and cls.__name__ not in NOT_CALLED:
        pairs = zip(tiny_models.run(merged, inputs), tiny_models.run(adapted, inputs), strict=True)
        for ours, theirs in pairs:
            scale = float(theirs.abs().max()) if theirs.numel() else 1.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * scale)
    found = merged.float().state_dict()  # OneFormer's own scale is in 64 bits
    for key, x in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[key], x, rtol=1e-5, atol=1e-6, msg=key)
