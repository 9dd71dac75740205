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

import peft_families  # noqa: E402
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
    sizes = {} if config.keys() & {"text_config", "ngram"} else SIZES
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


# A base with an old head, a pooler or both, the adapted model, and its task. All have a `dense`.
OLD_HEADS = {
    f"{stem} {task}": (f"{stem}{old}", f"{stem}{task}")
    for stem, old in {
        "Bert": "ForPreTraining", "Roberta": "ForMaskedLM", "DebertaV2": "ForMaskedLM",
        "Electra": "ForPreTraining",
    }.items()
    for task in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    if (stem, task) != ("DebertaV2", "ForSequenceClassification")  # whose pooler is in no file
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_HEADS)
def test_dense_layers_beside_an_old_head(name: str, tmp_path: Folder) -> None:
    """That head is no part of the adapted model, though `target_modules` names its layer."""
    base, architecture = OLD_HEADS[name]
    task = next(task for word, task in TASKS.items() if word in architecture)
    options = {"task_type": task, "target_modules": ["dense", "query"]}
    adapt(tmp_path, make(base, num_labels=2), architecture, options)
    with pytest.warns(UserWarning, match="which the adapter lacks; they stay as they are"):
        peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours")
    cls = getattr(transformers, architecture)
    adapted = hf_peft.PeftModel.from_pretrained(
        cls.from_pretrained(tmp_path / "base"), tmp_path / "a"
    ).eval()
    ours = cls.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        x = inputs(ours)
        torch.testing.assert_close(ours(**x)[0], adapted(**x)[0], rtol=1e-5, atol=1e-5)


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
    """`untie` stores both; without it, the refusal names it, and nothing is written."""
    base, architecture, config = TIED_MODELS[name]
    model = make(base, **config)
    run = adapt(tmp_path, model, architecture, SIDES[side])
    if base != architecture:  # as on the Hub: without prefix, and with the class that has the head
        file = tmp_path / "base" / "config.json"
        fields = json.loads(file.read_text()) | {"architectures": [architecture]}
        file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="Give `untie=True`"):
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


MODERN = {"global_attn_every_n_layers": 1, "pad_token_id": 0}
SPEECH = {"num_mel_bins": 16, "input_feat_per_channel": 16, "max_source_positions": 40}
PROPHET = {  # which takes no other names for its sizes
    **{
        k: SIZES[k]
        for k in SIZES
        if k.startswith(("vocab", "hidden_size", "encoder_f", "decoder_f"))
    },
    **{f"num_{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"num_{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    "max_position_embeddings": 40,
    "ngram": 2,
    "num_buckets": 8,
    "pad_token_id": 0,
}
OF_MOBILE = {"embedding_size": 32, "intra_bottleneck_size": 32}  # its head has no layer of its own
# Architecture, what it has beside the sizes, the embedding, and the head.
UNLIKE: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "bert": ("BertForMaskedLM", {}, "word_embeddings", "predictions.decoder"),
    "bert decoder": (
        "BertLMHeadModel", {"is_decoder": True}, "word_embeddings", "predictions.decoder"
    ),
    "roberta": ("RobertaForMaskedLM", {}, "word_embeddings", "lm_head.decoder"),
    "electra": ("ElectraForMaskedLM", {}, "word_embeddings", "generator_lm_head"),
    "bart": ("BartForConditionalGeneration", {}, "model.shared", "lm_head"),
    "whisper": ("WhisperForConditionalGeneration", SPEECH, "embed_tokens", "proj_out"),
    "mamba": ("MambaForCausalLM", {}, "embeddings", "lm_head"),
    "xlm": ("XLMWithLMHeadModel", {"emb_dim": 32}, "transformer.embeddings", "pred_layer.proj"),
}  # fmt: skip
DAILY = len(UNLIKE)
UNLIKE |= {
    "albert": ("AlbertForMaskedLM", {"embedding_size": 24}, "word_embeddings", "decoder"),
    "distilbert": ("DistilBertForMaskedLM", {}, "word_embeddings", "vocab_projector"),
    "modernbert": ("ModernBertForMaskedLM", MODERN, "tok_embeddings", "decoder"),
    "deberta": ("DebertaV2ForMaskedLM", {}, "word_embeddings", "predictions.decoder"),
    "mobilebert": ("MobileBertForMaskedLM", OF_MOBILE, "word_embeddings", "predictions.decoder"),
    "mpnet": ("MPNetForMaskedLM", {}, "word_embeddings", "lm_head.decoder"),
    "xlm-roberta": ("XLMRobertaForCausalLM", {}, "word_embeddings", "lm_head.decoder"),
    "mbart": ("MBartForConditionalGeneration", {}, "model.shared", "lm_head"),
    "marian": ("MarianMTModel", {"decoder_vocab_size": 71}, "model.shared", "lm_head"),
    "pegasus": ("PegasusForConditionalGeneration", {}, "model.shared", "lm_head"),
    "m2m100": ("M2M100ForConditionalGeneration", {}, "model.shared", "lm_head"),
    "prophetnet": (
        "ProphetNetForConditionalGeneration",
        PROPHET,
        "prophetnet.word_embeddings", "lm_head",
    ),
    "speech to text": (
        "Speech2TextForConditionalGeneration",
        SPEECH | {"conv_channels": 32}, "embed_tokens", "lm_head",
    ),
    "flaubert": ("FlaubertWithLMHeadModel", {"emb_dim": 32}, "transformer.embeddings", "proj"),
}  # fmt: skip
HOW: dict[str, dict[str, Any]] = {
    "head": {},
    "head by DoRA": {"use_dora": True},
    "head and biases": {"bias": "all"},
    "embedding": {},
}
UNLIKE_SIDES = [
    pytest.param(name, how, marks=pytest.mark.slow if i >= DAILY or how == "head by DoRA" else [])
    for i, name in enumerate(UNLIKE)
    for how in HOW
]


def inputs(model: Any) -> dict[str, Any]:
    """Tokens, or sounds, and the first tokens of an answer."""
    tokens = torch.tensor([[5, 9, 60, 7, 3]])
    config = model.config
    found = {"input_ids": tokens} if "mel" not in model.main_input_name else {}
    if model.main_input_name == "input_features":
        size = (1, config.num_mel_bins, 2 * config.max_source_positions)
        if config.model_type == "speech_to_text":
            size = (1, 20, config.input_feat_per_channel)
        found = {"input_features": torch.randn(size, generator=torch.Generator().manual_seed(0))}
    return found | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})


