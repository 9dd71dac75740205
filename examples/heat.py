"""A graph network learns how heat spreads in a material, and an adapter of it in another one.

    python examples/heat.py  # half a minute on two CPU cores

The guide *Other data* has what it prints.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from voices import fit, show

import jlora


def spread(count, speed, seed):
    """Links (count, 24, 24), and temperatures (count, 24, 1) before and after, solved exactly."""
    draw = np.random.default_rng(seed)
    place = draw.random((count, 24, 2))
    apart = np.linalg.norm(place[:, :, None] - place[:, None], axis=-1)
    links = np.float32((apart < 0.3) & (apart > 0))
    laplacian = np.eye(24) * links.sum(-1, keepdims=True) - links
    rates, modes = np.linalg.eigh(laplacian)
    before = draw.normal(size=(count, 24, 1))
    after = modes.swapaxes(1, 2) @ before
    after = modes @ (np.exp(-speed * rates)[..., None] * after)
    return links, np.float32(before), np.float32(after)


class Network(nn.Module):
    """In each round a point adds up the messages of its neighbors."""

    @nn.compact
    def __call__(self, links, before):
        """Links and temperatures to later temperatures."""
        degree = links.sum(-1, keepdims=True)
        x = nn.Dense(64)(jnp.concatenate([before, degree / 4], -1))
        for _ in range(4):
            h = nn.LayerNorm()(x)
            message = links @ nn.Dense(64)(h)
            h = jnp.concatenate([h, message / 4], -1)
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(128)(h)))
        return nn.Dense(1)(nn.LayerNorm()(x))


def square(after, expected):
    """The error of each temperature."""
    return (after - expected) ** 2


def main():
    """The adapter, all parameters, and the curves of LoRA, in full, and from random weights."""
    known, few = spread(2000, 0.15, 0), spread(8, 0.5, 1)
    links, before, after = spread(200, 0.5, 2)  # the second material, other graphs

    def error(guess, base, trained):
        return (square(guess(base, trained, links, before), after).mean() / after.var()) ** 0.5

    def full(_, params, *x):
        return model.apply(params, *x)

    model, rate = Network(), optax.cosine_decay_schedule
    fresh = model.init(jax.random.key(0), *known[:2])
    tx = optax.adam(rate(3e-3, 600))
    params, _ = fit(full, square, error, tx, None, fresh, known, 600)

    lora = jlora.transform(model.apply, jlora.LoRA(rank=4))
    base, adapter = lora.init(jax.random.key(1), params, *known[:2])
    tx = jlora.optimizer(optax.adam(rate(3e-3, 200)))
    adapter, some = fit(lora.apply, square, error, tx, base, adapter, few, 200)
    tx = optax.adam(rate(6e-4, 200))
    _, every = fit(full, square, error, tx, None, params, few, 200)
    tx = optax.adam(rate(1.5e-3, 200))
    _, alone = fit(full, square, error, tx, None, fresh, few, 200)

    curves = [x[::2] for x in (some, every, alone)]
    for row in zip(("LoRA", "full", "random"), (adapter, params, fresh), curves, strict=True):
        show(*row)
    return adapter, params, {"error": curves}


if __name__ == "__main__":
    main()
