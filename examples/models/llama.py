"""Llama in Flax linen; weights from Hugging Face's files and back, or from a GGUF file.

    config, variables = load(folder)  # config.json and model.safetensors, or shards
    logits = Llama(config).apply(variables, ids)  # (batch, length, vocab)
    save(path, variables, config)  # the same tensors

    config, variables, tokenizer = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    logits_fn = jax.tree_util.Partial(Llama(config).apply, variables)
    prompt = tokenizer.encode(chat("What is the capital of France?")).ids
    [answer] = generate(logits_fn, [prompt], stop=STOP)
    tokenizer.decode(answer)

Every kernel is (inputs, outputs), and those of the layers are stacked on axis 0, one leaf for all:
`layers/attention/query/kernel` of SmolLM2-135M is (30, 576, 576). With ``scan=False`` the layers
are modules `layers_0`, `layers_1`, …. For a mesh see `parts`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import gguf
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import jlora
from jlora import peft

from . import hf, parts
from .parts import constrain, dense, embed, rms_norm, stack

STOP = 2  # <|im_end|>, which ends a chat message and serves as padding
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# --------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Config:
    """What a checkpoint says about its model; the defaults are those of `config.json`."""

    vocab: int
    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True  # whether the head is the embedding
    bare: bool = False  # whether the checkpoint is `LlamaModel`'s, whose names lack `model.`

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.dim // self.heads


def rope_frequencies(head_dim: int, base: float) -> jax.Array:
    """The angle in radians by which each pair of a head turns per position, (head_dim / 2,)."""
    return base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)


SIZES = {
    "llama2-7b": Config(32000, 32, 4096, 11008, 32, 32, 1e4, 1e-5, tied=False),
    "llama2-70b": Config(32000, 80, 8192, 28672, 64, 8, 1e4, 1e-5, tied=False),
    "smollm2-135m": Config(49152, 30, 576, 1536, 9, 3, 1e5, 1e-5),
    "smollm2-360m": Config(49152, 32, 960, 2560, 15, 5, 1e5, 1e-5),
    "smollm2-1.7b": Config(49152, 24, 2048, 8192, 32, 32, 1.3e5, 1e-5),
}


def rope(x: jax.Array, base: float, positions: jax.Array | None = None) -> jax.Array:
    """Turns the pairs (x[i], x[i + head_dim / 2]) of every head by their position's angles."""
    positions = jnp.arange(x.shape[1])[None] if positions is None else positions
    frequencies = rope_frequencies(x.shape[-1], base)[None, None]
    angle = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    # (batch or 1, length, 1, head_dim / 2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which `heads / kv_heads` query heads share a key and a value."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, positions: jax.Array | None):
        """Attends from every position to itself and those before it; (batch, length, dim)."""
        c = self.config
        options = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def project(name: str, heads: int, axis: str) -> jax.Array:
            y = dense(heads * c.head_dim, ("embed", axis), **options, name=name)(x)
            y = y.reshape(*x.shape[:2], heads, c.head_dim)
            return constrain(y, "batch", "length", axis, None)

        query = project("query", c.heads, "heads")  # (batch, length, heads, head_dim)
        key = project("key", c.kv_heads, "kv_heads")  # (batch, length, kv_heads, head_dim)
        value = project("value", c.kv_heads, "kv_heads")  # (batch, length, kv_heads, head_dim)
        query, key = (rope(y, c.rope_base, positions) for y in (query, key))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)
        mixed = constrain(mixed, "batch", "length", "heads", None).reshape(*x.shape[:2], -1)
        return dense(c.dim, ("heads", "embed"), **options, name="out")(mixed)


