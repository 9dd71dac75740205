"""Fine-tune a BERT encoder on product reviews with LoRA: train, save, merge, export.

    python examples/quickstart.py               # 40 seconds on two CPU cores, 90 on slow ones
    python examples/quickstart.py --steps 500 --rank 16 --out out/longer

MiniLM (22.7M parameters) learns whether a sentence of a product review is positive. First a
linear probe is fitted to the frozen encoder's features: it is the head that training starts from,
and the score before. Then the query and value kernels get low-rank factors, the head is trained in
full, everything else stays frozen. To be quick, the example leaves out long sentences.

The run writes what it trained to OUT/adapter, as an Orbax checkpoint, and the merged weights under
Hugging Face's names to OUT/merged. It replaces the files of an earlier run.

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
from progress import progress
from tokenizers import Tokenizer

import jlora
from jlora import checkpoint

RANK = 8
ALPHA = 16.0
LEARNING_RATE = 3e-3
WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 0.01
STEPS = 80
BATCH = 32
LENGTH = 48  # in tokens, of other examples: at most 4% of the sentences are longer, and cut
SHORT = 24  # in tokens: longer sentences, 35%, are left out
SOURCE = "products"
MARGIN = 0.8  # drops sentences rated within the middle fifth of the scale, as neutral: SST-2's rule
HELD_OUT = 1000
PROBED = 1600  # sentences that the probe is fitted to
RIDGE = 0.1
GAIN = 4.0  # logits of the probe over its predictions, which lie around -0.5 and 0.5
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


def keep_short(
    tokenizer: Tokenizer, snippets: Sequence[data.Snippet], length: int = SHORT
) -> list[data.Snippet]:
    """The sentences of at most `length` tokens."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch([snippet.text for snippet in snippets])
    pairs = zip(snippets, encodings, strict=True)
    return [snippet for snippet, encoding in pairs if len(encoding) <= length]


def take(batch: Any, rows: Any) -> Any:
    """The chosen rows of a batch, a NamedTuple of arrays."""
    return type(batch)(*(x[rows] for x in batch))


# ---- model --------------------------------------------------------------------------------------


def load(
    read: Callable[[pathlib.Path], tuple[bert.Config, dict[str, Any]]] = bert.load,
) -> tuple[bert.Bert, dict[str, Any], Tokenizer]:
    """MiniLM with a new head, its variables and its tokenizer; `read` takes it from its folder."""
    folder = data.minilm()
    config, variables = read(folder)
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
    """What the head of `model` looks at: ``(B, D)``."""
    mean = bert.pool(model.clone(classes=0).apply(variables, ids, mask), mask)
    return jax.nn.standardize(mean, epsilon=1e-6)


def fit_head(x: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """A head by ridge regression on features `x`, ``(N, D)``, to their labels: a linear probe."""
    mean, std = x.mean(0), x.std(0) + 1e-2  # some of MiniLM's features never vary
    z, y = (x - mean) / std, GAIN * (np.eye(2)[labels] - 0.5)  # (N, D), (N, 2)
    w = np.linalg.solve(z.T @ z + RIDGE * len(z) * np.eye(z.shape[1]), z.T @ y)  # (D, 2)
    kernel = w / std[:, None]
    bias = y.mean(0) - mean @ kernel
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def with_head(variables: dict[str, Any], head: dict[str, np.ndarray]) -> dict[str, Any]:
    """`variables` with another head."""
    return {**variables, "params": {**variables["params"], "classifier": head}}


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
    with progress(plan, "train") as bar:
        for rows in bar:
            adapter, state, loss = step(adapter, state, base, take(batch, rows))
            losses.append(float(loss))
            bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
    return adapter, losses


# ---- evaluation ---------------------------------------------------------------------------------


def outputs(fn: Callable[..., jax.Array], batch: Batch, name: str = "", size: int = 64) -> Any:
    """``fn(ids, mask)`` for all sentences, `size` at a time: ``(N, ...)``. `name` is shown."""
    n = len(batch.labels)
    rows = np.resize(np.arange(n), (-(-n // size), size))  # wraps around: one shape to compile
    bar = progress(rows, name, disable=not name)
    return np.concatenate([fn(batch.ids[chunk], batch.mask[chunk]) for chunk in bar])[:n]


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of sentences whose larger logit is that of their label."""
    return float((logits.argmax(-1) == labels).mean())


def count_bytes(folder: pathlib.Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
    before: float
    after: float
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
    print(f"{args.steps} steps; {STEPS} take 40 seconds on two cores, 90 on slow ones", flush=True)

    model, variables, tokenizer = load()
    parts = [keep_short(tokenizer, snippets) for snippets in data.snippets(SOURCE, MARGIN)]
    train_set, test_set = (encode(tokenizer, snippets, SHORT) for snippets in parts)
    test_set = take(test_set, slice(args.held_out))
    plan = draw(len(train_set.labels), args.steps, args.batch, args.seed)

    seen = take(train_set, np.unique(plan)[:PROBED])  # of the sentences that training gets
    encoder = functools.partial(features, model, variables)
    head = fit_head(outputs(encoder, seen, "probe, fit"), seen.labels)
    before = outputs(encoder, test_set, "probe, score") @ head["kernel"] + head["bias"]  # (N, 2)

    variables = with_head(variables, head)
    lora = adapt(model, args.rank)
    example = jax.ShapeDtypeStruct((args.batch, SHORT), jnp.int32)  # (B, L)
    print(lora.sites(variables, example, example), flush=True)
    base, adapter = lora.init(jax.random.key(args.seed), variables, example, example)
    adapter, losses = train(lora, base, adapter, train_set, plan)
    print(f"loss {losses[0]:.3f} at the first step, {np.mean(losses[-20:]):.3f} in the last 20")

    saved = args.out / "adapter"  # the rules and the base's shapes are saved too, and checked
    shutil.rmtree(saved, ignore_errors=True)  # of an earlier run
    checkpoint.save(saved, adapter, make_rules(args.rank), step=args.steps, base=base)
    adapter = checkpoint.restore(saved, like=adapter, base=base)
    after = outputs(functools.partial(jax.jit(lora.apply), base, adapter), test_set, "score")

    export(args.out / "merged", jlora.merge(base, adapter), model.config)
    _, params = bert.load(args.out / "merged")
    merged = outputs(functools.partial(jax.jit(model.apply), params), test_set, "score, merged")

    labels = test_set.labels
    majority = float(max(labels.mean(), 1 - labels.mean()))
    result = Result(majority, *(accuracy(x, labels) for x in (before, after, merged)))
    changed = int((merged.argmax(-1) != after.argmax(-1)).sum())
    sizes = (saved, args.out / "merged")
    adapter_mb, model_mb = (count_bytes(folder) / 1e6 for folder in sizes)
    print(f"""
right of {len(labels)} sentences held out
  the larger class     {result.majority:.1%}
  before, a probe      {result.before:.1%}  on the features of the frozen model
  after, restored      {result.after:.1%}  {jlora.count(adapter):,} parameters trained
  merged, loaded       {result.merged:.1%}  {changed} predictions changed
written
  {saved}: {adapter_mb:.1f} MB
  {args.out / "merged"}: {model_mb:.1f} MB
now right, before wrong""")
    learned = (after.argmax(-1) == labels) & (before.argmax(-1) != labels)
    for i in np.flatnonzero(learned)[:3]:
        print(f"  {('negative', 'positive')[labels[i]]}: {parts[1][i].text}")
    return result


if __name__ == "__main__":
    main()
