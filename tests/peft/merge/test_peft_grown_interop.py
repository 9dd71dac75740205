"""Adapters of more than the base has, against PEFT's merged and saved model. Needs `interop`.

New tokens, a head on a base without it, and one side of a tied weight: tensors bit for bit, and the
configuration as `transformers` reads it.
"""

import copy
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
hf_peft = pytest.importorskip("peft")

import peft_families  # noqa: E402
import tiny_models  # noqa: E402
import transformers  # noqa: E402
from peft_families import TIED  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from jlora import peft  # noqa: E402

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

    def compare(self, *, without: tuple[str, ...] = (), atol: float = 0) -> Any:
        """Merges with jlora, and compares tensors, configurations and models.

        Neither the base nor the adapter has what begins with one of `without`.
        """
        peft.export_merged(self.folder / "base", self.folder / "a", self.folder / "ours")
        self.merged.save_pretrained(self.folder / "theirs")
        base, ours, theirs = (
            {OUTER.sub("", name): value for name, value in load_file(file).items()}
            for file in (self.folder / x / "model.safetensors" for x in ("base", "ours", "theirs"))
        )
        told = lambda names: [n for n in names if not n.startswith(without or "-")]  # noqa: E731
        for name in told(theirs):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=atol, msg=name)
        # An old head stays, and may get the prefix of the other names. PyTorch stores once what
        # some versions of `transformers` still share.
        prefixes = {"", *(f"{name.partition('.')[0]}." for name in ours)}
        old = {prefix + n for prefix in prefixes for n in base}
        assert ours.keys() - told(theirs) <= old | self.merged.state_dict().keys()
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
    adapted = peft_families.adapt(model, folder / "a", **options)
    return Run(folder, adapted.merge_and_unload())


def make(architecture: str, **config: Any) -> Any:
    """A tiny random model."""
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    if "encoder" in config:
        return cls(cls.config_class(**copy.deepcopy(config))).eval()
    return tiny_models.make_model(cls, config, is_untied=False)


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
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification", {}, {}, ()),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification", {}, {"num_labels": 4}, ()),
    "gpt2 without prefix": ("GPT2Model", "GPT2ForSequenceClassification", {}, {}, ()),
    "t5": ("T5ForConditionalGeneration", "T5ForSequenceClassification", {}, {}, ()),
    "bart": ("BartForConditionalGeneration", "BartForSequenceClassification", {}, {}, ()),
    "images and text": (
        "Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification", {}, {}, ()
    ),
    "vit": ("ViTModel", "ViTForImageClassification", {}, {"num_labels": 7}, ()),
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
    config = {"num_labels": 2} | config
    labels = {"num_labels": 3} | labels
    adapt(tmp_path, make(base, **config), architecture, options, **labels).compare(without=without)


# ----------------------------------------------------------------------------------- new tokens

BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
UNTIED = {"tie_word_embeddings": False}
# Architecture; what it has beside the sizes; the adapter.
RESIZED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "by itself": ("LlamaForCausalLM", UNTIED, {}),
    "saved": ("LlamaForCausalLM", UNTIED, BOTH),
    "tied": ("LlamaForCausalLM", TIED, {}),
    "tied, saved": ("LlamaForCausalLM", TIED, BOTH),
    "tied together": (
        "LlamaForCausalLM",
        TIED,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "bias": ("PhiForCausalLM", {}, {"bias": "all"}),
    "tokens": ("LlamaForCausalLM", UNTIED, {"trainable_token_indices": [70, 73]}),
    "gpt2": ("GPT2LMHeadModel", {}, {}),
    "gpt2 without prefix": ("GPT2Model", {}, {}),
    "t5": ("T5ForConditionalGeneration", {}, {}),
    "head without tokens": ("BertModel", {}, {}),
}


