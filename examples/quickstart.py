"""Fine-tune a BERT encoder on movie reviews with LoRA: train, save, merge, export.

    python examples/quickstart.py               # three minutes on two CPU cores
    python examples/quickstart.py --steps 500 --rank 16 --out out/longer

MiniLM (22.7M parameters) learns whether a sentence of a movie review is positive. The query and
value kernels get low-rank factors, the head is trained in full, everything else stays frozen. The
result is compared with a linear probe on the frozen encoder's features. The run writes what it
trained to OUT/adapter, as an Orbax checkpoint, and the merged weights under Hugging Face's names to
OUT/merged; it replaces the files of an earlier run.

Letters in the shapes: N sentences, B sentences in a batch, L tokens, D hidden size.
"""

import argparse
import functools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from models import bert
from tokenizers import Tokenizer
from tqdm import tqdm

import jlora
from jlora import checkpoint

RANK = 8
ALPHA = 16.0
LEARNING_RATE = 3e-3
WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 0.01
STEPS = 300
BATCH = 32
LENGTH = 48  # in tokens; at most 4% of the sentences are longer, and cut
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


def encode(tokenizer: Tokenizer, snippets: Sequence[data.Snippet], length: int = LENGTH) -> Batch:
    """Sentences as token ids, all cut or padded to the same length."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encodings = tokenizer.encode_batch([snippet.text for snippet in snippets])
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    mask = np.array([encoding.attention_mask for encoding in encodings], np.int32)
    return Batch(ids, mask, np.array([snippet.label for snippet in snippets], np.int32))


def take(batch: Any, rows: Any) -> Any:
    """The chosen rows of a batch, a NamedTuple of arrays."""
    return type(batch)(*(x[rows] for x in batch))


# ---- model --------------------------------------------------------------------------------------


def load() -> tuple[bert.Bert, dict[str, Any], Tokenizer]:
    """MiniLM with a new head, its variables and its tokenizer."""
    folder = data.minilm()
    config, variables = bert.load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return bert.Bert(config, classes=2), bert.add_head(variables, classes=2), tokenizer


def make_rules(rank: int) -> tuple[jlora.LoRA, jlora.Full]:
    """Low-rank factors on queries and values, and a trainable head."""
    return jlora.LoRA(r"(query|value)/kernel", rank=rank, alpha=ALPHA), jlora.Full(r"classifier")


def adapt(model: bert.Bert, rank: int = RANK) -> jlora.types.Transformed:
    """`model`, adapted."""
    return jlora.transform(model.apply, *make_rules(rank))


@functools.partial(jax.jit, static_argnums=0)
def features(model: bert.Bert, variables: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """What the head of `model` would look at: ``(B, D)``."""
    return bert.pool(model.clone(classes=0).apply(variables, ids, mask), mask)


# ---- training -----------------------------------------------------------------------------------


def draw(n: int, steps: int, size: int, seed: int) -> np.ndarray:
    """Which of `n` sentences each step sees: one shuffle after the other, ``(steps, B)``."""
    rng = np.random.default_rng(seed)
    shuffles = [rng.permutation(n) for _ in range(-(-steps * size // n))]
    return np.concatenate(shuffles)[: steps * size].reshape(steps, size)


def train(
    lora: jlora.types.Transformed,
    base: Any,
    adapter: Any,
    batch: Batch,
    plan: np.ndarray,
    watch: Callable[[int, Any], None] = lambda step, adapter: None,
) -> tuple[Any, list[float]]:
    """The adapter after training on the rows of `plan`, and the loss of each step."""
    steps = len(plan)
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

    state, losses = tx.init(adapter), []
    with tqdm(plan, disable=None) as bar:  # None: no bar where nobody looks
        for rows in bar:
            adapter, state, loss = step(adapter, state, base, take(batch, rows))
            losses.append(float(loss))
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
            watch(len(losses), adapter)
    return adapter, losses


# ---- evaluation ---------------------------------------------------------------------------------


def outputs(fn: Callable[..., jax.Array], batch: Batch, size: int = 64) -> np.ndarray:
    """``fn(ids, mask)`` for all sentences, `size` at a time: ``(N, ...)``."""
    n = len(batch.labels)
    rows = np.resize(np.arange(n), (-(-n // size), size))  # wraps around: one shape to compile
    return np.concatenate([fn(batch.ids[chunk], batch.mask[chunk]) for chunk in rows])[:n]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of sentences whose larger logit is that of their label."""
    return float((logits.argmax(-1) == labels).mean())