@pytest.mark.parametrize(("name", "how"), UNLIKE_SIDES)
def test_an_untied_head_of_another_kind(name: str, how: str, tmp_path: Folder) -> None:
    """It computes what PEFT's model computes before merging, and has what is tied with it.

    That is a bias of BERT and its kin, and the embeddings of an encoder and a decoder. Where the
    name of the head is not known, the remedy helps.
    """
    architecture, config, table, head = UNLIKE[name]
    model = make(architecture, **config)
    for x in model.parameters():
        x.data += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))
    modules = "|".join(re.escape(x) for x in [table if how == "embedding" else head])
    run = adapt(
        tmp_path, model, architecture, {"target_modules": rf"(.*\.)?({modules})"} | HOW[how]
    )
    two = "the adapter changes the embedding of an encoder and a decoder"
    if how == "embedding" and table in ("model.shared", "prophetnet.word_embeddings"):
        with pytest.raises(ValueError, match=f"`untie`: {two}"):
            peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours", untie=True)
        return
    if how == "embedding" and name in ("whisper", "speech to text"):
        with pytest.raises(ValueError, match=r"`untie`: the name of the head is not known\. Save"):
            peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours", untie=True)
        untie_base(type(model), tmp_path / "base").save_pretrained(tmp_path / "base")
        Run(tmp_path, untied(run)).compare()
        return
    atol = 1e-6 if "DoRA" in how else 0
    Run(tmp_path, untied(run)).compare(atol=atol, untie=True)
    if how == "embedding" or name == "mobilebert":  # whose A and B PEFT does not use
        return
    base = type(model).from_pretrained(tmp_path / "base")
    adapted = hf_peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    ours = type(model).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        x = inputs(ours)
        torch.testing.assert_close(ours(**x)[0], adapted(**x)[0], rtol=1e-5, atol=1e-5)


def test_what_is_not_untied(tmp_path: Folder) -> None:
    """T5 scales what a tied head computes."""
    architecture = "T5ForConditionalGeneration"
    adapt(tmp_path, make(architecture, **TIED), architecture, {"target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match="`untie`: T5 and its kin scale the outputs of a tied"):
        peft.export_merged(tmp_path / "base", tmp_path / "a", tmp_path / "ours", untie=True)
    assert not (tmp_path / "ours").exists()