@pytest.mark.parametrize("vocabulary", [75, 60])
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary(name: str, vocabulary: int, tmp_path: Folder) -> None:
    """On the base as it was before, whose rows are of another number."""
    architecture, config, options = RESIZED[name]
    if "trainable_token_indices" in options and vocabulary == 60:
        options = {"trainable_token_indices": [50, 53]}
    base = make(architecture, **config)
    run = adapt(tmp_path, base, architecture, ATTENTION | options, vocabulary)
    ours = run.compare()
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
    "gemma": ("GemmaForCausalLM", "GemmaForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", "GPT2LMHeadModel", {}),
    "gpt2 without prefix": ("GPT2Model", "GPT2LMHeadModel", {"architectures": ["GPT2LMHeadModel"]}),
    "bloom": ("BloomForCausalLM", "BloomForCausalLM", {}),
}
PARTS = {"Llava": {"text_config": TIED} | TIED, "Gemma3": {}}  # of models whose text is a part
TIED_MODELS |= {
    name: (cls := f"{name}ForConditionalGeneration", cls, own) for name, own in PARTS.items()
}


def untie_base(cls: Any, folder: Folder) -> Any:
    """A tied model with a copy of all that it ties."""
    tied = cls.from_pretrained(folder)
    config = copy.deepcopy(tied.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    model = cls.from_pretrained(folder, config=config)
    model.load_state_dict(tied.state_dict())
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model


def untied(run: Run) -> Any:
    """PEFT's merged model of the adapter on an untied base, as PEFT advises."""
    model = untie_base(type(run.merged), run.folder / "base")
    return hf_peft.PeftModel.from_pretrained(model, run.folder / "a").merge_and_unload()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TIED_MODELS)
def test_one_side_of_a_tied_weight(name: str, side: str, tmp_path: Folder) -> None:
    """A decoder's head gets a weight of its own, as PEFT computes with the unmerged adapter."""
    base, architecture, config = TIED_MODELS[name]
    model = make(base, **config)
    run = adapt(tmp_path, model, architecture, SIDES[side])
    if base != architecture:  # as on the Hub: without prefix, and with the class that has the head
        file = tmp_path / "base" / "config.json"
        fields = json.loads(file.read_text()) | {"architectures": [architecture]}
        file.write_text(json.dumps(fields))
    # jlora computes norms in float64.
    atol = 1e-6 if "DoRA" in side else 0
    ours = Run(tmp_path, untied(run)).compare(atol=atol)
    tables = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
    table = next(name for name in ours if name.endswith(tables))
    assert not torch.equal(ours[table], ours["lm_head.weight"])


# ------------------------------------------------------------------- tables that are read twice


def part(name: str, **fields: Any) -> dict[str, Any]:
    """The configuration of a tiny model within another."""
    kind = getattr(transformers, f"{name}Config")
    return tiny_models.make_config(kind, fields=fields, is_untied=False).to_dict()


DECODER = {"is_decoder": True, "add_cross_attention": True}
# Models that read their embedding once: all changes of it are merged.
ONCE: dict[str, tuple[str, dict[str, Any]]] = {
    "xlm-roberta": ("XLMRobertaModel", {}),
    "smollm3": ("SmolLM3Model", TIED),
    "llama": ("LlamaModel", TIED),
    "bert": ("BertModel", {}),
    "xlm": ("XLMModel", {}),
    "classifier": ("BertForSequenceClassification", {}),
    "reward": ("LlamaForSequenceClassification", TIED),
    "untied": ("LlamaForCausalLM", UNTIED),
    "image tokens": ("ImageGPTForCausalImageModeling", {}),
}
# Models that read it twice: their head gets a weight of its own.
TWICE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {}),
    "pretraining": ("BertForPreTraining", {}),
    "bert decoder": ("BertLMHeadModel", {"is_decoder": True}),
    "roberta": ("RobertaForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {}),
    "xlm": ("XLMWithLMHeadModel", {}),
    "biogpt": ("BioGptForCausalLM", {}),
    "whisper": ("WhisperForConditionalGeneration", {}),
    "speech to text": ("SpeechT5ForSpeechToText", {}),
    "encoder-decoder": (
        "EncoderDecoderModel",
        {"encoder": part("Bert"), "decoder": part("Bert", **DECODER)},
    ),
}
# Models that read it several times, or may: each change of it is refused by name.
OFTEN_READ: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", {}),
    "bart without head": ("BartModel", {}),
    "marian": ("MarianMTModel", {}),
    "seamless": ("SeamlessM4TForTextToText", {}),
    "image to text": (
        "VisionEncoderDecoderModel", {"encoder": part("ViT"), "decoder": part("GPT2", **DECODER)}
    ),
}  # fmt: skip
CHANGES: dict[str, Callable[[str], dict[str, Any]]] = {
    "A and B": lambda table: {"target_modules": [table]},
    "DoRA": lambda table: {"target_modules": [table], "use_dora": True},
    "in full": lambda table: ATTENTION | {"modules_to_save": [table]},
    "rows": lambda table: ATTENTION | {"trainable_token_indices": {table: [5, 9]}},
}


