"""Log-probabilities of tokens whose logits are never whole: those of a few tokens at a time.

    found = chunked.log_probs(lambda h: h @ params["head"], hidden, labels)  # (B, L)
    loss = -(found * mask).sum() / mask.sum()

Call it within the function that you give to `jlora.transform`: the head may be adapted, tied or
quantized. DPO and GRPO take the log-probabilities themselves.

Letters in the shapes: B rows, L tokens of a row, D model size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def log_probs(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, labels: jax.Array, length: int = 512
) -> jax.Array:
    """Log-probabilities ``(B, L)`` of `labels`, of which `head` gives the logits.

    A loop takes `length` tokens of each row at a time. It computes their slopes, the gradient by
    their hidden states, while their logits are there. So the backward pass multiplies with the
    head only where the head is trained; then it computes logits again, as many at a time. Second
    derivatives by the hidden states are not those of the logits.

    Args:
        head: hidden states ``(B, l, D)`` to logits ``(B, l, V)``, each token by itself. Those of
            16 bits become float32.
        hidden: ``(B, L, D)``; a mesh may cut its rows, not its tokens.
        labels: ``(B, L)`` integers.
        length: of a chunk at most. It need not divide L.
    """
    if length < 1:
        raise ValueError(f"`length` must be at least 1; got {length}.")
    rows, tokens = labels.shape
    chunks = max(1, -(-tokens // length))

    def cut(x: jax.Array) -> jax.Array:  # (B, L, ...) to (chunks, B, l, ...)
        x = jnp.pad(x, [(0, 0), (0, -tokens % chunks), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(rows, chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])
        return x[:, :tokens]

    @jax.checkpoint
    def chunk(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h, y = xs
        found, back = jax.vjp(lambda h: pick(head(h), y), h)
        [slopes] = back(jnp.ones_like(found))
        return found, jax.lax.stop_gradient(slopes)

    inputs = cut(jax.lax.stop_gradient(hidden)), cut(labels)
    found, slopes = map(join, jax.lax.map(chunk, inputs))
    return attach(found, slopes, hidden)


def pick(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The log-probability of each label by its logits ``(..., V)``."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype)
    found = jnp.take_along_axis(logits, labels[..., None], -1)
    return found[..., 0] - jax.nn.logsumexp(logits, -1)


@jax.custom_jvp
def attach(found: jax.Array, slopes: jax.Array, hidden: jax.Array) -> jax.Array:
    """`found`, whose derivative by the hidden state of each token is its slope ``(D,)``."""
    return found


@attach.defjvp
def _attach(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    found, slopes, _ = primals
    step, _, of_hidden = tangents
    change = (slopes * of_hidden).sum(-1, dtype=found.dtype)
    return found, step + change