class MLP(nn.Module):
    """The gated feed-forward layer, down(silu(gate(x)) * up(x))."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (batch, length, dim)
        """Applies the layer to every position."""
        c = self.config
        options = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = dense(c.hidden, ("embed", "mlp"), **options, name="gate")(x)
        up = dense(c.hidden, ("embed", "mlp"), **options, name="up")(x)  # (batch, length, hidden)
        y = constrain(nn.silu(gate) * up, "batch", "length", "mlp")
        return dense(c.dim, ("mlp", "embed"), **options, name="down")(y)


class Block(nn.Module):
    """One layer: attention and then the MLP, each on normalized inputs, are added to x."""

    config: Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, positions: jax.Array | None):
        """The next x, (batch, length, dim), and None, as a scan wants it."""
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = functools.partial(rms_norm, self.config.norm_eps, **options)
        x = constrain(x, "batch", "residual", None)
        y = constrain(norm(name="attention_norm")(x), "batch", "length", None)
        x = x + Attention(self.config, **options, name="attention")(y, mask, positions)
        x = constrain(x, "batch", "residual", None)
        y = constrain(norm(name="mlp_norm")(x), "batch", "length", None)
        x = x + MLP(self.config, **options, name="mlp")(y)
        return constrain(x, "batch", "residual", None), None


class Llama(nn.Module):
    """The language model: token ids (batch, length) to float32 logits (batch, length, vocab).

    Attributes:
        config: the sizes.
        dtype: what activations and products are computed in.
        remat: whether the backward pass recomputes each layer instead of storing its activations.
        policy: what is stored nevertheless, as `jlora.checkpoint_policy`.
        scan: whether the layers are one compiled block in a loop.
        param_dtype: of the parameters that `init` draws.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False
    policy: Callable[..., bool] | None = None
    scan: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: jax.Array, mask: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Embeds, applies the layers, and reads the logits off the embedding or the head.

        Args:
            ids: (batch, length).
            mask: (batch, length), nonzero where there is a token and not padding.
            positions: (batch, length) or (1, length); None is 0, 1, 2, ….
        """
        c, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        table = embed(c.vocab, c.dim, "vocab", **options, name="embed")
        mask = None if mask is None else mask[:, None, None].astype(bool)
        how = {"scan": self.scan, "remat": self.remat, "policy": self.policy}
        x = stack(
            Block, c.layers, "layers", table(ids), mask, positions, **how, config=c, **options
        )
        x = rms_norm(c.norm_eps, **options, name="norm")(x)
        x = constrain(x, "batch", "length", None)
        if c.tied:
            logits = table.attend(x)
        else:
            head = dense(c.vocab, ("embed", "vocab"), use_bias=False, **options, name="head")
            logits = head(x)
        return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")


# --------------------------------------------------------------------------- Hugging Face

_KERNELS = {
    "layers/attention/query": "layers.{}.self_attn.q_proj",
    "layers/attention/key": "layers.{}.self_attn.k_proj",
    "layers/attention/value": "layers.{}.self_attn.v_proj",
    "layers/attention/out": "layers.{}.self_attn.o_proj",
    r"layers/mlp/(gate|up|down)": r"layers.{}.mlp.\1_proj",
}
_SCALES = {
    "layers/attention_norm": "layers.{}.input_layernorm",
    "layers/mlp_norm": "layers.{}.post_attention_layernorm",
    "norm": "norm",
}


def names(config: Config) -> tuple[peft.Name, ...]:
    """What our leaves are called in the checkpoint, and how their axes lie there."""
    prefix = "" if config.bare else "model."
    return (
        peft.Name("embed/embedding", f"{prefix}embed_tokens", "vo", tied="lm_head"),
        peft.Name("head/kernel", "lm_head", "io"),
        *hf.rows(_KERNELS, {"kernel": ("io", "weight")}, "layers", prefix),
        *hf.rows(_SCALES, {"scale": ("o", "weight")}, "layers", prefix),
    )


# Of a model with its head: `--names models.llama:NAMES`.
NAMES = names(Config(vocab=49152, layers=30, dim=576, hidden=1536, heads=9, kv_heads=3))

FIELDS = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "hidden": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "rope_base": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
ABSENT = {"num_key_value_heads": "num_attention_heads"}
KNOWN = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_scaling": None,
    "rope_type": "default",
    "attention_bias": False,
    "mlp_bias": False,
}


def load(folder: str | pathlib.Path, scan: bool = True) -> tuple[Config, dict[str, Any]]:
    """Config and variables, in the file's dtype, from a folder of Hugging Face's.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards.
        scan: of the model that the variables are for.
    """
    config = hf.read_config(folder, Config, FIELDS, KNOWN, ABSENT)
    tensors = hf.read_tensors(folder)
    bare = not any(name.startswith("model.") for name in tensors)
    config = dataclasses.replace(config, bare=bare, tied="lm_head.weight" not in tensors)
    return config, hf.to_variables(tensors, shapes(config, scan), names(config))


def save(path: str | pathlib.Path, variables: Mapping[str, Any], config: Config) -> None:
    """Writes `variables` to a safetensors file under Hugging Face's names."""
    hf.write_tensors(path, hf.to_tensors(variables, names(config)))


def shapes(config: Config, scan: bool = True) -> Any:
    """The variables of the model as `jax.ShapeDtypeStruct`s."""
    return parts.shapes(Llama(config, scan=scan))


# --------------------------------------------------------------------------- GGUF

_GGUF = {
    "layers/attention/query": "blk.{}.attn_q",
    "layers/attention/key": "blk.{}.attn_k",
    "layers/attention/value": "blk.{}.attn_v",
    "layers/attention/out": "blk.{}.attn_output",
    r"layers/mlp/(gate|up|down)": r"blk.{}.ffn_\1",
}
_GGUF_SCALES = {
    "layers/attention_norm": "blk.{}.attn_norm",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "norm": "output_norm",
}
GGUF_NAMES = (
    peft.Name("embed/embedding", "token_embd", "vo"),
    *hf.rows(_GGUF, {"kernel": ("io", "weight")}, "layers"),
    *hf.rows(_GGUF_SCALES, {"scale": ("o", "weight")}, "layers"),
)


