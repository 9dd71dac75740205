"""What the processes of torch and of JAX share: the sizes of a Llama, and of what is measured."""

from typing import NamedTuple

RANK, ALPHA = 16, 32
ROPE = 500_000.0  # the base of the angles


class Work(NamedTuple):
    """A model and steps.

    Attributes:
        layers: how many.
        dim: d.
        hidden: d of the perceptron.
        heads: heads of queries.
        groups: heads of keys and values.
        vocab: tokens that there are.
        batch: rows.
        length: tokens of a row.
        warm_up: steps before those that are timed.
        steps: that are timed.
    """

    layers: int
    dim: int
    hidden: int
    heads: int
    groups: int
    vocab: int
    batch: int
    length: int
    warm_up: int
    steps: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    @property
    def parameters(self) -> int:
        """All of the model."""
        d, keys = self.dim, self.dim // self.heads * self.groups
        layer = 2 * d * d + 2 * d * keys + 3 * d * self.hidden + 2 * d
        return self.layers * layer + 2 * self.vocab * d + d


LLAMA = Work(32, 4096, 14336, 32, 8, 128_256, 2, 4096, warm_up=5, steps=20)  # 3, of 8B
QUICK = Work(2, 64, 128, 4, 2, 128, 2, 32, warm_up=1, steps=1)
