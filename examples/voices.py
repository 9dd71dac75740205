"""A recognizer of vowels learns men's voices, and an adapter of it children's.

    python examples/voices.py  # half a minute on two CPU cores

The guide *Other data* has what it prints.
"""

import flax.linen as nn
import jax
import numpy as np
import optax

import jlora

RATE, PITCH = 8000, {"men": 130, "children": 265}  # Hz
# Resonances of the vocal tract in heed, hid, head, had, hod, hawed, hood, who'd, hud and heard:
# means that Peterson and Barney (1952) measured for 33 men and 15 children.
FORMANTS = {
    "men": [
        [270, 390, 530, 660, 730, 570, 440, 300, 640, 490],
        [2290, 1990, 1840, 1720, 1090, 840, 1020, 870, 1190, 1350],
        [3010, 2550, 2480, 2410, 2440, 2410, 2240, 2240, 2390, 1690],
    ],
    "children": [
        [370, 530, 690, 1010, 1030, 680, 560, 430, 850, 560],
        [3200, 2730, 2610, 2320, 1370, 1060, 1410, 1170, 1590, 1820],
        [3730, 3600, 3570, 3320, 3170, 3180, 3310, 3260, 3360, 2160],
    ],
}


def speak(who, count, seed):
    """Spectrograms (count, 13, 128) and vowels (count,)."""
    draw = np.random.default_rng(seed)

    def vary(by, *shape):
        return np.exp(draw.normal(0, by, shape))

    vowels = draw.integers(10, size=count)
    peaks = np.array(FORMANTS[who])[:, vowels, None]
    peaks = peaks * vary(0.05, 3, count, 1) * vary(0.07, count, 1)
    pitch = PITCH[who] * vary(0.15, count, 1)
    sound = draw.normal(0, 0.3, (count, 1024))
    for k in range(1, 40):  # harmonics
        f = k * pitch
        gain = peaks**2 / np.hypot(peaks**2 - f**2, 100 * f)
        gain = np.where(f < RATE / 2, gain.prod(0) / k, 0)
        phase = f * np.arange(1024) / RATE + draw.random((count, 1))
        sound += gain * np.cos(2 * np.pi * phase)
    sound /= sound.std(1, keepdims=True)
    frames = np.lib.stride_tricks.sliding_window_view(sound, 256, 1)
    spectra = np.fft.rfft(frames[:, ::64] * np.hanning(256))
    return np.float32(np.log(abs(spectra[..., 1:]) + 1)), vowels


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    @nn.compact
    def __call__(self, x):
        """(B, L, 64) to (B, L, 64)."""
        x = x + nn.MultiHeadAttention(4)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(128)(nn.LayerNorm()(x)))
        return x + nn.Dense(64)(h)


class Recognizer(nn.Module):
    """Built like the encoder of Whisper, but small."""

    @nn.compact
    def __call__(self, x):
        """(B, 13, 128) to (B, 10)."""
        x = nn.gelu(nn.Conv(64, (3,))(x))
        x = nn.gelu(nn.Conv(64, (3,), (2,))(x))
        x = Block()(Block()(x))
        return nn.Dense(10, name="head")(nn.LayerNorm()(x).mean(1))


def fit(apply, loss, measure, tx, base, trained, data, steps, batch=32):
    """Trains an adapter, or all parameters; what `measure` says of it every 25 steps."""

    @jax.jit
    def step(trained, state, base, inputs, target):
        def loss_fn(trained):
            return loss(apply(base, trained, *inputs), target).mean()

        updates, state = tx.update(jax.grad(loss_fn)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    guess, state, curve = jax.jit(apply), tx.init(trained), []
    draw = np.random.default_rng(0)
    for i in range(steps + 1):
        if i % 25 == 0:
            curve.append(measure(guess, base, trained))
        rows = draw.integers(len(data[0]), size=batch)
        *inputs, target = (x[rows] for x in data)
        trained, state = step(trained, state, base, inputs, target)
    return trained, np.array(curve).T


def show(name, tree, curve):
    """Prints a row of the guide."""
    values = "  ".join(f"{x:4.0%}" for x in curve)
    print(f"{name:8} {jlora.count(tree):7,} trained  {values}")


def main():
    """The adapter, all parameters, and the curves of both by who speaks."""
    men, children = speak("men", 1000, 0), speak("children", 200, 1)
    new = {who: speak(who, 500, 2) for who in ("children", "men")}

    def accuracy(guess, base, trained):
        return [(guess(base, trained, x).argmax(-1) == y).mean() for x, y in new.values()]

    def full(_, params, x):
        return model.apply(params, x)

    nats = optax.softmax_cross_entropy_with_integer_labels
    model, rate = Recognizer(), optax.cosine_decay_schedule
    params = model.init(jax.random.key(0), men[0][:1])
    params, _ = fit(full, nats, accuracy, optax.adam(1e-3), None, params, men, 200)

    lora = jlora.transform(model.apply, jlora.LoRA("kernel", rank=4))
    base, adapter = lora.init(jax.random.key(1), params, men[0][:1])
    tx = jlora.optimizer(optax.adam(rate(5e-3, 100)))
    adapter, some = fit(lora.apply, nats, accuracy, tx, base, adapter, children, 100)
    tx = optax.adam(rate(1e-3, 100))
    _, every = fit(full, nats, accuracy, tx, None, params, children, 100)
    curves = dict(zip(new, zip(some, every, strict=True), strict=True))
    for who in new:
        for tree, curve in zip((adapter, params), curves[who], strict=True):
            show(who, tree, curve)
    return adapter, params, curves


if __name__ == "__main__":
    main()
