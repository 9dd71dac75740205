"""What the processes of torch and of JAX share: sizes and a batch."""

import numpy as np

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
}
BATCH, LENGTH = 32, 48
RANK, ALPHA = 8, 16


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and mask (BATCH, LENGTH), and targets of the hidden states."""
    random = np.random.default_rng(0)
    ids = random.integers(SIZES["vocab_size"], size=(BATCH, LENGTH))
    lengths = random.integers(LENGTH // 2, LENGTH + 1, size=(BATCH, 1))
    mask = (np.arange(LENGTH) < lengths).astype(int)
    return ids, mask, random.normal(size=(BATCH, LENGTH, SIZES["hidden_size"])).astype(np.float32)
