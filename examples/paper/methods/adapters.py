"""Bottleneck adapters: small perceptrons with a residual, between the parts of a frozen model.

With a kernel of zeros where they lead up, they start as the identity. Under the models' dropout
they act before it, on what it then drops from.

Letters in the shapes: D hidden size, R bottleneck.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .added import Hook, Method, Rule, sizes, with_added

EPSILON = 1e-5


def adapter_h(model: nn.Module, *rules: Rule, bottleneck: int = 8) -> Method:
    """Adapters after attention's output projection and after the MLP's, before each residual sum.

    Source: Houlsby et al., arXiv 1902.00751. Norms are trained only where a rule says so.
    """
    return _adapters(model, rules, ("attention", "mlp"), bottleneck, norm=False)


def adapter_l(model: nn.Module, *rules: Rule, bottleneck: int = 16) -> Method:
    """One adapter after each layer, that is after its MLP, with a norm of its own before it.

    Source: Lin et al., arXiv 2004.03829.
    """
    return _adapters(model, rules, ("layer",), bottleneck, norm=True)


def count(adapters: int, norms: int, dim: int, bottleneck: int) -> int:
    """Parameters of all adapters and their norms: L_adpt·(2·d·r + r + d) + 2·L_LN·d."""
    return adapters * (2 * dim * bottleneck + bottleneck + dim) + 2 * norms * dim


def perceptron(p: Any, x: jax.Array) -> jax.Array:
    """``x + relu(norm(x)·down)·up``, the norm only where `p` has one: ``(..., D)`` to the same."""
    p = jax.tree.map(lambda w: w.astype(x.dtype), p)
    y = x
    if "norm" in p:
        plain = nn.LayerNorm(EPSILON, use_bias=False, use_scale=False)  # computes in float32
        y = plain.apply({}, y) * p["norm"]["scale"] + p["norm"]["bias"]
    y = nn.relu(y @ p["down"]["kernel"] + p["down"]["bias"])  # (..., R)
    return x + y @ p["up"]["kernel"] + p["up"]["bias"]


def _adapters(
    model: nn.Module, rules: Sequence[Rule], parts: Sequence[str], bottleneck: int, norm: bool
) -> Method:
    layers, dim, _ = sizes(model)

    def draw_one(key: jax.Array) -> Any:
        down = nn.initializers.lecun_normal()(key, (dim, bottleneck))
        p = {
            "down": {"kernel": down, "bias": jnp.zeros(bottleneck)},
            "up": {"kernel": jnp.zeros((bottleneck, dim)), "bias": jnp.zeros(dim)},
        }
        return p | {"norm": {"scale": jnp.ones(dim), "bias": jnp.zeros(dim)}} if norm else p

    def draw(key: jax.Array, variables: Any) -> Any:
        del variables
        keys = jax.random.split(key, (layers, len(parts)))
        return {
            f"layer_{i}": {part: draw_one(keys[i, j]) for j, part in enumerate(parts)}
            for i in range(layers)
        }

    def begin(added: Any, *args: Any, **kwargs: Any) -> Hook:
        del args, kwargs

        def hook(call, layer, part, *inputs):
            outputs = call(*inputs)
            if part not in parts:
                return outputs
            p = added[f"layer_{layer}"][part]
            if not isinstance(outputs, tuple):
                return perceptron(p, outputs)
            x, *besides = outputs  # what a cache holds
            return perceptron(p, x), *besides

        return hook

    return with_added(model, draw, begin, *rules)
