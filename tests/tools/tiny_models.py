"""Tiny models of the classes of `transformers`, with configurations that nobody wrote.

Sizes of the default configuration are made small, by their names. Needs `transformers` 5.
"""

import inspect
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

MOST = 16_000_000  # parameters
_SIZES = {
    64: "vocab_size max_position_embeddings n_positions max_source_positions n_ctx",
    48: "intermediate_size hidden_dim d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner",
    32: "hidden_size d_model dim n_embd embed_dim",
    24: "shared_expert_intermediate_size",
    20: "moe_intermediate_size",
    1: "num_key_value_heads",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
_OWN = ("id2label", "layer_types", "rope_parameters", "rope_scaling")  # follow from the others
_LAYERS = re.compile(r"layers?$|^depths?$|num_blocks|coder_depth|n_layer")
_TOKEN = re.compile(r"_id$|_ids$|_ind(ex|ices)$|_idx$|^(pad|bos|eos)_")
# What some models need, and leave open.
_FILLED = {
    "head_dim": 16,
    "hidden_size": 32,
    "vocab_size": 64,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "n_routed_experts": 3,
    "shared_expert_intermediate_size": 24,
    "pad_token_id": 0,
    "prediction_length": 4,
    "output_hidden_size": 32,
    "use_timm_backbone": False,
    "layer_types": ["full_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
}
_IN_SPACE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
# What models of one kind need, as sizes of theirs must fit together.
_NEEDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_head": 2},
    "gpt_bigcode": {"n_head": 2},
    "openai-gpt": {"n_head": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "dots1": {"n_routed_experts": 3, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": [*["sliding_attention", "mlp"] * 2, "full_attention", "mlp"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "intermediate_size": 48,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 5,
        "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": _IN_SPACE},
    "qwen2_vl_text": {"rope_parameters": _IN_SPACE},
    "qwen2_5_vl_text": {"rope_parameters": _IN_SPACE},
    "deepseek_v2": {"num_key_value_heads": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 24},
    "mistral_large4_text": {
        "num_hidden_layers": 4,
        "kv_source_layers": [0, 1, 2, 3],
        "layer_types": ["indexed_attention"] * 4,
        "indexer_types": ["full"] * 4,
        "no_rope_layers": [1, 1, 1, 0],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
}
# Small numbers that others are divided by, or compared with.
_KEPT = re.compile(
    r"label|channels$|kernel|stride|padding|dilation|group|temporal|merge|section|window|conv"
    r"|frames|ratio|factor|expansion|codebooks|rotary|levels|pool|sample|mel|image_size|type_vocab"
)


# For those of `timm`, which is not there.
BACKBONE = transformers.ResNetConfig(
    embedding_size=8,
    hidden_sizes=[8] * 4,
    depths=[1] * 4,
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)


def list_classes() -> Iterator[Any]:
    """Yields the models of `transformers` whose configurations have defaults."""
    for name in dir(transformers):
        if re.search(r"^[a-z_]|PreTrainedModel$|^Auto|Tokenizer|Processor|Config$|Extractor", name):
            continue
        cls = getattr(transformers, name, None)
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if is_model and cls.config_class is not None:
            yield cls


class Pair(NamedTuple):
    """A `model_type` and a class that is made from its configuration."""

    kind: str
    cls: Any

    @property
    def config_class(self) -> Any:
        """The class of its configuration."""
        name = configuration_auto.CONFIG_MAPPING_NAMES.get(self.kind)
        return getattr(transformers, name) if name else self.cls.config_class


def list_pairs() -> list[Pair]:
    """Lists the pairs that `transformers` maps, and each class with its own `model_type`."""
    classes = {cls.__name__: cls for cls in list_classes()}
    found = [Pair(getattr(cls.config_class, "model_type", ""), cls) for cls in classes.values()]
    names = (x for x in dir(modeling_auto) if re.fullmatch(r"MODEL\w*_MAPPING_NAMES", x))
    for mapping in map(vars(modeling_auto).get, names):
        for kind, own in mapping.items():
            each = [own] if isinstance(own, str) else own
            found += [Pair(kind, classes[name]) for name in each if name in classes]
    return list(dict.fromkeys(found))


def make_model(
    cls: Any, fields: Mapping[str, Any] = {}, is_untied: bool = True, config_class: Any = None
) -> Any:
    """Makes a tiny model of a class in float32; raises what its constructor does if none is.

    Its configuration, of its own class or another, has these fields beside small sizes; its head
    has a weight of its own, or is as the class has it.
    """
    config_class = config_class or cls.config_class
    problems = list[Exception]()
    for way in range(4):
        try:
            config = make_config(config_class, way, None, fields, is_untied)
            with torch.device("meta"):
                size = sum(x.numel() for x in cls(config).parameters())
            if not 0 < size < MOST:
                raise ValueError(f"{size} parameters")
            config = make_config(config_class, way, None, fields, is_untied)
            return cls(config).float().eval()
        except Exception as e:
            problems.append(e)
    raise problems[0]


def list_options(cls: Any) -> list[dict[str, Any]]:
    """Lists fields of a configuration that turn a part on, such as `use_swiglu_ffn`."""
    fields = make_default(cls).to_dict()
    found = [{key: True} for key, x in fields.items() if x is False and key.startswith("use_")]
    rotary = {"position_embedding_type": "rotary"}
    return [*found, rotary] if rotary.keys() <= fields.keys() else found


def make_config(
    cls: Any,
    way: int = 0,
    default: Any = None,
    fields: Mapping[str, Any] = {},
    is_untied: bool = True,
) -> Any:
    """Makes a tiny configuration, in one of four ways of which none fits all models."""
    default = make_default(cls) if default is None else default
    known = {x for base in cls.__mro__ for x in inspect.signature(base.__init__).parameters}
    parts = {k: x for k, x in vars(default).items() if isinstance(x, transformers.PretrainedConfig)}
    usual = {k: x for k, x in default.to_dict().items() if k in known - parts.keys() - {*_OWN}}
    small = {key: _shrink(key, x, way) for key, x in usual.items()}
    small = {key: x for key, x in small.items() if x != usual[key]}
    small |= _NEEDS.get(default.model_type, {}) | dict(fields)
    if is_untied and getattr(default, "tie_word_embeddings", False):
        small["tie_word_embeddings"] = False  # so that the head is stored too
    for key, x in parts.items():
        if key in known:
            own = make_config(type(x), way, x, is_untied=is_untied)
            if isinstance(x, transformers.TimmBackboneConfig):
                own = BACKBONE
            small[key] = own.to_dict() | {"model_type": own.model_type} | small.get(key, {})
    if way == 3:
        filled = {key: x for key, x in _FILLED.items() if key in known}
        small |= {key: x for key, x in filled.items() if getattr(default, key, None) is None}
        layers = getattr(default, "num_hidden_layers", None)
        each = {key: getattr(default, key, None) for key in known}
        small |= {
            key: [x[0], x[-1]]
            for key, x in each.items()
            if isinstance(x, list) and len(x) == layers
        }
    return cls(**small)


def make_default(cls: Any) -> Any:
    """Makes a configuration of a class as it is by default."""
    if cls is transformers.VisionEncoderDecoderConfig:
        parts = transformers.ViTConfig(), transformers.BertConfig()
        return cls.from_encoder_decoder_configs(*parts)
    return cls()


def _shrink(name: str, x: Any, way: int) -> Any:
    if isinstance(x, list | tuple) and x and all(type(n) is int for n in x):
        return type(x)(_shrink_list(name, list(x), way))
    return _shrink_size(name, x, way) if type(x) is int else x


def _shrink_size(name: str, n: int, way: int) -> int:
    if name in SIZES and way != 1:
        return min(n, SIZES[name])
    if _TOKEN.search(name):
        return n if n < 40 else 3 + n % 20
    if _LAYERS.search(name) or "heads" in name or "per_tok" in name:
        return min(n, 2)
    if "expert" in name and n <= 512:
        return min(n, 3)
    if _KEPT.search(name) or way == 2:
        return n
    if n >= 2**14:
        return 64
    if n >= 256:
        return 48 if way and n >= 1500 else 32
    is_wide = n >= 100 and re.search(r"dim|size|channels", name)
    return 32 if is_wide else n


def _shrink_list(name: str, x: list[int], way: int) -> list[int]:
    if _TOKEN.search(name):
        return [n if n < 40 else 3 + n % 20 for n in x]
    if re.search(r"depth|layers|num_blocks", name):
        return [1] * len(x)
    if "heads" in name:
        return [min(n, 2) for n in x]
    if _KEPT.search(name) or way == 2 or max(x) < 32:
        return x
    sizes = sorted(set(x))
    return [min(n, 16 * (1 + sizes.index(n))) for n in x]


def list_parts(config: Any) -> Mapping[str, Any]:
    """Lists the configurations in one, by their fields."""
    every = vars(config).items()
    return {key: x for key, x in every if isinstance(x, transformers.PretrainedConfig)}


# ------------------------------------------------------------------------------------------- inputs


def find_inputs(model: Any) -> dict[str, Any] | None:
    """Finds inputs for which a model computes something; None if it takes none of ours."""
    for inputs in _list_inputs(model):
        try:
            if run(model, inputs):
                return inputs
        except Exception:  # each model has errors of its own
            continue
    return None


def _list_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Yields what a model may take, by the names of its arguments: tokens, images, sounds."""
    names = inspect.signature(model.forward).parameters
    parts = [model.config, *list_parts(model.config).values()]

    def find(default: int, *fields: str) -> int:
        found = (getattr(x, key, None) for key in fields for x in parts)
        return next((x for x in found if type(x) is int), default)

    def draw(*shape: int) -> Any:
        return torch.linspace(-1, 1, math.prod(shape)).view(shape)

    ids = torch.arange(3, 11)[None]
    tokens = {"input_ids": ids, "decoder_input_ids": ids}
    channels, bins = find(3, "num_channels", "in_channels"), find(80, "num_mel_bins")
    others = [{}, {"input_values": draw(1, 8000)}, {"input_values": draw(1, 1024, 128)}]
    for n in (find(224, "image_size"), 32, 224):
        image = channels, n, n
        others += [{"pixel_values": draw(1, *frames, *image)} for frames in ((), (16,), (32,))]
    for n in (2 * find(32, "max_source_positions"), 64):
        others += [{"input_features": draw(1, *shape)} for shape in ((bins, n), (n, bins))]
    for own, beside in itertools.product(others, (tokens, {})):
        if inputs := {key: x for key, x in (own | beside).items() if key in names}:
            yield inputs | ({"use_cache": False} if "use_cache" in names else {})


def run(model: Any, inputs: Mapping[str, Any]) -> list[Any]:
    """Lists all arrays of floats that a model computes."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [x for x in _flatten(model(**inputs)) if x.is_floating_point()]


def _flatten(x: Any) -> Iterator[Any]:
    if isinstance(x, torch.Tensor):
        yield x
    each = x.values() if isinstance(x, Mapping) else x if isinstance(x, list | tuple) else ()
    for one in each:
        yield from _flatten(one)
