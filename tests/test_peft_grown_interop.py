"""Adapters of more than the base has, against PEFT's merged and saved model. Needs `interop`.

New tokens, a head on a base without it, and one side of a tied weight: tensors bit for bit, and the
configuration as `transformers` reads it.
"""

import copy
import json
import pathlib
import re
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

import transformers  # noqa: E402
from peft_families import FAMILIES, HEADS, SIZES, TIED  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from jlora import peft  # noqa: E402

# What PyTorch and its libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("default")

Folder = pathlib.Path
OFTEN = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}  # that differ
OUTER = re.compile(r"^language_model\.(?=lm_head)")  # before a head, in older checkpoints
ATTENTION = {"target_modules": r".*\.(q_proj|query|q_lin|q|c_attn|query_key_value)$"}


def without_often(config: Any) -> Any:
    """A configuration, with those in it, but for the fields `OFTEN`."""
    if not isinstance(config, dict):
        return config
    return {key: without_often(x) for key, x in config.items() if key not in OFTEN}


class Run(NamedTuple):
    """An adapter, and PEFT's merged model."""

    folder: Folder
    merged: Any

    def compare(self, *, without: tuple[str, ...] = (), atol: float = 0, **options: Any) -> Any:
        """Merges with jlora, and compares tensors, configurations and models.

        Neither the base nor the adapter has what begins with one of `without`.
        """
        peft.export_merged(self.folder / "base", self.folder / "a", self.folder / "ours", **options)
        self.merged.save_pretrained(self.folder / "theirs")
        base, ours, theirs = (
            {OUTER.sub("", name): value for name, value in load_file(file).items()}
            for file in (self.folder / x / "model.safetensors" for x in ("base", "ours", "theirs"))
        )
        told = lambda names: [n for n in names if not n.startswith(without or "-")]  # noqa: E731
        for name in told(theirs):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=name)
        # An old head stays, and may get the prefix of the other names.
        prefixes = {"", *(f"{name.partition('.')[0]}." for name in ours)}
        assert ours.keys() - told(theirs) <= {prefix + n for prefix in prefixes for n in base}
        read = transformers.AutoConfig.from_pretrained
        one, other = (read(self.folder / name).to_dict() for name in ("ours", "theirs"))
        assert without_often(one) == without_often(other)
        cls, expected = type(self.merged), self.merged.state_dict()
        loaded, info = cls.from_pretrained(self.folder / "ours", output_loading_info=True)
        assert not told(info["missing_keys"]) and not info["mismatched_keys"]
        own = loaded.state_dict()
        for name in told(own):
            torch.testing.assert_close(own[name], expected[name], rtol=0, atol=atol, msg=name)
        return ours


def adapt(
    folder: Folder,
    base: Any,
    architecture: str,
    options: dict[str, Any],
    vocabulary: int | None = None,
    **labels: Any,
) -> Run:
    """Saves a base, and adapts the model of another class, or with another vocabulary, on it."""
    base.save_pretrained(folder / "base")
    cls = getattr(transformers, architecture)
    torch.manual_seed(1)
    model = cls.from_pretrained(folder / "base", ignore_mismatched_sizes=True, **labels).eval()
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    adapted = hf_peft.get_peft_model(
        model, hf_peft.LoraConfig(**{"r": 2, "lora_alpha": 4} | options)
    )
    for name, x in adapted.named_parameters():
        if x.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            x.data += 0.1 * torch.randn(x.shape, generator=generator)
    adapted.save_pretrained(folder / "a")
    return Run(folder, adapted.merge_and_unload())


def make(architecture: str, **config: Any) -> Any:
    """A tiny random model."""
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    sizes = {} if "text_config" in config else SIZES
    return cls(cls.config_class(**copy.deepcopy(sizes | config))).eval()


# ----------------------------------------------------------------------------------- heads

