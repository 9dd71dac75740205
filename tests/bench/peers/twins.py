"""The measured model for peers that adapt only 2-D kernels: in linen, and in NNX.

The same computation as `model.LM`: only the kernels of q, k, v and o have their heads flattened.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from .. import model

SITES = ("q", "k", "v", "o", "up", "down")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """Causal attention of flat queries, keys and values (batch, length, dim)."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tril(jnp.ones((q.shape[1],) * 2, bool)), scores, -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
    return mixed.reshape(*mixed.shape[:2], -1)


# ---- linen --------------------------------------------------------------------------------------


class FlatBlock(nn.Module):
    """`model.Block` with 2-D kernels."""

    shape: model.Shape

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """As the body of a scan: x (batch, length, dim) is the carry."""
        s = self.shape
        dense = partial(nn.Dense, use_bias=False)
        y = nn.LayerNorm(use_bias=False, name="attention_norm")(x)
        q, k, v = (dense(s.dim, name=name)(y) for name in "qkv")
        x += dense(s.dim, name="o")(attend(q, k, v, s.heads))
        y = nn.LayerNorm(use_bias=False, name="mlp_norm")(x)
        return x + dense(s.dim, name="down")(nn.gelu(dense(4 * s.dim, name="up")(y))), None


# ---- NNX ----------------------------------------------------------------------------------------


class NNXBlock(nnx.Module):
    """`FlatBlock` in NNX; with a rank, every kernel is the base of an `nnx.LoRA`."""

    def __init__(self, shape: model.Shape, rank: int, rngs: nnx.Rngs) -> None:
        """Kernels come from the stream "params", factors from "lora"."""

        def linear(inputs: int, outputs: int) -> nnx.Module:
            base = nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)
            if not rank:
                return base
            return nnx.LoRA(inputs, rank, outputs, base_module=base, rngs=nnx.Rngs(rngs.lora()))

        dim = shape.dim
        self.heads = shape.heads
        self.attention_norm = nnx.LayerNorm(dim, use_bias=False, rngs=rngs)
        self.q, self.k, self.v, self.o = (linear(dim, dim) for _ in range(4))
        self.mlp_norm = nnx.LayerNorm(dim, use_bias=False, rngs=rngs)
        self.up, self.down = linear(dim, 4 * dim), linear(4 * dim, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """One layer: (batch, length, dim) to the same."""
        y = self.attention_norm(x)
        x += self.o(attend(self.q(y), self.k(y), self.v(y), self.heads))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class NNXLM(nnx.Module):
    """`model.LM` of `FlatBlock`s in NNX."""

    def __init__(
        self, shape: model.Shape, rank: int = 0, scan: bool = False, remat: bool = False
    ) -> None:
        """Initial weights depend on nothing but the shape and `scan`."""
        rngs = nnx.Rngs(params=0, lora=1)
        self.embed = nnx.Embed(shape.vocab, shape.dim, rngs=rngs)
        self.norm = nnx.LayerNorm(shape.dim, use_bias=False, rngs=rngs)
        self.depth, self.scan, self.remat = shape.layers, scan, remat
        make = partial(NNXBlock, shape, rank)
        if scan:
            self.layers = nnx.split_rngs(splits=shape.layers)(nnx.vmap(make))(rngs)
        else:
            for i in range(shape.layers):
                setattr(self, f"layer_{i}", make(rngs))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits of the next token."""
        x = self.embed(ids)
        call = nnx.remat(NNXBlock.__call__) if self.remat else NNXBlock.__call__
        if self.scan:
            x = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        else:
            for i in range(self.depth):
                x = call(getattr(self, f"layer_{i}"), x)
        return self.embed.attend(self.norm(x))
