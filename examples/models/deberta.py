"""DeBERTa-v2 in Flax linen, of its published kind, reading and writing Hugging Face checkpoints.

    config, variables = deberta.load(folder)    # config.json and model.safetensors, or shards
    model = deberta.Deberta(config)
    hidden = model.apply(variables, ids, mask)  # (B, L, D)
    deberta.save(path, variables, config)       # the same tensors

    config, variables = deberta.new_head(key, config, variables, classes=3)
    logits = deberta.Deberta(config, classes=3).apply(variables, ids, mask)  # (B, 3)

The config's `head` is as in `bert`: "" for none, "cls", or "lm". Attention is disentangled (He et
al., arXiv 2006.03654): to the product of a query and a key are added that of the query and the
key of their distance, and that of the key and the query of their distance.

Letters in the shapes: B batch, L tokens, D hidden size, H heads, K size of a head, F inner size, S
distances in one direction.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora import peft

from . import bert, hf, parts
from .parts import Part, constrain, conv, dense, dropout, embed, layer_norm, stack

# ---- sizes --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of `config.json` that shape the computation, and what the tensors say.

    Attributes:
        cls_dropout: before the classifier; None is `hidden_dropout_prob`.
        head: see above.
        bare: whether the names in the checkpoint lack ``deberta.``.
        legacy: whether its "lm" head is called as BERT's.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    position_buckets: int  # S
    conv_kernel_size: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    cls_dropout: float | None = None
    head: str = ""
    bare: bool = False
    legacy: bool = False
    model_type: ClassVar[str] = "deberta-v2"
    position_biased_input: ClassVar[bool] = False

    @property
    def positions(self) -> int:
        """The most tokens of a sequence in training; the model takes more."""
        return self.max_position_embeddings


SIZES = {
    "deberta-v2-xxlarge": Config(
        128100, 1536, 48, 24, 6144, 512, 0, 1e-7, 256, conv_kernel_size=3, head="lm"
    ),
}

# ---- the model ----------------------------------------------------------------------------------


def buckets(length: int, span: int, farthest: int) -> np.ndarray:
    """Which of the 2·S distances lies between query i and key j: ``(L, L)`` of integers.

    Distances of up to S/2 are their own buckets; beyond that, and up to `farthest`, the buckets
    grow with the distance.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    middle = span // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32)
    # In float32, as PyTorch computes it: the ceiling shows the last bit.
    grown = np.log(far / np.float32(middle)) / np.log(np.float32((farthest - 1) / middle))
    grown = np.ceil(grown * np.float32(middle - 1)) + middle
    grown = (grown * np.sign(distance)).astype(distance.dtype)
    distance = np.where(np.abs(distance) <= middle, distance, grown)
    return np.clip(distance + span, 0, 2 * span - 1)


