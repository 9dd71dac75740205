"""Trainable vectors at the positions of special tokens before the sentence.

The vectors stand where the first layer reads what the embedding layer gives, and have no position
of their own; the tokens of the sentence keep theirs. All tokens attend to them; heads and means see
the sentence alone. To BERT, the paper's prefix and infix tokens are therefore the same.

Letters in the shapes: B batch, L tokens, P special tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .added import Hook, Method, Rule, change, sizes, with_added

STD = 0.02


def pre_embed(model: nn.Module, *rules: Rule, l_p: int = 8) -> Method:
    """Prefix embeddings: the first layer's inputs at `l_p` special tokens are trained.

    Source: Hu et al., arXiv 2106.09685, section 5.1.
    """
    return _prefixes(model, rules, l_p, 1, _normal)


def pre_layer(model: nn.Module, *rules: Rule, l_p: int = 8) -> Method:
    """Prefix layers: every layer's inputs at `l_p` special tokens are trained.

    Source: Li and Liang, arXiv 2101.00190; Hu et al., arXiv 2106.09685, section 5.1.
    """
    return _prefixes(model, rules, l_p, sizes(model).layers, _normal)


def prompt(
    model: nn.Module, *rules: Rule, l_p: int = 20, tokens: Sequence[int] | None = None
) -> Method:
    """Prompt tuning: prefix embeddings that start as those of words.

    Args:
        model: a BERT or GPT-2.
        *rules: what else is trained.
        l_p: prefix tokens.
        tokens: the ids that they start from; None draws them from the vocabulary.

    Raises:
        ValueError: if `tokens` are not `l_p`.

    Source: Lester et al., arXiv 2104.08691.
    """
    if tokens is not None and len(tokens) != l_p:
        raise ValueError(f"`tokens` must be `l_p` = {l_p} token ids; got {len(tokens)}.")

    def start(key: jax.Array, variables: Any, shape: tuple[int, int]) -> jax.Array:
        drawn = jax.random.randint(key, shape[:1], 0, sizes(model).vocab)
        ids = drawn if tokens is None else jnp.asarray(tokens)
        return jax.jit(embedded, static_argnums=0)(model, variables, ids[None])[0]

    return _prefixes(model, rules, l_p, 1, start)


def count(layers: int, dim: int, l_p: int) -> int:
    """Parameters: L·d·l_p, with L = 1 for prefix embeddings."""
    return layers * dim * l_p


def embedded(model: nn.Module, variables: Any, ids: jax.Array) -> jax.Array:
    """What the first layer reads: ids ``(B, L)`` to ``(B, L, D)``."""
    seen = []

    def hook(call, layer, part, *inputs):
        if (layer, part) == (0, "layer"):
            seen.append(inputs[0])
        return call(*inputs)

    plain = model.clone(remat=False)  # where layers are traced by themselves, x would leak
    change(plain.apply, lambda added, ids: hook)({**variables, "added": {}}, ids)
    return seen[0]


def _normal(key: jax.Array, variables: Any, shape: tuple[int, int]) -> jax.Array:
    del variables
    return STD * jax.random.normal(key, shape)


def _prefixes(
    model: nn.Module, rules: Sequence[Rule], l_p: int, changed: int, start: Callable[..., jax.Array]
) -> Method:
    """Vectors for the inputs of the first `changed` layers."""
    layers, dim, _ = sizes(model)
    if l_p < 1:
        raise ValueError(f"`l_p` must be a number of tokens, at least 1; got {l_p}.")

    def draw(key: jax.Array, variables: Any) -> Any:
        keys = jax.random.split(key, changed)
        return {f"layer_{i}": start(keys[i], variables, (l_p, dim)) for i in range(changed)}

    def begin(added: Any, *args: Any, **kwargs: Any) -> Hook:
        del args, kwargs

        def hook(call, layer, part, x, *rest):
            if part != "layer":
                return call(x, *rest)
            if layer < changed:
                tokens = x if layer == 0 else x[:, l_p:]
                vectors = added[f"layer_{layer}"].astype(x.dtype)
                vectors = jnp.broadcast_to(vectors, (len(x), l_p, dim))
                x = jnp.concatenate([vectors, tokens], 1)  # (B, P + L, D)
            x, _ = call(x, *(mask if mask is None else widen(mask, l_p) for mask in rest))
            return (x[:, l_p:] if layer == layers - 1 else x), None

        return hook

    return with_added(model, draw, begin, *rules)


def widen(mask: jax.Array, specials: int) -> jax.Array:
    """``(..., L)`` to ``(..., P + L)``, with the special tokens seen.

    If the mask has a row for each token, ``(..., L, L)``, that of a special token is the first.
    """
    if mask.ndim > 2 and mask.shape[-2] > 1:
        rows = [(0, 0)] * (mask.ndim - 2) + [(specials, 0), (0, 0)]
        mask = jnp.pad(mask, rows, mode="edge")
    return jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(specials, 0)], constant_values=1)
