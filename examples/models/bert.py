"""BERT and RoBERTa in Flax linen, reading and writing Hugging Face checkpoints.

    config, variables = bert.load(folder)       # config.json and model.safetensors, or shards
    model = bert.Bert(config)
    hidden = model.apply(variables, ids, mask)  # (B, L, D)
    bert.save(path, variables, config)          # the same tensors

Which head a model has is the config's `head`, as `load` found it:

    ""      none; or, with `classes`, a dense layer on the normalized mean over the tokens
    "cls"   that of `…ForSequenceClassification`, `classes` logits from the first token
    "lm"    that of `…ForMaskedLM`, logits over the vocabulary at every token

    config, variables = bert.new_head(key, config, variables, classes=3)  # whatever it was, "cls"
    logits = bert.Bert(config, classes=3).apply(variables, ids, mask)     # (B, 3)

Letters in the shapes: B batch, L tokens, D hidden size, H heads, K size of a head, F inner size, V
vocabulary.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora import peft

from . import hf, parts
from .parts import Part, check_length, constrain, dense, dropout, embed, layer_norm, stack

# ---- sizes --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of `config.json` that shape the computation, and what the tensors say.

    Attributes:
        head: see above.
        bare: whether the names in the checkpoint lack ``bert.`` or ``roberta.``.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    model_type: str = "bert"
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    head: str = ""
    bare: bool = False
    position_biased_input: ClassVar[bool] = True

    @property
    def positions(self) -> int:
        """The most tokens of a sequence: RoBERTa counts them from its padding's number on."""
        used = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - used


_ROBERTA = {"model_type": "roberta", "pad_token_id": 1, "head": "lm"}
SIZES = {
    "roberta-base": Config(50265, 768, 12, 12, 3072, 514, 1, 1e-5, **_ROBERTA),
    "roberta-large": Config(50265, 1024, 24, 16, 4096, 514, 1, 1e-5, **_ROBERTA),
}

# ---- the model ----------------------------------------------------------------------------------


class Embeddings(Part):
    """The sum of word, position and token type embeddings, normalized; some DeBERTas lack two."""

    def setup(self) -> None:
        """The tables and the norm."""
        c, options = self.config, self.options
        self.word = embed(c.vocab_size, c.hidden_size, "vocab", **options)
        if c.position_biased_input:
            self.position = embed(c.max_position_embeddings, c.hidden_size, "position", **options)
        if c.type_vocab_size:
            self.token_type = embed(c.type_vocab_size, c.hidden_size, "position", **options)
        self.norm = layer_norm(c.layer_norm_eps, **options)

    def __call__(self, ids: jax.Array, types: jax.Array) -> jax.Array:
        """``(B, L)`` token ids and types to ``(B, L, D)``."""
        c, x = self.config, self.word(ids)
        if c.position_biased_input:
            check_length(ids, c.positions)
            x += self.position(positions(ids, c))
        if c.type_vocab_size:
            x += self.token_type(types)
        return self.norm(x)

    def attend(self, x: jax.Array) -> jax.Array:
        """Products with the word embeddings: ``(B, L, D)`` to ``(B, L, V)``."""
        return self.word.attend(x)


