"""Adapt a model, train it, merge it: all of jlora that most runs need, in seconds on a CPU."""

import flax.linen as nn
import jax
import optax

import jlora

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(2)])
key = jax.random.key(0)
x = jax.random.normal(key, (4096, 16))
labels = (x[:, 0] * x[:, 1] > 0).astype(int)
train, test = slice(2048), slice(2048, None)
variables = model.init(key, x)  # in practice, those of a checkpoint

lora = jlora.transform(
    model.apply, jlora.LoRA(r"layers_[02]/kernel", rank=4, alpha=8), jlora.Full("layers_4")
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
    adapter, state, loss = step(adapter, state, base, x[train], labels[train])
merged = jlora.merge(base, adapter)  # `variables` again, trained

for name, trained in {"before": variables, "after": merged}.items():
    right = model.apply(trained, x[test]).argmax(-1) == labels[test]
    print(f"{name}: {right.mean():.1%} of the rows held out are right")