def inputs(model: Any) -> dict[str, Any]:
    """Tokens, sounds or pixels, and the first tokens of an answer."""
    tokens, draw = torch.tensor([[5, 9, 60, 7, 3]]), torch.Generator().manual_seed(0)
    config = model.config
    make = {
        "input_features": lambda: (1, config.num_mel_bins, 2 * config.max_source_positions),
        "input_values": lambda: (1, 4000),
        "pixel_values": lambda: (1, 3, config.encoder.image_size, config.encoder.image_size),
    }.get(model.main_input_name)
    found = {model.main_input_name: torch.randn(make(), generator=draw) if make else tokens}
    is_two = config.is_encoder_decoder or hasattr(model, "decoder")
    return found | ({"decoder_input_ids": tokens} if is_two else {})


def name_table(model: Any) -> str:
    """The name of the embedding of tokens, which may be in the decoder."""
    home = model.decoder if "EncoderDecoder" in type(model).__name__ else model
    table = home.get_input_embeddings()
    own = {name for name, module in model.named_modules() if module is table}
    shared = [name for name, _ in model.named_modules() if name.endswith("shared")]
    return next(iter(shared or own))


def change_table(name: str, way: str, models: Any, folder: Folder) -> Any:
    """Adapts a table; returns the class of the model."""
    architecture, config = models[name]
    if not hasattr(transformers, architecture):
        pytest.skip(f"no {architecture} in this version")
    model = make(architecture, **config)
    for x in model.parameters():
        x.data += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))
    adapt(folder, model, architecture, CHANGES[way](name_table(model)))
    return type(model)


def outputs(model: Any) -> Any:
    with torch.no_grad():
        return model(**inputs(model))[0]


def compare_outputs(cls: Any, folder: Folder) -> None:
    """Merges; outputs are those of PEFT's unmerged model."""
    base = cls.from_pretrained(folder / "base")
    expected = outputs(hf_peft.PeftModel.from_pretrained(base, folder / "a").eval())
    peft.export_merged(folder / "base", folder / "a", folder / "ours")
    ours = outputs(cls.from_pretrained(folder / "ours").eval())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# PEFT computes rows in a head without its bias, or does not give them to it.
WITH_BIAS = {"bert", "pretraining", "bert decoder", "roberta", "electra", "xlm", "encoder-decoder"}
READ = [(models, name) for models in (ONCE, TWICE, OFTEN_READ) for name in models]


@pytest.mark.parametrize("way", CHANGES)
@pytest.mark.parametrize(("models", "name"), READ, ids=[name for _, name in READ])
def test_a_table(models: Any, name: str, way: str, tmp_path: Folder) -> None:
    """Whatever the class is called; its head and other readings do not change with the table."""
    cls = change_table(name, way, models, tmp_path)
    if models is OFTEN_READ or (models is TWICE and way == "rows" and name in WITH_BIAS):
        with pytest.raises(ValueError, match="the model may read this weight twice"):
            peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
    else:
        compare_outputs(cls, tmp_path)


@pytest.mark.parametrize("way", CHANGES)
@pytest.mark.parametrize("name", ["bert", "whisper"])
def test_the_remedy_for_a_table_that_is_read_twice(name: str, way: str, tmp_path: Folder) -> None:
    cls = change_table(name, way, TWICE, tmp_path)
    untie_base(cls, tmp_path / "base").save_pretrained(tmp_path / "base")
    compare_outputs(cls, tmp_path)
