"""Serves adapters by tpu-inference on a CPU: `python served_tpu_worker.py BASE OUT ADAPTER...`.

Does what `served_worker.py` does. What only a TPU has is replaced: the kernel of attention by the
same in JAX, options of the compiler by none, and the size of the memory by a constant. In 32 bits,
weights are copied once more. `test_served_tpu.py` runs it.
"""

import os
import sys
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", SKIP_JAX_PRECOMPILE="1")

import jax
import jax.numpy as jnp
import served_worker

# Else the next step overwrites its inputs, which are not copied to a CPU.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def attend(
    q: jax.Array,  # (tokens, heads, width); those of all requests, one after the other
    k: jax.Array,  # (tokens, heads of k, width)
    v: jax.Array,
    cache: jax.Array,  # (pages, size, 2 · heads of k / n, n, width)
    lengths: jax.Array,  # of requests, with the tokens in the cache
    pages: jax.Array,  # of the first request, of the second ...
    starts: jax.Array,  # of requests in q, and their end
    counts: jax.Array,  # of requests; the last is that of all
    *,
    sm_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    **_: Any,
) -> tuple[jax.Array, jax.Array]:
    """Ragged paged attention: the values of q, and the cache with k and v."""
    heads, width, size = k.shape[1], q.shape[2], cache.shape[1]
    table = pages.reshape(len(lengths), -1)
    slots = (table[..., None] * size + jnp.arange(size)).reshape(len(lengths), -1)
    token, request = jnp.arange(len(q)), jnp.searchsorted(starts[1:], jnp.arange(len(q)), "right")
    is_real, request = request < counts[-1], jnp.minimum(request, len(lengths) - 1)
    at = lengths[request] - starts[request + 1] + token
    flat = cache.reshape(len(cache) * size, -1, cache.shape[-1])
    new = jnp.stack([k, v], 2).reshape(len(k), 2 * heads, width)
    slot = jnp.where(is_real, slots[request, at], len(flat))
    flat = flat.at[slot, : 2 * heads, :width].set(new.astype(flat.dtype), mode="drop")
    seen = flat[slots[request], : 2 * heads, :width].astype(q.dtype)
    keys, values = (jnp.repeat(seen[:, :, i::2], q.shape[1] // heads, 2) for i in (0, 1))
    scores = jnp.einsum("thd,tphd->thp", q, keys) * sm_scale
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    back = at[:, None] - jnp.arange(slots.shape[1])
    is_seen = (back >= 0) & (back < (sliding_window or slots.shape[1]))
    weights = jax.nn.softmax(jnp.where(is_seen[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("thp,tphd->thd", weights, values), flat.reshape(cache.shape)


def replace_hardware() -> None:
    """Lets the engine run on a CPU, in 32 bits."""
    from tpu_inference import utils
    from tpu_inference.layers.common import attention_interface
    from tpu_inference.layers.vllm.quantization import unquantized
    from tpu_inference.models.common import compiler_options

    utils.hbm_usage_bytes = lambda devices: [(0, 2**26) for _ in devices]
    compiler_options.get_step_fn_compiler_options = dict
    compiler_options.get_sampling_compiler_options = dict
    attention_interface.ragged_paged_attention = attend
    attention_interface.ragged_paged_attention_hd64 = attend
    # It frees the original, which it can't where NumPy has a view of it, as of float32.
    to_jax = unquantized.t2j
    unquantized.t2j = lambda x, **options: to_jax(x.clone(), **options)


if __name__ == "__main__":
    replace_hardware()
    served_worker.main(*sys.argv[1:])