class Attention(Part):
    """Disentangled multi-head attention of every token to all tokens under the mask."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, relative: jax.Array) -> jax.Array:
        """``(B, L, D)``, ``(B, L)`` and the distances ``(1, 2·S, D)`` to ``(B, L, D)``."""
        c, options = self.config, self.options
        heads, size = c.num_attention_heads, c.hidden_size

        def project(name):
            layer = dense(size, ("embed", "heads"), **options, name=name)

            def to_heads(x):
                y = layer(x).reshape(*x.shape[:2], heads, size // heads)  # (B, L, H, K)
                # The distances are not of a batch.
                return constrain(y, "batch" if len(y) > 1 else None, "length", "heads", None)

            return to_heads

        to_query, to_key, to_value = project("query"), project("key"), project("value")
        query, key, value = to_query(x), to_key(x), to_value(x)
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key)
        relative = dropout(self, c.hidden_dropout_prob, relative)
        index = buckets(x.shape[1], c.position_buckets, c.max_position_embeddings)[None, None]
        y = jnp.einsum("bqhk,dhk->bhqd", query, to_key(relative)[0])  # (B, H, L, 2·S)
        scores += jnp.take_along_axis(y, index, axis=-1)
        y = jnp.einsum("bshk,dhk->bhsd", key, to_query(relative)[0])  # (B, H, L, 2·S)
        scores += jnp.take_along_axis(y, index.mT, axis=-1).mT
        scores /= (size // heads * 3) ** 0.5  # a sum of three products
        seen = (mask[:, None, :, None] * mask[:, None, None, :]) > 0  # (B, 1, L, L)
        weights = nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
        weights = dropout(self, c.attention_probs_dropout_prob, weights)
        y = jnp.einsum("bhqs,bshk->bqhk", weights, value)  # (B, L, H, K)
        y = constrain(y, "batch", "length", "heads", None).reshape(x.shape)
        return dense(size, ("heads", "embed"), **options, name="out")(y)


class Layer(bert.Layer):
    """A layer of BERT with this attention, and what the first one gets added."""

    attention_class: ClassVar[Any] = Attention

    @nn.compact
    def __call__(self, carry: Any, mask: jax.Array, relative: jax.Array, first: Any) -> Any:
        """The layer's number and ``(B, L, D)`` to the next; see `Encoder` for `first`."""
        number, before = carry
        x, _ = super().__call__(before, mask, relative)
        if first is not None:
            added, scale, bias = first
            norm = nn.LayerNorm(
                self.config.layer_norm_eps, use_bias=False, use_scale=False, **self.options
            )
            y = (norm(x + added) * scale + bias) * mask[..., None].astype(x.dtype)
            x = constrain(jnp.where(number == 0, y, x), "batch", "residual", None)
        return (number + 1, x), None


