"""What the processes of torch and of JAX share: sizes, batch, and how they take orders."""

import json
import sys
from collections.abc import Callable, Mapping

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


def serve(facts: dict, programs: Mapping[str, Callable[[], float]]) -> None:
    """Prints the facts; then, for each line `NAME COUNT`, the seconds of so many steps."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        name, count = line.split()
        print(json.dumps({"seconds": [programs[name]() for _ in range(int(count))]}), flush=True)
