"""Adapt a model, train it, merge it: all of jlora that most runs need, in seconds on a CPU."""

import flax.linen as nn
import jax
import optax

import jlora

up, mid, out = nn.Dense(256), nn.Dense(256), nn.Dense(1)
model = nn.Sequential([up, nn.relu, mid, nn.relu, out])
key = jax.random.key(0)
x = jax.random.normal(key, (2048, 16))
y = x[:, :1] * x[:, 1:2]
params = model.init(key, x)  # in practice, those of a checkpoint

lora = jlora.transform(model.apply, jlora.LoRA(rank=8))
base, adapter = lora.init(key, params, x)  # frozen; trained
print(lora.sites(params, x))
tx = jlora.optimizer(optax.adam(1e-2))  # moments for the adapter alone
state = tx.init(adapter)


def loss_fn(adapter, base, x, y):
    return ((lora.apply(base, adapter, x) - y) ** 2).mean()


@jax.jit
def step(adapter, state, base, x, y):
    grads = jax.grad(loss_fn)(adapter, base, x, y)
    updates, state = tx.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state


for _ in range(150):
    adapter, state = step(adapter, state, base, x, y)

merged = jlora.merge(base, adapter)  # `params` again, trained
print(f"loss before: {loss_fn({}, params, x, y):.2f}")
print(f"loss after: {loss_fn({}, merged, x, y):.2f}")
