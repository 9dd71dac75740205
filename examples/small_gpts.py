"""GPTs of any width and depth, pretrained here on the glosses of WordNet.

    config, variables = small_gpts.load(width=128, depth=4)    # minutes, the first time
    train, test = small_gpts.bible()                           # another text in their tokens

Pretraining takes minutes of a core, an hour at a width of 512. It goes on where it ended;
`$XDG_CACHE_HOME/jlora` keeps what it makes.
"""

import functools
from typing import Any

import data
import flax.linen as nn
import flax.serialization
import jax
import numpy as np
import optax
from models import gpt
from progress import progress
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

VOCAB, LENGTH, HEAD = 1024, 64, 32  # tokens, of a row; the size of a head
STEPS, BATCH, KEEP = 2000, 32, 100  # of pretraining; its state is kept every so many
END = "<end>"  # of each text
WARMUP = 50


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte pairs, by the frequencies of the glosses."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": VOCAB, "special_tokens": [END], "initial_alphabet": alphabet}
    found.train_from_iterator(data.glosses()[0], trainers.BpeTrainer(**how, show_progress=False))
    return found


@functools.cache
def glosses() -> tuple[np.ndarray, np.ndarray]:
    """The text of pretraining: rows for training and for testing, each ``(N, LENGTH)``."""
    train, test = data.glosses()
    return _cut(train), _cut(test)


@functools.cache
def bible() -> tuple[np.ndarray, np.ndarray]:
    """Another text in rows, for training and for testing."""
    train, test = data.verses()
    return _cut(train), _cut(test)


def _cut(texts: list[str]) -> np.ndarray:
    end = tokenizer().token_to_id(END)
    ids = [i for found in tokenizer().encode_batch(texts) for i in (*found.ids, end)]
    count = len(ids) // LENGTH
    return np.array(ids[: count * LENGTH], np.int32).reshape(count, LENGTH)


def make_config(width: int, depth: int) -> gpt.Config:
    """The sizes of a GPT; its heads have 32 entries at any width."""
    heads = width // HEAD
    return gpt.Config(VOCAB, LENGTH, layers=depth, dim=width, heads=heads, dropout=0.0)


def next_token_loss(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The cross-entropy of each token after the first, in nats: ``(B, L - 1)``."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])


@functools.lru_cache(1)
def load(width: int, depth: int) -> tuple[gpt.Config, dict[str, Any]]:
    """A GPT's sizes and its parameters after pretraining, which goes on where it ended."""
    config, folder = make_config(width, depth), data.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    model = gpt.GPT(config)
    train, _ = glosses()
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3 * (128 / width) ** 0.5, WARMUP, STEPS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss = lambda params: next_token_loss(model.apply(params, ids), ids).mean()  # noqa: E731
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), train[:1]))
    state, begun, path = tx.init(params), 0, folder / f"gpt-{width}x{depth}.msgpack"
    if path.exists():
        kept = flax.serialization.from_bytes((params, state, begun, 0.0), path.read_bytes())
        params, state, begun, _ = kept
    order = np.random.default_rng(0).permutation(len(train) // BATCH * BATCH).reshape(-1, BATCH)
    for i in progress(range(begun, STEPS), leave=False, desc=f"GPT {width} x {depth}"):
        params, state, loss = step(params, state, train[order[i % len(order)]])
        if (i + 1) % KEEP == 0:
            content = flax.serialization.to_bytes((params, state, i + 1, float(loss)))
            (folder / f"{path.name}.part").write_bytes(content)
            (folder / f"{path.name}.part").rename(path)
            progress.write(f"GPT {width} x {depth}: step {i + 1}, loss {loss:.3f}")
    return config, jax.tree.map(np.asarray, params)