class Convolution(Part):
    """What the first layer's output gets added, and how the sum is normalized."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``, a scale and a bias, both ``(1, 1, D)``."""
        c, options = self.config, self.options
        size, width, padding = c.hidden_size, c.conv_kernel_size, (c.conv_kernel_size - 1) // 2
        options |= {"padding": [(padding, padding)]}
        y = conv(size, width, ("embed", None), **options, name="conv")(x)
        y = dropout(self, c.hidden_dropout_prob, y * mask[..., None].astype(y.dtype))
        y = nn.gelu(y, approximate=False)
        ones, zeros = (
            nn.with_logical_partitioning(init, ("norm",))
            for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale = self.param("norm_scale", ones, (size,), self.param_dtype)
        bias = self.param("norm_bias", zeros, (size,), self.param_dtype)
        return y, scale.astype(y.dtype)[None, None], bias.astype(y.dtype)[None, None]


class Encoder(nn.Module):
    """The stack of layers, with the table of distances that all of them share."""

    config: Config
    how: Mapping[str, Any]  # for `stack`
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``."""
        c, options = self.config, self.options
        first, count = None, 2 * c.position_buckets
        table = embed(count, c.hidden_size, "position", **options, name="relative")
        norm = layer_norm(c.layer_norm_eps, **options, name="relative_norm")
        relative = norm(table(jnp.arange(count)[None]))  # (1, 2·S, D)
        if c.conv_kernel_size > 0:
            first = Convolution(c, **options, name="conv")(x, mask)
        carry = jnp.zeros((), jnp.int32), x
        shared = mask, relative, first
        layers = c.num_hidden_layers
        carry, _ = stack(Layer, layers, "layer", carry, *shared, **self.how, config=c, **options)
        return carry[1]


class Deberta(bert.Bert):
    """DeBERTa-v2; for its fields see `bert.Bert`."""

    encoder_class: ClassVar[Any] = Encoder

    def embedded(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The embeddings, zero where there is no token: ``(B, L, D)`` and ``(B, L)``."""
        return x * mask[..., None].astype(x.dtype)

    def pooled(self, x: jax.Array) -> jax.Array:
        """The classifier's input from the first token: ``(B, D)``."""
        c, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = dense(c.hidden_size, ("embed", None), **options, name="pooler")(x)
        rate = c.hidden_dropout_prob if c.cls_dropout is None else c.cls_dropout
        return dropout(self, rate, nn.gelu(y, approximate=False))


new_head = bert.new_head

# ---- checkpoints --------------------------------------------------------------------------------

# Our module to Hugging Face's in the encoder; {} is the number of the layer.
_TABLES = {**bert.TABLES, "encoder/relative": "encoder.rel_embeddings"}
_PROJECTIONS = r"encoder/layer/attention/(\w*query|\w*key|value)"
_DENSE = {_PROJECTIONS: r"encoder.layer.{}.attention.self.\1_proj", **bert.OUTER}
_NORMS = {**bert.NORMS, "encoder/relative_norm": "encoder.LayerNorm"}
# And in the heads.
_HEADS = {
    "": {},
    "cls": {"pooler": "pooler.dense", "classifier": "classifier"},
    "lm": {
        "lm": "lm_predictions.lm_head",
        "lm/dense": "lm_predictions.lm_head.dense",
        "lm/norm": "lm_predictions.lm_head.LayerNorm",
    },
    "legacy": bert.PREDICTIONS,
}


def names(config: Config) -> tuple[peft.Name, ...]:
    """What our leaves are called in the checkpoint, and how their axes lie there."""
    prefix = "" if config.bare else "deberta."
    heads = _HEADS["legacy" if config.legacy and config.head == "lm" else config.head]
    tied = "cls.predictions.decoder" if config.legacy else None
    conv = f"{prefix}encoder.conv"
    return (
        *bert.rows_of(_TABLES, _DENSE, _NORMS, heads, prefix, tied),
        peft.Name("encoder/conv/conv/kernel", f"{conv}.conv", "kio"),
        peft.Name("encoder/conv/conv/bias", f"{conv}.conv", "o", "bias"),
        peft.Name("encoder/conv/norm_scale", f"{conv}.LayerNorm", "o"),
        peft.Name("encoder/conv/norm_bias", f"{conv}.LayerNorm", "o", "bias"),
    )


# In Microsoft's own files: another head, and positions that the model does not add.
_UNUSED = rf"{hf.UNUSED}|mask_predictions\..*|(deberta\.)?embeddings\.position_embeddings\.weight"

_OURS = ("head", "bare", "legacy")
FIELDS = {f.name: f.name for f in dataclasses.fields(Config) if f.name not in _OURS}
KNOWN = {
    "model_type": "deberta-v2",
    "hidden_act": "gelu",
    "pooler_hidden_act": "gelu",
    "relative_attention": True,
    "pos_att_type": ("p2c|c2p", "c2p|p2c", ["p2c", "c2p"], ["c2p", "p2c"]),
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "conv_groups": 1,
    "conv_act": "gelu",
}


def load(folder: str | Path, scan: bool = False) -> tuple[Config, dict[str, Any]]:
    """Config and variables, in the file's dtype, from a folder of Hugging Face's.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards.
        scan: of the model that the variables are for.
    """
    config = hf.read_config(folder, Config, FIELDS, KNOWN)
    tensors = hf.read_tensors(folder)
    is_legacy = any(name.startswith("cls.predictions.") for name in tensors)
    is_lm = is_legacy or any(name.startswith("lm_predictions.") for name in tensors)
    config = dataclasses.replace(
        config,
        head="lm" if is_lm else "cls" if "classifier.bias" in tensors else "",
        bare=not any(name.startswith("deberta.") for name in tensors),
        legacy=is_legacy,
    )
    like = shapes(config, len(tensors.get("classifier.bias", ())), scan)
    table = f"{names(config)[0].module}.weight"
    copies = {
        "cls.predictions.decoder.weight": table,
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    return config, hf.to_variables(tensors, like, names(config), unused=_UNUSED, copies=copies)


def save(path: str | Path, variables: Mapping[str, Any], config: Config) -> None:
    """Writes `variables` to a safetensors file under Hugging Face's names."""
    hf.write_tensors(path, hf.to_tensors(variables, names(config)))


def shapes(config: Config, classes: int = 0, scan: bool = False) -> Any:
    """The variables of the model as `jax.ShapeDtypeStruct`s."""
    return parts.shapes(Deberta(config, classes, scan))