POOLER = ("bert.pooler", "pooler")
# Architecture of the base and of the adapted model; its task, labels, and what it has of no one.
HEADED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "bert": ("BertForMaskedLM", "BertForSequenceClassification", {}, {}, POOLER),
    "bert without prefix": ("BertModel", "BertForSequenceClassification", {}, {}, ()),
    "two labels": ("BertModel", "BertForSequenceClassification", {}, {"num_labels": 2}, ()),
    "tagger": ("BertForMaskedLM", "BertForTokenClassification", {}, {"num_labels": 5}, ()),
    "answers": ("BertModel", "BertForQuestionAnswering", {}, {"num_labels": 2}, ()),
    "roberta": ("RobertaForMaskedLM", "RobertaForSequenceClassification", {}, {}, ()),
    "distilbert": ("DistilBertModel", "DistilBertForSequenceClassification", {}, {}, ()),
    "reward": ("LlamaForCausalLM", "LlamaForSequenceClassification", {}, {"num_labels": 1}, ()),
    "tied": (
        "LlamaForCausalLM", "LlamaForSequenceClassification", {"tie_word_embeddings": True}, {}, ()
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification", HEADS, {}, ()),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification", {}, {"num_labels": 4}, ()),
    "gpt2 without prefix": ("GPT2Model", "GPT2ForSequenceClassification", {}, {}, ()),
    "t5": ("T5ForConditionalGeneration", "T5ForSequenceClassification", {}, {}, ()),
    "bart": ("BartForConditionalGeneration", "BartForSequenceClassification", {}, {}, ()),
    "images and text": (
        "Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification",
        FAMILIES["gemma3-vl"][1], {}, ()
    ),
    "vit": ("ViTModel", "ViTForImageClassification", {}, {"num_labels": 7}, ()),
    "other labels": (
        "ViTForImageClassification", "ViTForImageClassification", {}, {"num_labels": 9}, ()
    ),
}  # fmt: skip
TASKS = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS", "Question": "QUESTION_ANS"}
SAVED = {"bart": ["classification_head"], "t5": ["classification_head"]}


@pytest.mark.parametrize("name", HEADED)
def test_a_head(name: str, tmp_path: Folder) -> None:
    """It is the adapter's, and the configuration that of the model with it."""
    base, architecture, config, labels, without = HEADED[name]
    if not hasattr(transformers, architecture):
        pytest.skip(f"no {architecture} in this version")
    task = next((task for word, task in TASKS.items() if f"For{word}" in architecture), None)
    saved = SAVED.get(name) if task else ["classifier"]
    options = ATTENTION | {"task_type": task, "modules_to_save": saved}
    config = {"num_labels": 2 if "other" not in name else 3} | config
    labels = {"num_labels": 3} | labels
    adapt(tmp_path, make(base, **config), architecture, options, **labels).compare(without=without)


# ----------------------------------------------------------------------------------- new tokens

BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
UNTIED = {"tie_word_embeddings": False}
# Family, or architecture; what it has beside the sizes; the adapter; the options of `compare`.
RESIZED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "by itself": ("LlamaForCausalLM", UNTIED, {}, {}),
    "saved": ("LlamaForCausalLM", UNTIED, BOTH, {}),
    "tied": ("LlamaForCausalLM", TIED, {}, {}),
    "tied, saved": ("LlamaForCausalLM", TIED, BOTH, {"untie": True}),
    "tied together": (
        "LlamaForCausalLM",
        TIED,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {},
    ),
    "bias": ("PhiForCausalLM", {}, {"bias": "all"}, {}),
    "tokens": ("LlamaForCausalLM", UNTIED, {"trainable_token_indices": [70, 73]}, {}),
    "gpt2": ("GPT2LMHeadModel", {}, {}, {}),
    "gpt2 without prefix": ("GPT2Model", {}, {}, {}),
    "t5": ("T5ForConditionalGeneration", {}, {}, {}),
    "bert": ("BertForMaskedLM", {}, {}, {}),
    "head without tokens": ("BertModel", {}, {}, {}),
}


@pytest.mark.parametrize("vocabulary", [75, 60])
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary(name: str, vocabulary: int, tmp_path: Folder) -> None:
    """On the base as it was before, whose rows are of another number."""
    architecture, config, options, how = RESIZED[name]
    if "trainable_token_indices" in options and vocabulary == 60:
        options = {"trainable_token_indices": [50, 53]}
    base = make(architecture, **config)
    run = adapt(tmp_path, base, architecture, ATTENTION | options, vocabulary)
    ours = run.compare(**how)
    assert any(len(x) == vocabulary for x in ours.values())
    assert json.loads((tmp_path / "ours/config.json").read_text())["vocab_size"] == vocabulary


