"""Adapt a model, train it, merge it: all of jlora that most runs need, in seconds on a CPU."""

import flax.linen as nn
import jax
import optax

import jlora

layers = [nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(1)]
model = nn.Sequential(layers)
key = jax.random.key(0)
x = jax.random.normal(key, (4096, 16))
labels = x[:, [0]] * x[:, [1]] > 0
train, test = (x[:2048], labels[:2048]), (x[2048:], labels[2048:])
variables = model.init(key, x)  # in practice, those of a checkpoint

rules = jlora.LoRA("layers_[02]/kernel", rank=4), jlora.Full("layers_4")
lora = jlora.transform(model.apply, *rules)
base, adapter = lora.init(key, variables, x)  # frozen; trained
print(lora.sites(variables, x))
tx = jlora.optimizer(optax.adamw(1e-2))
state = tx.init(adapter)


@jax.jit
def step(adapter, state, base, x, labels):
    def loss_fn(adapter):
        logits = lora.apply(base, adapter, x)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(adapter)
    updates, state = tx.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, loss


for _ in range(100):
    adapter, state, loss = step(adapter, state, base, *train)
merged = jlora.merge(base, adapter)  # `variables` again, trained

x, labels = test
for name, trained in {"before": variables, "after": merged}.items():
    right = (model.apply(trained, x) > 0) == labels
    print(f"{name}: {right.mean():.1%} of the rows held out are right")
