"""The language model that is measured: a plain pre-norm transformer, scanned and rematerialized."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import jlora


class Shape(NamedTuple):
    """Sizes of the model and of a batch."""

    layers: int
    dim: int
    heads: int
    batch: int
    length: int
    vocab: int = 1024

    def __str__(self) -> str:
        """As a row of a table names it."""
        return f"{self.layers} layers, d={self.dim}, {self.batch * self.length} tokens"


class Block(nn.Module):
    """Attention and a perceptron, each on normalized inputs and with a residual."""

    shape: Shape

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """As the body of a scan: x (batch, length, dim) is the carry."""
        s = self.shape
        heads = (s.heads, s.dim // s.heads)

        def project(name: str) -> jax.Array:
            return nn.DenseGeneral(heads, use_bias=False, name=name)(y)

        y = nn.LayerNorm(use_bias=False, name="attention_norm")(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", project("q"), project("k")) / heads[1] ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), project("v"))
        x += nn.DenseGeneral(s.dim, axis=(-2, -1), use_bias=False, name="o")(mixed)
        y = nn.LayerNorm(use_bias=False, name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(4 * s.dim, use_bias=False, name="up")(y))
        return x + nn.Dense(s.dim, use_bias=False, name="down")(y), None


class LM(nn.Module):
    """Token ids (batch, length) to logits (batch, length, vocab); the head is the embedding.

    Attributes:
        shape: the sizes.
        scan: one traced layer, with stacked parameters.
        remat: each layer is computed again in the backward pass.
        policy: what `remat` keeps none the less.
        block: the layer.
    """

    shape: Shape
    scan: bool = False
    remat: bool = False
    policy: Any = None
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits of the next token."""
        s, block = self.shape, self.block
        embed = nn.Embed(s.vocab, s.dim, name="embed")
        x = embed(ids)
        if self.remat:
            block = nn.remat(block, policy=self.policy, prevent_cse=not self.scan)
        if self.scan:
            scan = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(block, length=s.layers, **scan)(s, name="layers")(x, None)
        else:
            for i in range(s.layers):
                x, _ = block(s, name=f"layer_{i}")(x, None)
        return embed.attend(nn.LayerNorm(use_bias=False, name="norm")(x))


def token_ids(shape: Shape) -> jax.Array:
    """Random ids (batch, length + 1): the last is only a label."""
    return jax.random.randint(jax.random.key(1), (shape.batch, shape.length + 1), 0, shape.vocab)


def batch_and_params(lm: LM) -> tuple[jax.Array, Any]:
    """Token ids and the parameters."""
    ids = token_ids(lm.shape)
    return ids, jax.jit(lm.init)(jax.random.key(0), ids[:, :-1])


def attention(rank: int) -> list[jlora.LoRA]:
    """The paper's choice: query and value."""
    return [jlora.LoRA(r"(q|v|query|value)/kernel", rank=rank, alpha=16)]


def all_linear(rank: int) -> list[jlora.LoRA]:
    """Every kernel of a layer."""
    return [jlora.LoRA(r"layer.*/kernel", rank=rank, alpha=16)]


def all_linear_dora(rank: int) -> list[jlora.DoRA]:
    """The same by DoRA."""
    return [jlora.DoRA(r"layer.*/kernel", rank=rank, alpha=16)]