def load_gguf(
    path: str | pathlib.Path, packed: bool = False
) -> tuple[Config, dict[str, Any], Tokenizer]:
    """Reads a Llama with tied embeddings and its tokenizer.

    Args:
        path: the file.
        packed: whether its quantized weights stay as they are; else all are float32.

    Returns:
        The sizes, the variables that `Llama(config).apply` takes, and the tokenizer.

    Raises:
        ValueError: for another architecture or tokenizer, and for tensors that are missing,
            unexpected or of another shape than the sizes ask for; it lists all of them.
    """
    reader = gguf.GGUFReader(path)
    config = _config(reader)
    variables = peft.load_base(path, GGUF_NAMES, like=shapes(config))
    attention = variables["params"]["layers"]["attention"]
    for name, heads in (("query", config.heads), ("key", config.kv_heads)):
        kernel = attention[name]["kernel"]
        turn = functools.partial(_unpermute, heads=heads)
        attention[name]["kernel"] = jax.tree.map(turn, kernel)
    variables = variables if packed else jlora.dequantize(variables, jnp.float32)
    return config, variables, _tokenizer(reader)


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    if name not in reader.fields:
        raise ValueError(f"the GGUF file has no field `{name}`")
    return reader.fields[name].contents()


def _expect(reader: gguf.GGUFReader, name: str, wanted: Any) -> None:
    if (got := _field(reader, name)) != wanted:
        raise ValueError(f"GGUF field `{name}`: expected {wanted!r}, got {got!r}")


def _config(reader: gguf.GGUFReader) -> Config:
    _expect(reader, "general.architecture", "llama")
    config = Config(
        vocab=len(_field(reader, "tokenizer.ggml.tokens")),
        layers=_field(reader, "llama.block_count"),
        dim=_field(reader, "llama.embedding_length"),
        hidden=_field(reader, "llama.feed_forward_length"),
        heads=_field(reader, "llama.attention.head_count"),
        kv_heads=_field(reader, "llama.attention.head_count_kv"),
        rope_base=_field(reader, "llama.rope.freq_base"),
        norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
    )
    _expect(reader, "llama.rope.dimension_count", config.head_dim)
    if scaling := [name for name in reader.fields if name.startswith("llama.rope.scaling")]:
        raise ValueError(f"rope scaling is not implemented, but the GGUF file has {scaling}")
    return config


def _unpermute(weight: jax.Array, heads: int) -> jax.Array:  # (..., heads * head_dim)
    # GGUF keeps the two outputs that `rope` turns together side by side, we half a head apart; so
    # do the codes and scales of a quantized kernel, of which each output has its own.
    pairs = weight.reshape(*weight.shape[:-1], heads, -1, 2)
    return pairs.swapaxes(-1, -2).reshape(weight.shape)


# --------------------------------------------------------------------------- text


def _tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    # Byte-level BPE in which every digit is a token of its own: what "smollm" stands for.
    _expect(reader, "tokenizer.ggml.model", "gpt2")
    _expect(reader, "tokenizer.ggml.pre", "smollm")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def chat(user: str, system: str = SYSTEM) -> str:
    """The text of a conversation up to where the assistant's answer begins."""
    turns = (("system", system), ("user", user))
    text = "".join(f"<|im_start|>{role}\n{message}<|im_end|>\n" for role, message in turns)
    return text + "<|im_start|>assistant\n"


def generate(
    logits_fn: Callable[[jax.Array], jax.Array],
    prompts: Sequence[Sequence[int]],
    *,
    stop: int,
    limit: int = 32,
) -> list[list[int]]:
    """Continues each prompt with the most likely token, again and again.

    Each step computes the whole prefix anew, which is simple and at this size fast enough.

    Args:
        logits_fn: ids (batch, length) to logits (batch, length, vocab), as a
            `jax.tree_util.Partial` of an apply function and its parameters: these are then
            arguments of the compiled program, and new values need no new compilation.
        prompts: token ids, not empty.
        stop: the token that ends an answer; also the padding.
        limit: the most tokens to add.

    Returns:
        What was added to each prompt, without the stop token.
    """
    starts = np.array([len(prompt) for prompt in prompts])
    buffer = np.full((len(prompts), starts.max() + limit), stop, np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    filled = np.asarray(_decode(logits_fn, buffer, starts, stop, limit))
    answers = [row[n : n + limit].tolist() for row, n in zip(filled, starts, strict=True)]
    return [a[: a.index(stop)] if stop in a else a for a in answers]


@functools.partial(jax.jit, static_argnames="limit")
def _decode(logits_fn, ids, ends, stop, limit):  # (batch, length), (batch,)
    rows = jnp.arange(ids.shape[0])

    def unfinished(state):
        step, _, _, done = state
        return (step < limit) & ~done.all()

    def extend(state):
        step, ids, ends, done = state
        # No mask for the padding: it lies behind each prefix, where causal attention cannot see.
        logits = logits_fn(ids)[rows, ends - 1]  # (batch, vocab)
        token = jnp.where(done, stop, logits.argmax(-1).astype(ids.dtype))
        return step + 1, ids.at[rows, ends].set(token), ends + 1, done | (token == stop)

    state = jnp.zeros((), jnp.int32), ids, ends, jnp.zeros(ids.shape[0], bool)
    return jax.lax.while_loop(unfinished, extend, state)[1]
