"""Trainable vectors at positions of special tokens, before the sentence and within it.

The vectors stand where the first layer reads what the embedding layer gives, and have no position
of their own; the tokens of the sentence keep theirs. All tokens attend to them, those of GPT-2 to
the ones before them; heads and means see the sentence alone. To BERT, prefix and infix are
therefore the same.

Letters in the shapes: B batch, L tokens, P special tokens, D hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from models import gpt

from .added import Hook, Method, Rule, change, sizes, with_added

STD = 0.02


def pre_embed(
    model: nn.Module, *rules: Rule, l_p: int = 8, l_i: int = 0, after: int | None = None
) -> Method:
    """Prefix embeddings: the first layer's inputs at `l_p` + `l_i` special tokens are trained.

    Args:
        model: a BERT or GPT-2.
        *rules: what else is trained.
        l_p: prefix tokens, before the sentence.
        l_i: infix tokens, within or after it.
        after: the token id, in a prompt its last, that the infix of GPT-2 follows where a row has
            it first; a row without it has its infix at the end.

    Source: Hu et al., arXiv 2106.09685, section 5.1.
    """
    return _prefixes(model, rules, Places(l_p, l_i, after), 1, _normal)


def pre_layer(
    model: nn.Module, *rules: Rule, l_p: int = 8, l_i: int = 0, after: int | None = None
) -> Method:
    """Prefix layers: every layer's inputs at the special tokens are trained; see `pre_embed`.

    Source: Li and Liang, arXiv 2101.00190; Hu et al., arXiv 2106.09685, section 5.1.
    """
    return _prefixes(model, rules, Places(l_p, l_i, after), sizes(model).layers, _normal)


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

    return _prefixes(model, rules, Places(l_p, 0, None), 1, start)


def count(layers: int, dim: int, l_p: int, l_i: int) -> int:
    """Parameters: L·d·(l_p + l_i), with L = 1 for prefix embeddings."""
    return layers * dim * (l_p + l_i)


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


class Places(NamedTuple):
    """Where the special tokens are: see `pre_embed`."""

    l_p: int
    l_i: int
    after: int | None

    def order(self, ids: jax.Array) -> jax.Array | None:
        """For each place, which of ``[specials, tokens]`` stands there: ``(B, P + L)``.

        None where they stand in this order.
        """
        if self.after is None or not self.l_i:
            return None
        length, found = ids.shape[1], ids == self.after
        end = jnp.where(found.any(1), found.argmax(1) + 1, length)[:, None]  # (B, 1)
        i = jnp.arange(length)
        at_tokens = self.l_p + i + jnp.where(i >= end, self.l_i, 0)  # (B, L)
        at_infix = self.l_p + end + jnp.arange(self.l_i)
        at_prefix = jnp.broadcast_to(jnp.arange(self.l_p), (len(ids), self.l_p))
        return jnp.concatenate([at_prefix, at_infix, at_tokens], 1).argsort(1)


def insert(vectors: jax.Array, x: jax.Array, order: jax.Array | None) -> jax.Array:
    """``(P, D)`` and ``(B, L, D)`` to ``(B, P + L, D)``."""
    vectors = jnp.broadcast_to(vectors.astype(x.dtype), (len(x), *vectors.shape))
    x = jnp.concatenate([vectors, x], 1)
    return x if order is None else jnp.take_along_axis(x, order[..., None], 1)


def remove(x: jax.Array, specials: int, order: jax.Array | None) -> jax.Array:
    """``(B, P + L, D)`` to ``(B, L, D)``: undoes `insert`."""
    x = x if order is None else jnp.take_along_axis(x, order.argsort(1)[..., None], 1)
    return x[:, specials:]


def widen(mask: jax.Array, specials: int, order: jax.Array | None) -> jax.Array:
    """``(..., L)`` to ``(..., P + L)``, with the special tokens seen."""
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(specials, 0)], constant_values=1)
    if order is None:
        return mask
    order = order.reshape(len(order), *[1] * (mask.ndim - 2), -1)
    return jnp.take_along_axis(mask, order, -1)


def _normal(key: jax.Array, variables: Any, shape: tuple[int, int]) -> jax.Array:
    del variables
    return STD * jax.random.normal(key, shape)


def _prefixes(
    model: nn.Module,
    rules: Sequence[Rule],
    places: Places,
    changed: int,
    start: Callable[..., jax.Array],
) -> Method:
    """Vectors for the inputs of the first `changed` layers."""
    layers, dim, _ = sizes(model)
    specials = places.l_p + places.l_i
    if places.l_p < 0 or places.l_i < 0 or not specials:
        raise ValueError(
            "`l_p` and `l_i` must be numbers of tokens, one of them at least 1; "
            f"got {places.l_p} and {places.l_i}."
        )
    if places.l_i and places.after is None and isinstance(model, gpt.GPT):
        raise ValueError(
            f"`after` must be the token id that the `l_i` = {places.l_i} infix tokens follow: no "
            "token of a causal model would see them after the last one; got None."
        )

    def draw(key: jax.Array, variables: Any) -> Any:
        keys = jax.random.split(key, changed)
        return {f"layer_{i}": start(keys[i], variables, (specials, dim)) for i in range(changed)}

    def begin(added: Any, ids: jax.Array, *args: Any, **kwargs: Any) -> Hook:
        del args, kwargs
        order = places.order(ids) if isinstance(model, gpt.GPT) else None

        def hook(call, layer, part, x, *rest):
            if part != "layer":
                return call(x, *rest)
            if layer < changed:
                tokens = x if layer == 0 else remove(x, specials, order)
                x = insert(added[f"layer_{layer}"], tokens, order)
            masks = [mask if mask is None else widen(mask, specials, order) for mask in rest]
            x, _ = call(x, *masks)
            return (remove(x, specials, order) if layer == layers - 1 else x), None

        return hook

    return with_added(model, draw, begin, *rules)
