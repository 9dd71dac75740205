"""A mixture of experts that drops no token: tokens sorted by expert, one ragged product for all.

    y = Experts(config)(x)                       # in place of a gated MLP

A router gives each token the `experts_per_token` experts of the highest probability; their outputs
are added with these weights. Kernels are (experts, inputs, outputs), and to jlora a site each, with
an A and a B for every expert. Sources: Shazeer et al., arXiv 1701.06538; Jiang et al., 2401.04088.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .parts import Part, constrain, dense


class Grouped(nn.Module):
    """A dense layer for each group of rows: rows (n, inputs), sorted by group, to (n, outputs)."""

    groups: int
    size: int
    axes: tuple[str | None, str | None]
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, rows: jax.Array, sizes: jax.Array) -> jax.Array:
        """`sizes`: how many rows each group has, (groups,)."""
        init = nn.initializers.lecun_normal(batch_axis=0)
        init = nn.with_logical_partitioning(init, ("experts", *self.axes))
        shape = self.groups, rows.shape[-1], self.size
        kernel = self.param("kernel", init, shape, self.param_dtype)
        return jax.lax.ragged_dot(rows.astype(self.dtype), kernel.astype(self.dtype), sizes)


class Experts(Part):
    """Gated feed-forward layers, down(act(gate(x)) * up(x)), of which each token passes a few.

    Attributes:
        config: of a `decoder.Decoder`.
        dtype: of activations and products.
        param_dtype: of the parameters that `init` draws.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (batch, length, dim)
        """Applies the layer to every position."""
        c, options = self.config, self.options
        tokens = x.reshape(-1, c.dim)  # (tokens, dim)
        router = dense(c.experts, ("embed", None), use_bias=False, **options, name="router")
        scores = jax.nn.softmax(router(tokens).astype(jnp.float32))  # (tokens, experts)
        weights, chosen = jax.lax.top_k(scores, c.experts_per_token)  # (tokens, per token)
        if c.normalized_experts:
            weights /= weights.sum(-1, keepdims=True)

        order = jnp.argsort(chosen.reshape(-1), stable=True)  # (tokens * per token,)
        sizes = jnp.bincount(chosen.reshape(-1), length=c.experts).astype(jnp.int32)
        rows = tokens[order // c.experts_per_token]
        gate = Grouped(c.experts, c.hidden, ("embed", "mlp"), **options, name="gate")(rows, sizes)
        up = Grouped(c.experts, c.hidden, ("embed", "mlp"), **options, name="up")(rows, sizes)
        y = constrain(c.act(gate) * up, None, "mlp")
        y = Grouped(c.experts, c.dim, ("mlp", "embed"), **options, name="down")(y, sizes)
        y = y[jnp.argsort(order)].reshape(*chosen.shape, c.dim)  # (tokens, per token, dim)
        return jnp.einsum("tkd,tk->td", y, weights.astype(y.dtype)).reshape(x.shape)