def positions(ids: jax.Array, c: Any) -> jax.Array:
    """``(1, L)`` or ``(B, L)``: RoBERTa counts from its padding's id on, and skips padding."""
    if c.model_type != "roberta":
        return jnp.arange(ids.shape[1])[None]
    is_token = (ids != c.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + c.pad_token_id


class Attention(Part):
    """Multi-head attention of every token to all tokens under the mask."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``."""
        c, options = self.config, self.options
        heads, size = c.num_attention_heads, c.hidden_size

        def project(name):
            y = dense(size, ("embed", "heads"), **options, name=name)(x)  # (B, L, D)
            y = y.reshape(*y.shape[:2], heads, size // heads)  # (B, L, H, K)
            return constrain(y, "batch", "length", "heads", None)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / (size // heads) ** 0.5
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
        weights = dropout(self, c.attention_probs_dropout_prob, nn.softmax(scores))
        y = jnp.einsum("bhqs,bshk->bqhk", weights, value)  # (B, L, H, K)
        y = constrain(y, "batch", "length", "heads", None).reshape(x.shape)
        return dense(size, ("heads", "embed"), **options, name="out")(y)


class Layer(Part):
    """Attention and a two-layer perceptron, each with a residual and a norm after it."""

    attention_class: ClassVar[Any] = Attention

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *more: Any) -> tuple[jax.Array, None]:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``, and None, as a scan wants it.

        Attention gets `more`.
        """
        c, options = self.config, self.options
        x = constrain(x, "batch", "residual", None)
        y = self.attention_class(c, **options, name="attention")(x, mask, *more)
        y = dropout(self, c.hidden_dropout_prob, y)
        x = layer_norm(c.layer_norm_eps, **options, name="attention_norm")(x + y)
        x = constrain(x, "batch", "residual", None)
        y = dense(c.intermediate_size, ("embed", "mlp"), **options, name="up")(x)  # (B, L, F)
        y = constrain(nn.gelu(y, approximate=False), "batch", "length", "mlp")
        y = dense(c.hidden_size, ("mlp", "embed"), **options, name="down")(y)  # (B, L, D)
        y = dropout(self, c.hidden_dropout_prob, y)
        x = layer_norm(c.layer_norm_eps, **options, name="norm")(x + y)
        return constrain(x, "batch", "residual", None), None


class Encoder(nn.Module):
    """The stack of layers."""

    config: Config
    how: Mapping[str, Any]  # for `stack`
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``."""
        layers = self.config.num_hidden_layers
        return stack(
            Layer, layers, "layer", x, mask, **self.how, config=self.config, **self.options
        )[0]


class WordHead(Part):
    """Logits of every word at every position."""

    @nn.compact
    def __call__(self, x: jax.Array, attend: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """``(B, L, D)`` and the product with the word embeddings to ``(B, L, V)``."""
        c, options = self.config, self.options
        y = dense(c.hidden_size, ("embed", None), **options, name="dense")(x)
        y = layer_norm(c.layer_norm_eps, **options, name="norm")(nn.gelu(y, approximate=False))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        bias = self.param("bias", zeros, (c.vocab_size,), self.param_dtype)
        return constrain(attend(y) + bias.astype(y.dtype)[None, None], "batch", "length", "vocab")


class Bert(nn.Module):
    """BERT or RoBERTa.

    Attributes:
        config: the sizes and the head.
        classes: of the head.
        scan: whether the layers are one compiled block in a loop, ``encoder/layer`` with parameters
            stacked on axis 0, or modules ``encoder/layer_0``, ``encoder/layer_1``, ….
        remat: whether the backward pass computes each layer again instead of keeping activations.
        policy: what is kept nevertheless, as `jlora.remat_policy`.
        dtype: of activations and products.
        param_dtype: of the parameters that `init` draws.
    """

    config: Config
    classes: int = 0
    scan: bool = False
    remat: bool = False
    policy: Callable[..., bool] | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    encoder_class: ClassVar[Any] = Encoder

    @nn.compact
    def __call__(
        self, ids: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None
    ) -> jax.Array:
        """``(B, L)`` ids, mask and token types to hidden states ``(B, L, D)``, or to logits."""
        c, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        types = jnp.zeros_like(ids) if types is None else types
        mask = jnp.ones_like(ids) if mask is None else mask
        embeddings = Embeddings(c, **options, name="embeddings")
        x = dropout(self, c.hidden_dropout_prob, self.embedded(embeddings(ids, types), mask))
        how = {"scan": self.scan, "remat": self.remat, "policy": self.policy}
        x = self.encoder_class(c, how, options, name="encoder")(x, mask)
        if c.head == "lm":
            return WordHead(c, **options, name="lm")(x, embeddings.attend)
        if not self.classes:
            return x
        if c.head == "cls":
            x = self.pooled(x[:, 0])
        else:
            # MiniLM's means have a size of about 0.2; a head learns faster from inputs of size 1.
            x = nn.LayerNorm(use_bias=False, use_scale=False)(pool(x, mask))  # (B, D)
        return dense(self.classes, ("embed", None), **options, name="classifier")(x)

    def embedded(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The first layer's input from the embeddings: ``(B, L, D)`` and ``(B, L)``."""
        del mask
        return x

    def pooled(self, x: jax.Array) -> jax.Array:
        """The classifier's input from the first token: ``(B, D)``."""
        c, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = dropout(self, c.hidden_dropout_prob, x) if c.model_type == "roberta" else x
        x = nn.tanh(dense(c.hidden_size, ("embed", None), **options, name="pooler")(x))
        return dropout(self, c.hidden_dropout_prob, x)


def pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over the tokens under the mask: ``(B, L, D)`` and ``(B, L)`` to ``(B, D)``."""
    weight = mask.astype(hidden.dtype)[..., None]  # (B, L, 1)
    return (hidden * weight).sum(1) / weight.sum(1)


def add_head(variables: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """`variables` with a zero head on the mean, which gives every class the same logit."""
    size = variables["params"]["embeddings"]["norm"]["scale"].size
    head = {"kernel": jnp.zeros((size, classes)), "bias": jnp.zeros(classes)}
    return {**variables, "params": {**variables["params"], "classifier": head}}


def new_head(
    key: jax.Array, config: Config, variables: Mapping[str, Any], classes: int, std: float = 0.02
) -> tuple[Config, dict[str, Any]]:
    """Config and variables with a new "cls" head, drawn as `transformers` does."""
    size = config.hidden_size
    params = {name: variables["params"][name] for name in ("embeddings", "encoder")}
    shapes = {"pooler": (size, size), "classifier": (size, classes)}
    for draw, (name, shape) in zip(jax.random.split(key), shapes.items(), strict=True):
        params[name] = {"kernel": std * jax.random.normal(draw, shape), "bias": jnp.zeros(shape[1])}
    return dataclasses.replace(config, head="cls", bare=False), {"params": params}


# ---- checkpoints --------------------------------------------------------------------------------

# Our module to Hugging Face's in the encoder; {} is the number of the layer.
TABLES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
}
OUTER = {
    "encoder/layer/attention/out": "encoder.layer.{}.attention.output.dense",
    "encoder/layer/up": "encoder.layer.{}.intermediate.dense",
    "encoder/layer/down": "encoder.layer.{}.output.dense",
}
_DENSE = {
    r"encoder/layer/attention/(query|key|value)": r"encoder.layer.{}.attention.self.\1",
    **OUTER,
}
NORMS = {
    "embeddings/norm": "embeddings.LayerNorm",
    "encoder/layer/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "encoder/layer/norm": "encoder.layer.{}.output.LayerNorm",
}
# And in the heads.
PREDICTIONS = {
    "lm": "cls.predictions",
    "lm/dense": "cls.predictions.transform.dense",
    "lm/norm": "cls.predictions.transform.LayerNorm",
}
_HEADS = {
    ("bert", "cls"): {"pooler": "bert.pooler.dense", "classifier": "classifier"},
    ("roberta", "cls"): {"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
    ("bert", "lm"): PREDICTIONS,
    ("roberta", "lm"): {
        "lm": "lm_head",
        "lm/dense": "lm_head.dense",
        "lm/norm": "lm_head.layer_norm",
    },
}
# Of no use to any of our heads, or to those without a pooler.
_UNUSED = rf"{hf.UNUSED}|cls\.seq_relationship\..*"
_POOLER = r"|(.*\.)?pooler\.dense\..*"


def names(config: Config) -> tuple[peft.Name, ...]:
    """What our leaves are called in the checkpoint, and how their axes lie there."""
    prefix = "" if config.bare else f"{config.model_type}."
    heads = _HEADS.get((config.model_type, config.head), {"classifier": "classifier"})
    tied = {"bert": "cls.predictions.decoder", "roberta": "lm_head.decoder"}[config.model_type]
    return rows_of(TABLES, _DENSE, NORMS, heads, prefix, tied)


def rows_of(
    tables: Mapping[str, str],
    kernels: Mapping[str, str],
    norms: Mapping[str, str],
    heads: Mapping[str, str],
    prefix: str,
    tied: str | None,
) -> tuple[peft.Name, ...]:
    """The table of names by kinds of modules; `tied` is the name of the word head."""
    kernel, bias, scale = ("io", "weight"), ("o", "bias"), ("o", "weight")
    return (
        *(
            peft.Name(f"{ours}/embedding", prefix + theirs, "vo", tied=tied if i == 0 else None)
            for i, (ours, theirs) in enumerate(tables.items())
        ),
        *hf.rows(kernels, {"kernel": kernel, "bias": bias}, "layer", prefix),
        *hf.rows(norms, {"scale": scale, "bias": bias}, "layer", prefix),
        *hf.rows(heads, {"kernel": kernel, "scale": scale, "bias": bias}),
    )


# Of a bare encoder with a classifier, such as MiniLM's: `--names models.bert:NAMES`.
NAMES = names(Config(30522, 384, 6, 12, 1536, 512, 2, 1e-12, bare=True))

FIELDS = {f.name: f.name for f in dataclasses.fields(Config) if f.name not in ("head", "bare")}
KNOWN = {
    "model_type": ("bert", "roberta"),
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
}


def load(folder: str | Path, scan: bool = False) -> tuple[Config, dict[str, Any]]:
    """Config and variables, in the file's dtype, from a folder of Hugging Face's.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards.
        scan: of the model that the variables are for.
    """
    return from_hf(hf.read_tensors(folder), hf.read_config(folder, Config, FIELDS, KNOWN), scan)


def save(path: str | Path, variables: Mapping[str, Any], config: Config) -> None:
    """Writes `variables` to a safetensors file under Hugging Face's names."""
    hf.write_tensors(path, hf.to_tensors(variables, names(config)))


def from_hf(
    tensors: Mapping[str, Any], config: Config, scan: bool = False
) -> tuple[Config, dict[str, Any]]:
    """The config with the head that the tensors have, and the variables of `Bert`.

    A collection ``"unused"`` keeps the tensors that the model does not compute with. Norms may be
    called gamma and beta, as in the oldest files; `save` writes weight and bias.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; the message lists them all.
    """
    now = {"gamma": "weight", "beta": "bias"}
    tensors = {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda found: now[found[0]], name): x
        for name, x in tensors.items()
    }
    bare = not any(name.startswith(f"{config.model_type}.") for name in tensors)
    is_lm = any(name.startswith(("cls.predictions.", "lm_head.")) for name in tensors)
    last = "classifier.out_proj.bias" if config.model_type == "roberta" else "classifier.bias"
    head = "lm" if is_lm else "cls" if last in tensors and not bare else ""
    config = dataclasses.replace(config, head=head, bare=bare)
    classes = len(tensors.get("classifier.bias" if bare else last, ()))
    has_pooler = head == "cls" and config.model_type == "bert"
    table, decoder = names(config)[0].module, names(config)[0].tied
    variables = hf.to_variables(
        tensors,
        shapes(config, classes, scan),
        names(config),
        unused=_UNUSED if has_pooler else _UNUSED + _POOLER,
        copies={
            f"{decoder}.weight": f"{table}.weight",
            f"{decoder}.bias": f"{decoder.removesuffix('.decoder')}.bias",
        },
    )
    return config, variables


def shapes(config: Config, classes: int = 0, scan: bool = False) -> Any:
    """The variables of the model as `jax.ShapeDtypeStruct`s."""
    return parts.shapes(Bert(config, classes, scan))
