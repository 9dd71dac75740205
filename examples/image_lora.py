"""Image LoRA: a diffusion model of diffusers learns two styles, one by one, and blends them.

    pip install "jlora[torch]" diffusers peft scikit-learn
    python examples/image_lora.py                # five minutes of one CPU core
    python examples/image_lora.py --steps 3000   # better digits

A UNet is trained on the digits of scikit-learn, 8×8 pixels, with a prompt that says which digit.
Then one adapter learns slanted digits and another striped ones, each from images of 0 to 4 alone.
The run draws all ten digits before, with each adapter and with both; it measures what is seen, and
how many digits a classifier reads. In the end diffusers loads a file and computes what JAX does.

OUT has samples.png, with two rows for each of these models, and the adapters as diffusers has them.

Letters in the shapes: B images in a batch, N images.
"""

import argparse
import functools
import itertools
import pathlib
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from progress import progress

import jlora
from jlora import arithmetic, peft

try:
    import peft as _  # noqa: F401  diffusers loads adapters by it
    import torch
    from diffusers import UNet2DConditionModel
    from PIL import Image, ImageDraw
    from sklearn import datasets, svm
except ModuleNotFoundError as e:
    install = 'pip install "jlora[torch]" diffusers peft scikit-learn'
    raise SystemExit(f"image_lora.py needs {e.name}, which is not installed: {install}") from e

STEPS = 1000  # of the base
STYLE_STEPS = 150  # of an adapter
BATCH = 64
RANK = 8
DENOISE = 25  # steps from noise to an image
EACH = 20  # samples of a digit
OUT = pathlib.Path("out/image_lora")
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
UNET |= {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 2}
UNET |= {"cross_attention_dim": 10, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
PROMPTS = np.eye(10, dtype=np.float32)[:, None]  # of each digit one token, in place of a text's


# ---- styles: images of ink from 0 to 1, (N, 8, 8) -----------------------------------------------


def slant(ink: np.ndarray) -> np.ndarray:
    """Moves each row to the right, the upper ones more."""
    columns = np.arange(8.0)
    rows = [[np.interp(columns - 0.4 * (3.5 - i), columns, x[i]) for i in range(8)] for x in ink]
    return np.array(rows)


def stripe(ink: np.ndarray) -> np.ndarray:
    """Takes most ink from every second row."""
    return ink * np.where(np.arange(8) % 2, 0.25, 1.0)[:, None]


def measure_slant(ink: np.ndarray) -> float:
    """By how many columns ink lies to the right of the ink one row below."""
    weights = ink / ink.sum((1, 2), keepdims=True)
    y, x = (v - (weights * v).sum((1, 2), keepdims=True) for v in np.mgrid[:8, :8])
    return -float(np.mean((weights * y * x).sum((1, 2)) / (weights * y * y).sum((1, 2))))


def measure_stripes(ink: np.ndarray) -> float:
    """How much less ink every second row has."""
    return float(1 - ink[:, 1::2].sum() / ink[:, ::2].sum())


STYLES = {"slant": slant, "stripe": stripe}


# ---- diffusion: t is 0 for an image and 1 for noise ---------------------------------------------


def mix(image: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """The noisy image at a time."""
    return jnp.cos(t * jnp.pi / 2) * image + jnp.sin(t * jnp.pi / 2) * noise


def make_step(predict: Callable[..., jax.Array], tx: optax.GradientTransformation) -> Any:
    """A step by which ``predict(tree, base, x, t, prompts)`` learns to find the noise in x."""

    def loss_fn(tree, base, images, prompts, key):
        keys = jax.random.split(key)
        noise = jax.random.normal(keys[0], images.shape)  # (B, 1, 8, 8)
        t = jax.random.uniform(keys[1], (len(images), 1, 1, 1))
        found = predict(tree, base, mix(images, noise, t), t.ravel(), prompts)
        return jnp.mean((found - noise) ** 2)

    @jax.jit
    def step(tree, state, base, images, prompts, key):
        loss, grads = jax.value_and_grad(loss_fn)(tree, base, images, prompts, key)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, loss

    return step


def train(name: str, step: Any, tree: Any, state: Any, base: Any, drawn: Any, steps: int) -> Any:
    """`tree` after steps on images of ink and their digits, `drawn`."""
    images = (2 * drawn[0][:, None] - 1).astype(np.float32)  # (N, 1, 8, 8), from -1 to 1
    rng, losses = np.random.default_rng(0), []
    with progress(jax.random.split(jax.random.key(0), steps), name) as bar:
        for key in bar:
            rows = rng.integers(len(images), size=BATCH)
            prompts = PROMPTS[drawn[1][rows]]
            tree, state, loss = step(tree, state, base, images[rows], prompts, key)
            losses.append(float(loss))
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    return tree


@functools.partial(jax.jit, static_argnums=0)
def denoise(apply: Any, params: Any, x: Any, t: Any, after: Any, prompts: Any) -> jax.Array:
    """The noisy images at a time nearer to 0, by DDIM."""
    noise = apply(params, x, jnp.full(len(x), t), prompts)
    image = jnp.clip((x - jnp.sin(t * jnp.pi / 2) * noise) / jnp.cos(t * jnp.pi / 2), -1, 1)
    noise = (x - jnp.cos(t * jnp.pi / 2) * image) / jnp.sin(t * jnp.pi / 2)
    return mix(image, noise, after)


def sample(name: str, apply: Any, params: Any, digits: np.ndarray) -> np.ndarray:
    """Draws an image of each digit: ink, ``(N, 8, 8)``."""
    x = jax.random.normal(jax.random.key(1), (len(digits), 1, 8, 8))
    times = [*itertools.pairwise(jnp.linspace(0.98, 0, DENOISE + 1))]
    for t, after in progress(times, name):
        x = denoise(apply, params, x, t, after, PROMPTS[digits])
    return (np.clip(x[:, 0], -1, 1) + 1) / 2


# ---- what is seen, and the whole run ------------------------------------------------------------


class Seen(NamedTuple):
    """What images show: the share of digits that are read, the slant, the stripes."""

    read: float
    slant: float
    stripes: float


def make_reader(ink: np.ndarray, labels: np.ndarray) -> Callable[..., Seen]:
    """A function of images and their digits, with a classifier of digits in all styles."""
    styled = [ink, slant(ink), stripe(ink), stripe(slant(ink))]
    classifier = svm.SVC(C=10).fit(np.concatenate(styled).reshape(-1, 64), np.tile(labels, 4))

    def read(ink: np.ndarray, digits: np.ndarray) -> Seen:
        right = classifier.predict(ink.reshape(-1, 64)) == digits
        return Seen(float(right.mean()), measure_slant(ink), measure_stripes(ink))

    return read


def draw(path: pathlib.Path, rows: dict[str, np.ndarray]) -> None:
    """Writes a picture with two images of each digit for each name."""
    framed = [np.pad(x, ((0, 0), (1, 1), (1, 1))) for x in rows.values()]
    grids = [np.block([[*x[k::EACH]] for k in (0, EACH // 2)]) for x in framed]
    ink = np.pad(np.concatenate(grids), ((0, 0), (10, 0)))
    picture = Image.fromarray(np.uint8(255 - 255 * ink)).resize(6 * np.array(ink.T.shape), 0)
    for i, name in enumerate(rows):
        ImageDraw.Draw(picture).text((8, 120 * i + 54), name, fill=0)
    picture.save(path)


def run_in_diffusers(model: Any, values: Any, folder: pathlib.Path, arguments: Any) -> np.ndarray:
    """What diffusers computes with these values of the base and an adapter's file."""
    model.load_state_dict({k: torch.tensor(np.asarray(x)) for k, x in values.items()})
    model.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
    x, t, prompts = map(torch.tensor, arguments)
    with torch.no_grad():
        return model(x, 1000 * t, prompts).sample.numpy()


def learn(apply: Any, lora: Any, params: Any, example: Any, data: Any, args: Any) -> Any:
    """The base, trained on all images, and the adapters: none, one for each style, and both."""
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, args.steps))
    step = make_step(lambda params, _, *rest: apply(params, *rest), tx)
    params = train("base", step, params, tx.init(params), {}, data, args.steps)
    base, start = lora.init(jax.random.key(0), params, *example)
    tx = jlora.optimizer(optax.adam(optax.cosine_decay_schedule(3e-3, args.style_steps)))
    step = make_step(lambda adapter, base, *rest: lora.apply(base, adapter, *rest), tx)
    ink, labels = (x[data[1] < 5] for x in data)
    adapters = {"base": {}}
    for name, style in STYLES.items():
        few = style(ink), labels
        adapters[name] = train(name, step, start, tx.init(start), base, few, args.style_steps)
    adapters["both"] = arithmetic.add([adapters[name] for name in STYLES], weights=[1.0, 1.0])
    return base, adapters


def main(argv: Sequence[str] | None = None) -> tuple[dict[str, Seen], float]:
    """Runs the example; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--style-steps", type=int, default=STYLE_STEPS)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "Explicitly requested dtype int64")  # of PyTorch's indices
    print(f"{args.steps} steps; {STEPS} take five minutes of one CPU core", flush=True)

    pixels, labels = datasets.load_digits(return_X_y=True)
    ink = pixels.reshape(-1, 8, 8) / 16
    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET).eval()
    params, model_fn = jlora.torch.extract(model)
    apply = lambda p, x, t, prompts: model_fn(p, x, 1000 * t, prompts, return_dict=False)[0]  # noqa: E731
    lora = jlora.transform(apply, jlora.LoRA(rank=RANK))
    noise = np.random.default_rng(0).standard_normal((2, 1, 8, 8))
    example = np.float32(noise), np.float32([0.3, 0.9]), PROMPTS[:2]
    base, adapters = learn(apply, lora, params, example, (ink, labels), args)

    digits, read = np.repeat(np.arange(10), EACH), make_reader(ink, labels)
    rows = {k: sample(k, apply, jlora.merge(base, x), digits) for k, x in adapters.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "samples.png", rows)
    names = jlora.torch.names(lora.sites(params, *example), model_fn)
    for name in STYLES:
        shutil.rmtree(args.out / name, ignore_errors=True)  # of an earlier run
        written = base, adapters[name], names
        peft.save(args.out / name, *written, dialect="diffusers", prefix="unet")

    found = {name: read(x, digits) for name, x in rows.items()}
    found["data"] = read(stripe(slant(ink)), labels)  # what both would be at best
    print(f"{len(digits)} samples of each: digits read, slant, stripes")
    for name, x in found.items():
        print(f"  {name:<7} {x.read:4.0%}  {x.slant:5.2f}  {x.stripes:5.2f}")
    values = peft.to_tensors(base, names)
    theirs = run_in_diffusers(model, values, args.out / "slant", example)
    difference = float(abs(theirs - lora.apply(base, adapters["slant"], *example)).max())
    print(f"{args.out}: samples.png, {' and '.join(STYLES)} for diffusers, whose outputs with")
    print(f"the first differ from those here by at most {difference:.0e}")
    return found, difference


if __name__ == "__main__":
    main()