# ----------------------------------------------------------------------------------- tied heads

TABLES = ["embed_tokens", "lm_head", "wte", "word_embeddings"]
# What the adapter changes, and whether that is one side of the tied weight.
SIDES: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": TABLES[:1] + TABLES[2:]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": TABLES},
    "embedding by DoRA": {"target_modules": TABLES[:1] + TABLES[2:], "use_dora": True},
    "head by DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "embedding in full": ATTENTION | {"modules_to_save": TABLES[:1] + TABLES[2:]},
    "head in full": ATTENTION | {"modules_to_save": ["lm_head"]},
    "both in full": ATTENTION | {"modules_to_save": TABLES},
}
TIED_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaForCausalLM", TIED),
    "gemma": ("GemmaForCausalLM", "GemmaForCausalLM", HEADS),
    "gpt2": ("GPT2LMHeadModel", "GPT2LMHeadModel", {}),
    "gpt2 without prefix": ("GPT2Model", "GPT2LMHeadModel", {"architectures": ["GPT2LMHeadModel"]}),
    "bloom": ("BloomForCausalLM", "BloomForCausalLM", {}),
}
TIED_MODELS |= {
    family: (cls := FAMILIES[family][0], cls, FAMILIES[family][1])
    for family in ("llava-tied", "gemma3-vl")
}


def untied(run: Run) -> Any:
    """PEFT's merged model of the adapter on an untied base, as PEFT advises."""
    model = type(run.merged).from_pretrained(run.folder / "base")
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = torch.nn.Parameter(table.weight.detach().clone())
    return hf_peft.PeftModel.from_pretrained(model, run.folder / "a").merge_and_unload()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TIED_MODELS)
def test_one_side_of_a_tied_weight(name: str, side: str, tmp_path: Folder) -> None:
    """`untie` stores both; without it, the refusal names it, and nothing is written."""
    base, architecture, config = TIED_MODELS[name]
    model = make(base, **config)
    run = adapt(tmp_path, model, architecture, SIDES[side])
    if base != architecture:  # as on the Hub: without prefix, and with the class that has the head
        file = tmp_path / "base" / "config.json"
        fields = json.loads(file.read_text()) | {"architectures": [architecture]}
        file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="give untie=True"):
        peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours")
    if "without" in name and side in ("head", "head by DoRA"):
        with pytest.raises(ValueError, match="`untie`: the name of the head is not known"):
            peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours", untie=True)
        return  # nothing in the adapter tells the prefix
    # jlora computes norms in float64.
    atol = 1e-6 if "DoRA" in side else 0
    ours = Run(tmp_path, untied(run)).compare(atol=atol, untie=True)
    table = next(
        n
        for n in ours
        if n.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    )
    assert not torch.equal(ours[table], ours["lm_head.weight"])


def test_untied_rows(tmp_path: Folder) -> None:
    """PEFT gives the rows of a tied embedding to the head; untied, both have them."""
    options = {"trainable_token_indices": [5, 1], "target_modules": ["q_proj"]}
    run = adapt(tmp_path, make("LlamaForCausalLM", **TIED), "LlamaForCausalLM", options)
    peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours", untie=True)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    for name, x in run.merged.state_dict().items():
        assert torch.equal(ours[name], x), name


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_what_is_not_untied(name: str, tmp_path: Folder) -> None:
    """T5 scales what it ties, and BERT ties a bias too."""
    architecture, why = {
        "t5": ("T5ForConditionalGeneration", "an encoder-decoder model ties further embeddings"),
        "bert": ("BertForMaskedLM", "the name of the head is not known"),
    }[name]
    options = {"target_modules": ["shared", "word_embeddings"]}
    adapt(tmp_path, make(architecture, **TIED), architecture, options)
    with pytest.raises(ValueError, match=f"`untie`: {why}"):
        peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours", untie=True)
    assert not (tmp_path / "ours").exists()
