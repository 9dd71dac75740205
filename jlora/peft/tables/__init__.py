"""Name tables, a module for each library, and all by the names that the command line takes."""

from . import transformers as transformers

TABLES = {
    "bert": transformers.BERT,
    "roberta": transformers.ROBERTA,
    "gpt2": transformers.GPT2,
    "llama": transformers.LLAMA,
    "llama-scanned": transformers.LLAMA_SCANNED,
    "vit": transformers.VIT,
}
