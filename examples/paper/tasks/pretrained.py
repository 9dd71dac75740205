"""The models of the recipes, from Hugging Face's folders.

loaded = pretrained.load(folder, "roberta-base")
model, variables = pretrained.with_head(loaded, outputs=3, recipe=recipe, key=key)
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from models import bert, deberta, gpt
from tokenizers import Tokenizer

from . import encoding, table

# Of each model: its file and class, and its type in config.json.
FAMILIES = {
    "roberta-base": (bert, bert.Bert, "roberta"),
    "roberta-large": (bert, bert.Bert, "roberta"),
    "deberta-v2-xxlarge": (deberta, deberta.Deberta, "deberta-v2"),
    "gpt2-medium": (gpt, gpt.GPT, "gpt2"),
    "gpt2-large": (gpt, gpt.GPT, "gpt2"),
    "minilm": (bert, bert.Bert, "bert"),
}


class Loaded(NamedTuple):
    """What a folder holds, and how its model is computed.

    Attributes:
        name: of the model.
        config: its sizes.
        variables: its weights.
        tokenizer: that of the checkpoint.
        options: of the model's class.
    """

    name: str
    config: Any
    variables: dict[str, Any]
    tokenizer: Tokenizer
    options: Mapping[str, Any]

    @property
    def causal(self) -> bool:
        """Whether it is a language model that writes texts."""
        return FAMILIES[self.name][0] is gpt

    @property
    def pad(self) -> int:
        """The token that fills up."""
        return getattr(self.config, "pad_token_id", 0)

    @property
    def types(self) -> bool:
        """Whether it tells two texts by token types."""
        return getattr(self.config, "type_vocab_size", 0) > 1


def load(
    folder: str | Path,
    name: str,
    *,
    scan: bool = False,
    remat: bool = False,
    dtype: Any = jnp.float32,
) -> Loaded:
    """The checkpoint in a folder.

    Args:
        folder: with config.json, tokenizer.json, and model.safetensors or its shards.
        name: a key of `FAMILIES`; the checkpoint may be of another size.
        scan: whether the layers are one compiled block in a loop.
        remat: whether the backward pass computes each layer again.
        dtype: of weights, activations and products.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the checkpoint is of another type of model, or the tokenizer of another one.
    """
    module, _, expected = FAMILIES[name]
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`{path}` is missing. Put the checkpoint of {name} there: config.json, "
            "tokenizer.json, and model.safetensors or its shards."
        )
    if (got := json.loads(path.read_text()).get("model_type")) != expected:
        raise ValueError(f"`{path}`: expected model_type {expected!r}, of {name}, got {got!r}")
    tokenizer = encoding.load_tokenizer(folder)
    config, variables = module.load(folder, scan=scan)
    rows = config.vocab if module is gpt else config.vocab_size
    if (tokens := tokenizer.get_vocab_size()) > rows:
        raise ValueError(
            f"`{path.with_name('tokenizer.json')}`: expected at most {rows} tokens, as the model "
            f"has, got {tokens}. Put the tokenizer of this checkpoint there."
        )
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables["params"])
    options = {"scan": scan, "remat": remat, "dtype": dtype}
    return Loaded(name, config, {**variables, "params": params}, tokenizer, options)


def with_head(
    loaded: Loaded, outputs: int, recipe: table.Recipe, key: jax.Array
) -> tuple[nn.Module, dict[str, Any]]:
    """The model and its variables, with a new head of `outputs` where there are any.

    The head of MiniLM, a sentence encoder, reads the mean over the tokens; the others' read the
    first token. A model without a head has no dropout of its own, as in the paper's scripts: what
    the recipe has is on the low-rank path.
    """
    module, kind, _ = FAMILIES[loaded.name]
    config, variables = loaded.config, loaded.variables
    if not outputs:
        return kind(dataclasses.replace(config, dropout=0.0), **loaded.options), variables
    if loaded.name == "minilm":
        config = dataclasses.replace(config, head="")
        variables = bert.add_head(variables, outputs)
    else:
        config, variables = module.new_head(key, config, variables, outputs)
    if recipe.head_dropout is not None:
        config = dataclasses.replace(config, cls_dropout=recipe.head_dropout)
    return kind(config, classes=outputs, **loaded.options), variables
