"""Name tables, a module for each library, and all by the names that the command line takes."""

from . import easydel as easydel
from . import gemma as gemma
from . import keras_hub as keras_hub
from . import maxtext as maxtext
from . import transformers as transformers
from . import tunix as tunix

TABLES = {
    "bert": transformers.BERT,
    "roberta": transformers.ROBERTA,
    "gpt2": transformers.GPT2,
    "llama": transformers.LLAMA,
    "llama-scanned": transformers.LLAMA_SCANNED,
    "vit": transformers.VIT,
    "tunix-llama3": tunix.LLAMA3,
    "tunix-qwen2": tunix.QWEN2,
    "tunix-qwen3": tunix.QWEN3,
    "tunix-qwen3-experts": tunix.QWEN3_EXPERTS,
    "tunix-gemma": tunix.GEMMA,
    "gemma3": gemma.GEMMA3,
    "gemma2-2b": gemma.GEMMA2_2B,
    "keras-hub-llama3": keras_hub.LLAMA3,
    "keras-hub-qwen3": keras_hub.QWEN3,
    "keras-hub-gemma3": keras_hub.GEMMA3,
    "maxtext-llama": maxtext.LLAMA,
    "maxtext-qwen3": maxtext.QWEN3,
    "easydel": easydel.EASYDEL,
}
