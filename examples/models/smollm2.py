"""SmolLM2 from a GGUF file, with its tokenizer; and as a folder of Hugging Face.

config, variables, tokenizer = smollm2.load("SmolLM2-135M-Instruct.Q4_1.gguf")
logits_fn = jax.tree_util.Partial(llama.Llama(config).apply, variables)
question = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
[answer] = beam.greedy(logits_fn, [prompt], config.cache, tokenizer.eos_token_id)
tokenizer.decode(answer)
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import data
import gguf
import jax
import jax.numpy as jnp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import jlora
from jlora import peft
from jlora.extend import Scheme

from . import beam, hf, llama, parts

# Sizes that `config.json` says; the rest is as `transformers` has it where nothing is said.
WRITTEN = ("vocab", "layers", "dim", "hidden", "heads", "kv_heads", "rope_base", "norm_eps")

# As PEFT's all-linear: without the output head, which vLLM does not adapt in all models.
PATTERN = "layers/.*/kernel"

# --------------------------------------------------------------------------- GGUF

_DENSE = {
    "layers/attention/query": "blk.{}.attn_q",
    "layers/attention/key": "blk.{}.attn_k",
    "layers/attention/value": "blk.{}.attn_v",
    "layers/attention/out": "blk.{}.attn_output",
    r"layers/mlp/(gate|up|down)": r"blk.{}.ffn_\1",
}
_NORMS = {
    "layers/attention_norm": "blk.{}.attn_norm",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "norm": "output_norm",
}
NAMES = (
    peft.Name("embed/embedding", "token_embd", "vo"),
    *hf.rows(_DENSE, {"kernel": ("io", "weight")}, "layers"),
    *hf.rows(_NORMS, {"scale": ("o", "weight")}, "layers"),
)


def load(
    path: str | pathlib.Path, packed: bool = False
) -> tuple[llama.Config, dict[str, Any], PreTrainedTokenizerFast]:
    """Reads a Llama with tied embeddings and its tokenizer.

    Args:
        path: the file.
        packed: whether its quantized weights stay as they are; else all are float32.

    Returns:
        The sizes, the variables that `llama.Llama(config).apply` takes, and the tokenizer.

    Raises:
        ValueError: for another architecture or tokenizer, and for tensors that are missing,
            unexpected or of another shape than the sizes ask for; it lists all of them.
    """
    reader = gguf.GGUFReader(path)
    config = _config(reader)
    variables = peft.load_base(path, llama.shapes(config), NAMES)
    attention = variables["params"]["layers"]["attention"]
    for name, heads in (("query", config.heads), ("key", config.kv_heads)):
        kernel = attention[name]["kernel"]
        halves = functools.partial(_unpermute, heads=heads)
        attention[name]["kernel"] = jax.tree.map(halves, kernel)
    variables = variables if packed else jlora.dequantize(variables, jnp.float32)
    return config, variables, _tokenizer(reader)


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes SmolLM2-135M-Instruct as a folder of Hugging Face, in bfloat16, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    config, variables, tokenizer = load(data.smollm2())
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    llama.save(folder / hf.ONE, variables, config)
    sizes = {llama.FIELDS[name]: getattr(config, name) for name in WRITTEN}
    sizes |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    more = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    # Written last: it says that the folder is whole.
    LlamaConfig(**sizes, **more, tie_word_embeddings=True, dtype="bfloat16").save_pretrained(folder)
    return folder


def causal(
    folder: pathlib.Path,
    mesh: jax.sharding.Mesh,
    dtype: str,
    remat: bool,
    scheme: Scheme | None,
) -> parts.Causal:
    """The model of a folder, with its weights on the mesh, quantized by a scheme, for `chat.py`."""
    config = llama.read(folder)
    model = llama.Llama(config, dtype=jnp.dtype(dtype), remat=remat)
    places = parts.shardings(
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)), mesh
    )
    place = lambda x, place: x.update(sharding=place, dtype=dtype)  # noqa: E731
    names = llama.names(config)
    like = jax.tree.map(place, llama.shapes(config), places)
    if scheme:
        lora = jlora.transform(model.apply, jlora.LoRA(PATTERN))
        sites = lora.sites(like, jnp.zeros((1, 1), jnp.int32))
        like = jlora.quantize(like, scheme, sites=sites)
    variables = peft.load_base(folder, like, names)

    def answer(
        call: jax.tree_util.Partial, prompts: Sequence[Sequence[int]], stop: Sequence[int]
    ) -> list[list[int]]:
        return beam.greedy(call, prompts, config.cache, *stop)

    return parts.Causal(model.apply, variables, places, names, PATTERN, True, answer)


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    if name not in reader.fields:
        raise ValueError(f"the GGUF file has no field `{name}`")
    return reader.fields[name].contents()


def _expect(reader: gguf.GGUFReader, name: str, wanted: Any) -> None:
    if (got := _field(reader, name)) != wanted:
        raise ValueError(f"GGUF field `{name}`: expected {wanted!r}, got {got!r}")


def _config(reader: gguf.GGUFReader) -> llama.Config:
    _expect(reader, "general.architecture", "llama")
    config = llama.Config(
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


def _tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
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
    kinds = ("bos", "eos", "padding")
    bos, eos, pad = (tokens[_field(reader, f"tokenizer.ggml.{kind}_token_id")] for kind in kinds)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
