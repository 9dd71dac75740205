"""A random Llama as a folder of Hugging Face, to try a program where no checkpoint is."""

import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from . import hf, llama, smollm2

CONFIG = llama.Config(400, 2, 64, 128, 4, 2)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the model and its tokenizer; returns `folder`."""
    folder.mkdir(parents=True)
    variables = llama.Llama(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    llama.save(folder / hf.ONE, nn.unbox(variables), CONFIG)
    sizes = {llama.FIELDS[name]: getattr(CONFIG, name) for name in smollm2.WRITTEN}
    kind = ["LlamaForCausalLM"]
    LlamaConfig(**sizes, architectures=kind, tie_word_embeddings=True).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes a tokenizer of at most 400 tokens, with a chat template."""
    PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "he user"
        ),
        chat_template=CHATML,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def train_tokenizer(special: Sequence[str], text: str) -> Tokenizer:
    """Pairs of bytes, as those of RoBERTa, GPT-2 and SmolLM2; at most 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer
