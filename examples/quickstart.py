"""Fine-tune a BERT encoder on movie reviews with LoRA: train, save, merge, export.

    python examples/quickstart.py               # three minutes on two CPU cores
    python examples/quickstart.py --steps 500 --rank 16 --out out/longer

MiniLM (22.7M parameters) learns whether a sentence of a movie review is positive. The query and
value kernels get low-rank factors, the head is trained in full, everything else stays frozen. The
result is compared with the best that can be had without fine-tuning, a linear probe on the frozen
features. OUT/adapter then holds what was trained, for Orbax, and OUT/merged the adapted model as an
ordinary Hugging Face checkpoint.

Letters in the shapes: N sentences, B sentences in a batch, L tokens, D hidden size.
"""

import argparse
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from models import bert
from tokenizers import Tokenizer
from tqdm import tqdm

import jlora

RANK = 8
ALPHA = 16.0
LEARNING_RATE = 3e-3
WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 0.01
STEPS = 150
BATCH = 32
LENGTH = 48  # in tokens; 4% of the sentences are longer and cut
MARGIN = 0.8  # drops sentences rated within the middle fifth of the scale, as neutral: SST-2's rule
HELD_OUT = 1000
RIDGE = 0.1
SEED = 0
OUT = pathlib.Path("out/quickstart")


class Batch(NamedTuple):
    """Encoded sentences."""

    ids: np.ndarray  # (N, L)
    mask: np.ndarray  # (N, L)
    labels: np.ndarray  # (N,)


def encode(tokenizer: Tokenizer, snippets: Sequence[data.Snippet]) -> Batch:
    """Sentences as token ids, all padded to the same length."""
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encodings = tokenizer.encode_batch([snippet.text for snippet in snippets])
    ids = np.array([encoding.ids for encoding in encodings])
    mask = np.array([encoding.attention_mask for encoding in encodings])
    return Batch(ids, mask, np.array([snippet.label for snippet in snippets]))


# ---- training -----------------------------------------------------------------------------------


def train(
    lora: jlora.Transformed, base: Any, adapter: Any, batch: Batch, *, steps: int, size: int, seed: int
) -> Iterator[tuple[float, Any]]:
    """Yields the loss and the new adapter of each step."""
    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, int(WARMUP * steps), steps)
    tx = jlora.optimizer(optax.adamw(schedule, weight_decay=WEIGHT_DECAY))

    def loss_fn(adapter, base, batch):
        logits = lora.apply(base, adapter, batch.ids, batch.mask)  # (B, 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    @jax.jit
    def step(adapter, state, base, batch):
        loss, grads = jax.value_and_grad(loss_fn)(adapter, base, batch)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    state = tx.init(adapter)
    for chosen in draw(len(batch.labels), steps, size, seed):
        adapter, state, loss = step(adapter, state, base, Batch(*(x[chosen] for x in batch)))
        yield float(loss), adapter


def draw(n: int, steps: int, size: int, seed: int) -> np.ndarray:
    """Which of `n` sentences each step sees: one shuffle after the other, ``(steps, size)``."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(epochs)])
    return order[: steps * size].reshape(steps, size)


# ---- evaluation ---------------------------------------------------------------------------------


def outputs(fn: Callable[..., jax.Array], batch: Batch, size: int = 64) -> np.ndarray:
    """``fn(ids, mask)`` for all sentences, `size` at a time: ``(N, ...)``."""
    n = len(batch.labels)
    padded = np.resize(np.arange(n), -(-n // size) * size).reshape(-1, size)  # one shape for jit
    return np.concatenate([fn(batch.ids[rows], batch.mask[rows]) for rows in padded])[:n]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of sentences whose larger logit is that of their label."""
    return float((logits.argmax(-1) == labels).mean())


def probe(x: np.ndarray, labels: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Logits for ``x_test`` of a ridge regression fitted to features ``x`` of shape ``(N, D)``."""
    # MiniLM has three features that never vary: hence the epsilon.
    mean, std = x.mean(0), x.std(0) + 1e-3
    x, x_test = (x - mean) / std, (x_test - mean) / std
    y = np.eye(2)[labels] - 0.5  # (N, 2)
    w = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)  # (D, 2)
    return x_test @ w + y.mean(0)


# ---- checkpoints --------------------------------------------------------------------------------


def save(path: pathlib.Path, adapter: Any) -> None:
    """Writes the adapter, and nothing of the base, as an Orbax checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), adapter, force=True)


def restore(path: pathlib.Path, like: Any) -> Any:
    """Reads an adapter of the structure and shapes of `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), like)


def export(folder: pathlib.Path, params: Any, source: pathlib.Path) -> None:
    """Writes merged weights under Hugging Face's names, with the files that belong to them."""
    folder.mkdir(parents=True, exist_ok=True)
    bert.save(folder / "model.safetensors", params)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(source / name, folder / name)


# ---- the whole run ------------------------------------------------------------------------------


class Result(NamedTuple):
    """What `main` measured on the held-out sentences, and the adapter it trained."""

    majority: float
    probe: float
    lora: float
    merged: float
    losses: list[float]
    base: Any
    adapter: Any


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the example; `argv` are the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="sentences to test on")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    args = parser.parse_args(argv)

    folder = data.minilm()
    config, variables = bert.load(folder)
    variables = bert.add_head(variables, classes=2)
    model = bert.Bert(config, classes=2)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train_set, test_set = (encode(tokenizer, part) for part in data.movie_snippets(MARGIN))
    test_set = Batch(*(x[: args.held_out] for x in test_set))

    lora = jlora.transform(
        model.apply,
        jlora.LoRA(r"(query|value)/kernel", rank=args.rank, alpha=ALPHA),
        jlora.Full(r"classifier"),
    )
    example = jax.ShapeDtypeStruct((args.batch, LENGTH), jnp.int32)  # (B, L)
    print(lora.sites(variables, example, example))
    base, adapter = lora.init(jax.random.key(args.seed), variables, example, example)

    hidden = jax.jit(bert.Bert(config).apply)  # without the head
    features = lambda ids, mask: bert.pool(hidden(variables, ids, mask), mask)
    seen = np.unique(draw(len(train_set.labels), args.steps, args.batch, args.seed))
    x, x_test = outputs(features, Batch(*(x[seen] for x in train_set))), outputs(features, test_set)
    probed = accuracy(probe(x, train_set.labels[seen], x_test), test_set.labels)

    losses = []
    run = train(
        lora, base, adapter, train_set, steps=args.steps, size=args.batch, seed=args.seed
    )
    with tqdm(run, total=args.steps, desc="training", disable=None) as bar:
        for loss, adapter in bar:
            losses.append(loss)
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    ...


if __name__ == "__main__":
    main()
