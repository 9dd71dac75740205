"""A ViT and a ConvNet learn upright digits, and adapters of them digits that lie on their side.

    pip install scikit-learn
    python examples/digits.py  # less than a minute on two CPU cores

The guide *Vision* has what it prints.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from voices import Block, fit, show

import jlora

OLD, FEW, NEW = slice(1000), slice(1000, 1400), slice(1400, None)


class ViT(nn.Module):
    """Patches of 2×2 pixels, and two blocks."""

    @nn.compact
    def __call__(self, x):
        """(B, 8, 8, 1) to (B, 10)."""
        x = nn.Conv(64, (2, 2), (2, 2))(x).reshape(len(x), 16, 64)
        x = x + self.param("position", nn.initializers.normal(0.1), (16, 64))
        x = Block()(Block()(x))
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(1))


class ConvNet(nn.Module):
    """Three convolutions."""

    @nn.compact
    def __call__(self, x):
        """(B, 8, 8, 1) to (B, 10)."""
        for width in (32, 64, 64):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
        x = nn.max_pool(x, (4, 4), (4, 4)).reshape(len(x), -1)
        return nn.Dense(10, name="head")(x)


def adapt(model, upright, turned, labels):
    """An adapter and all parameters, and the accuracies of both on new digits that lie."""

    def accuracy(guess, base, trained):
        return float((guess(base, trained, turned[NEW]).argmax(-1) == labels[NEW]).mean())

    def full(_, params, x):
        return model.apply(params, x)

    nats = optax.softmax_cross_entropy_with_integer_labels
    params = model.init(jax.random.key(0), upright[:1])
    known, few = (upright[OLD], labels[OLD]), (turned[FEW], labels[FEW])
    params, _ = fit(full, nats, accuracy, optax.adam(2e-3), None, params, known, 150, 64)

    lora = jlora.transform(model.apply, jlora.LoRA("kernel", rank=4))
    base, adapter = lora.init(jax.random.key(1), params, upright[:1])
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, 100))
    given = lora.apply, nats, accuracy, jlora.optimizer(tx), base, adapter, few, 100, 64
    adapter, some = fit(*given)
    _, every = fit(full, nats, accuracy, tx, None, params, few, 100, 64)
    for tree, curve in ((adapter, some), (params, every)):
        show(type(model).__name__, tree, curve)
    return adapter, params, (some, every)


def main():
    """What came of each model, and the curves by model."""
    digits = load_digits()
    upright = np.float32(digits.images / 16)[..., None]  # (1797, 8, 8, 1)
    turned = np.rot90(upright, axes=(1, 2))
    results = [adapt(model, upright, turned, digits.target) for model in (ViT(), ConvNet())]
    curves = dict(zip(("ViT", "ConvNet"), (curves for *_, curves in results), strict=True))
    return *results[-1][:2], curves


if __name__ == "__main__":
    main()
