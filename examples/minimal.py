"""Adapt a model, train it, merge it: all of jlora that most runs need, in seconds on a CPU."""

import flax.linen as nn
import jax
import optax

import jlora

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(2)])
key = jax.random.key(0)
x = jax.random.normal(key, (512, 64))
labels = (x[:, 0] * x[:, 1] > 0).astype(int)
variables = model.init(key, x)  # in practice, those of a checkpoint

lora = jlora.transform(
    model.apply, jlora.LoRA(r"layers_[02]/kernel", rank=8, alpha=16), jlora.Full("layers_4")
)
base, adapter = lora.init(key, variables, x)  # the frozen weights; what is trained
print(lora.sites(variables, x))
tx = jlora.optimizer(optax.adamw(1e-2))
state = tx.init(adapter)


@jax.jit
def step(adapter, state, base, x, labels):
    def loss_fn(adapter):
        logits = lora.apply(base, adapter, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, state = tx.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, loss


for _ in range(100):
    adapter, state, loss = step(adapter, state, base, x, labels)
merged = jlora.merge(base, adapter)  # `variables` again, trained
right = (model.apply(merged, x).argmax(-1) == labels).mean()
print(f"loss {loss:.3f}, {right:.1%} right, merged")
