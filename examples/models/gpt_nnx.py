"""GPT-2 and GPT-3 once more, in Flax NNX: the same paths, files and numbers as `gpt`.

    config, graph, params = gpt_nnx.load(folder)
    logits = gpt_nnx.apply(graph, params, ids)  # (B, L, V)
    gpt_nnx.save(path, params, config)

    lora = jlora.transform(functools.partial(gpt_nnx.apply, graph), jlora.LoRA("c_attn/kernel"))
    base, adapter = lora.init(key, params, ids)

The layers are scanned, with their parameters stacked on axis 0 of ``h``, or a list of modules. The
letters in the shapes are those of `gpt`, and its sizes and names serve here too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora import peft

from . import gpt
from .gpt import Config
from .parts import check_length


class Attention(nnx.Module):
    """Multi-head attention of every token to itself and those before it."""

    def __init__(self, config: Config, rngs: nnx.Rngs, **options: Any):
        """The layers."""
        self.heads = config.heads
        self.c_attn = nnx.LinearGeneral(config.dim, (3, config.dim), rngs=rngs, **options)
        self.c_proj = nnx.Linear(config.dim, config.dim, rngs=rngs, **options)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """``(B, L, D)`` and ``(B, 1, 1, L)`` to ``(B, L, D)``."""
        y = self.c_attn(x).reshape(*x.shape[:2], 3, self.heads, -1)  # (B, L, 3, H, K)
        q, k, v = (y[:, :, i] for i in range(3))  # (B, L, H, K)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
        return self.c_proj(y.reshape(x.shape))


class MLP(nnx.Module):
    """Dense, GELU by its tanh approximation, dense."""

    def __init__(self, config: Config, rngs: nnx.Rngs, **options: Any):
        """The layers."""
        inner = config.inner or 4 * config.dim
        self.c_fc = nnx.Linear(config.dim, inner, rngs=rngs, **options)
        self.c_proj = nnx.Linear(inner, config.dim, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, L, D)`` to ``(B, L, D)``."""
        return self.c_proj(nnx.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    """Causal attention and a two-layer perceptron, each on normalized inputs, added to x."""

    def __init__(self, config: Config, rngs: nnx.Rngs, **options: Any):
        """The layers."""
        norm = {"epsilon": config.norm_eps, "rngs": rngs, **options}
        self.ln_1 = nnx.LayerNorm(config.dim, **norm)
        self.attn = Attention(config, rngs, **options)
        self.ln_2 = nnx.LayerNorm(config.dim, **norm)
        self.mlp = MLP(config, rngs, **options)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """``(B, L, D)`` and ``(B, 1, 1, L)``, True where a key is seen, to ``(B, L, D)``."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class GPT(nnx.Module):
    """The language model; the arguments are those of `gpt.GPT`."""

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        scan: bool = True,
        remat: bool = False,
        policy: Callable[..., bool] | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        """The layers, by keys of `rngs`."""
        self.config, self.scan, self.remat, self.policy = config, scan, remat, policy
        options = {"dtype": dtype, "param_dtype": param_dtype}
        self.wte = nnx.Embed(config.rows, config.dim, rngs=rngs, **options)
        self.wpe = nnx.Embed(config.positions, config.dim, rngs=rngs, **options)
        if scan:

            @nnx.split_rngs(splits=config.layers)
            @nnx.vmap
            def stack(rngs: nnx.Rngs) -> Block:
                return Block(config, rngs, **options)

            self.h = stack(rngs)
        else:
            self.h = nnx.List([Block(config, rngs, **options) for _ in range(config.layers)])
        self.ln_f = nnx.LayerNorm(config.dim, epsilon=config.norm_eps, rngs=rngs, **options)

    def __call__(
        self, ids: jax.Array, mask: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Token ids ``(B, L)``, and a mask of padding, to float32 logits ``(B, L, V)``."""
        c = self.config
        if positions is None:
            check_length(ids, c.positions)
            positions = jnp.arange(ids.shape[1])[None]
        x = self.wte(ids) + self.wpe(positions)  # (B, L, D)
        mask = None if mask is None else mask[:, None, None].astype(bool)  # (B, 1, 1, L)
        x = self.ln_f(self.blocks(x, mask))
        logits = self.wte.attend(x).astype(jnp.float32)
        is_token = jnp.arange(c.rows)[None, None] < c.vocab
        return jnp.where(is_token, logits, jnp.finfo(jnp.float32).min)

    def blocks(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """What the layers make of x."""

        def step(block: Block, x: jax.Array) -> jax.Array:
            return block(x, mask)

        if self.remat:
            step = nnx.remat(step, policy=self.policy, prevent_cse=not self.scan)
        if self.scan:
            return nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.h, x)
        for block in self.h:
            x = step(block, x)
        return x


def apply(graph: Any, params: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """The logits of the model that `nnx.split` took apart."""
    return nnx.merge(graph, params, copy=True)(*args, **kwargs)


# ---- checkpoints --------------------------------------------------------------------------------


def load(
    folder: str | Path, scan: bool = True, pad_vocab: int = 1, **options: Any
) -> tuple[Config, Any, Any]:
    """Config, graph and parameters from a folder of Hugging Face's; see `gpt.load` and `GPT`."""
    config, variables = gpt.load(folder, scan, pad_vocab)
    graph, like = shapes(config, scan=scan, **options)
    tensors = peft.to_tensors(variables["params"], gpt.names(config))
    return config, graph, peft.from_tensors(tensors, like, gpt.names(config))


def save(path: str | Path, params: Any, config: Config) -> None:
    """Writes `params` to a safetensors file under Hugging Face's names."""
    gpt.save(path, {"params": params}, config)


def shapes(config: Config, **options: Any) -> tuple[Any, Any]:
    """The graph, and the parameters as `jax.ShapeDtypeStruct`s."""
    return nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0), **options)))
