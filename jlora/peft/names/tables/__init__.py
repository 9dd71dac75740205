"""Name tables: a module for each library, and `TABLES` with all by name."""

from . import gemma as gemma
from . import keras_hub as keras_hub
from . import maxtext as maxtext
from . import transformers as transformers
from . import tunix as tunix

_LAYER = "layers/0/attn/q_proj/w"
_GEMMA = "layer_0/attn/q_einsum/w"
_KERAS = "transformer_layer_0/self_attention/query/kernel"
_MAXTEXT = "decoder/layers/self_attention/query/kernel"
# Each table with an example of its paths, for errors.
WITH_PATHS = {
    "bert": (transformers.BERT, "bert/encoder/layer/0/attention/self/query/kernel"),
    "roberta": (transformers.ROBERTA, "roberta/encoder/layer/0/attention/self/query/kernel"),
    "gpt2": (transformers.GPT2, "transformer/h/0/attn/c_attn/kernel"),
    "llama": (transformers.LLAMA, "model/layers/0/self_attn/q_proj/kernel"),
    "llama-scanned": (transformers.LLAMA_SCANNED, "model/layers/self_attn/q_proj/kernel"),
    "vit": (transformers.VIT, "vit/encoder/layer/0/attention/attention/query/kernel"),
    "gpt-oss": (transformers.GPT_OSS, "model/layers/0/mlp/experts/gate_up_proj"),
    "llama4": (transformers.LLAMA4, "model/layers/0/feed_forward/experts/gate_up_proj"),
    "tunix-llama3": (tunix.LLAMA3, _LAYER),
    "tunix-qwen2": (tunix.QWEN2, _LAYER),
    "tunix-qwen3": (tunix.QWEN3, _LAYER),
    "tunix-qwen3-experts": (tunix.QWEN3_EXPERTS, _LAYER),
    "tunix-gemma": (tunix.GEMMA, "layers/0/attn/q_einsum/w"),
    "tunix-gemma4": (tunix.GEMMA4, "layers/0/attn/q_einsum/w"),
    "gemma3": (gemma.GEMMA3, _GEMMA),
    "gemma4": (gemma.GEMMA4, _GEMMA),
    "gemma4-experts": (gemma.GEMMA4_EXPERTS, _GEMMA),
    "gemma2-2b": (gemma.GEMMA2_2B, _GEMMA),
    "keras-hub-llama3": (keras_hub.LLAMA3, _KERAS),
    "keras-hub-qwen3": (keras_hub.QWEN3, _KERAS),
    "keras-hub-gemma3": (keras_hub.GEMMA3, "decoder_block_0/attention/query/kernel"),
    "maxtext-llama": (maxtext.LLAMA, _MAXTEXT),
    "maxtext-qwen3": (maxtext.QWEN3, _MAXTEXT),
    "maxtext-deepseek-v3": (
        maxtext.DEEPSEEK_V3,
        "decoder/moe_layers/DeepSeekMoeBlock_0/shared_experts/wi_0/kernel",
    ),
    "maxtext-gemma4": (maxtext.GEMMA4, "decoder/scanned_blocks/global_layer/mlp/wi_0/kernel"),
    "maxtext-gpt-oss": (maxtext.GPT_OSS, "decoder/layers/layers_0/GptOssAttention/query/kernel"),
    "maxtext-llama4": (maxtext.LLAMA4, "decoder/layers/layers_0/mlp/wi_0/kernel"),
}
TABLES = {name: table for name, (table, _) in WITH_PATHS.items()}