def probe(x: np.ndarray, labels: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Logits for `x_test` of a ridge regression on features `x`, ``(N, D)``, to their labels."""
    mean, std = x.mean(0), x.std(0) + 1e-3  # three of MiniLM's features never vary
    x, x_test = (x - mean) / std, (x_test - mean) / std
    y = np.eye(2)[labels] - 0.5  # (N, 2)
    w = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)  # (D, 2)
    return x_test @ w + y.mean(0)


# ---- export -------------------------------------------------------------------------------------


def export(folder: pathlib.Path, params: Any, config: bert.Config) -> None:
    """Writes merged weights under Hugging Face's names, with the files that belong to them."""
    folder.mkdir(parents=True, exist_ok=True)
    bert.save(folder / "model.safetensors", params, config)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(data.minilm() / name, folder / name)


# ---- the whole run ------------------------------------------------------------------------------


class Result(NamedTuple):
    """What `main` measured on the held-out sentences."""

    majority: float
    probe: float
    lora: float
    merged: float


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

    model, variables, tokenizer = load()
    train_set, test_set = (encode(tokenizer, part) for part in data.movie_snippets(MARGIN))
    test_set = take(test_set, slice(args.held_out))
    plan = draw(len(train_set.labels), args.steps, args.batch, args.seed)

    lora = adapt(model, args.rank)
    example = jax.ShapeDtypeStruct((args.batch, LENGTH), jnp.int32)  # (B, L)
    print(lora.sites(variables, example, example))
    base, adapter = lora.init(jax.random.key(args.seed), variables, example, example)

    share = test_set.labels.mean()
    majority = float(max(share, 1 - share))
    seen = take(train_set, np.unique(plan))  # the probe gets the sentences that training gets
    encoder = functools.partial(features, model, variables)
    probed = accuracy(
        probe(outputs(encoder, seen), seen.labels, outputs(encoder, test_set)), test_set.labels
    )

    adapter, losses = train(lora, base, adapter, train_set, plan)
    print(f"loss {losses[0]:.3f} at the first step, {np.mean(losses[-20:]):.3f} in the last 20")

    saved = args.out / "adapter"  # the rules and the base's shapes are saved too, and checked
    shutil.rmtree(saved, ignore_errors=True)  # of an earlier run
    checkpoint.save(saved, adapter, make_rules(args.rank), step=args.steps, base=base)
    adapter = checkpoint.restore(saved, like=adapter, base=base)
    adapted = outputs(functools.partial(jax.jit(lora.apply), base, adapter), test_set)  # (N, 2)

    export(args.out / "merged", jlora.merge(base, adapter), model.config)
    _, params = bert.load(args.out / "merged")
    merged = outputs(functools.partial(jax.jit(model.apply), params), test_set)  # (N, 2)

    result = Result(majority, probed, *(accuracy(x, test_set.labels) for x in (adapted, merged)))
    print(f"accuracy on {len(test_set.labels)} held-out sentences")
    print(f"  majority class        {result.majority:.1%}")
    print(f"  frozen, linear probe  {result.probe:.1%}")
    print(f"  LoRA, restored        {result.lora:.1%}  {jlora.count(adapter):,} parameters trained")
    print(f"  LoRA, merged          {result.merged:.1%}  {args.out / 'merged'}")
    changed = int((merged.argmax(-1) != adapted.argmax(-1)).sum())
    print(f"merging changed {changed} predictions, logits by {np.abs(merged - adapted).max():.0e}")
    return result


if __name__ == "__main__":
    main()
