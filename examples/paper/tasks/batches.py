"""Batches for training and evaluation with `grain`.

    train = batches(rows, 16, (64, 128, 256), seed=0, epochs=30)
    for step in range(len(train)):
        state = train_step(state, train[step])

Batch `step` is a function of the rows, the seed and the step: a run that resumes goes on where it
was. Every epoch has another order, and every row once. Batches have few shapes, so that few
programs are compiled: sequences are padded to the first of the lengths that holds the longest, and
the last batch of an epoch is filled up with rows of weight 0.
"""

from collections.abc import Mapping, Sequence

import grain
import numpy as np

from .encoding import Row

Batch = dict[str, np.ndarray]


def batches(
    rows: Sequence[Row],
    size: int,
    lengths: Sequence[int],
    *,
    seed: int | None = None,
    epochs: int = 1,
    pads: Mapping[str, int] | None = None,
) -> "grain.MapDataset[Batch]":
    """The batches of all epochs, by number.

    Args:
        rows: dicts with ``ids``, (tokens,), others of that shape, and scalars.
        size: rows in a batch.
        lengths: to pad to; the last is the most tokens of a row.
        seed: of the order; None keeps the rows as they are, for evaluation.
        epochs: how often the rows come.
        pads: what to pad sequences with, by name; else 0.

    Returns:
        Dicts with the names of the rows, ``(size, length)`` or ``(size,)``, and with ``mask``,
        (size, length) int32, 1 where there is a token, and ``weight``, (size,) float32, 0 for rows
        that fill up.

    Raises:
        ValueError: there are no rows, or one does not fit.

    Example:
        >>> rows = [{"ids": np.arange(n), "label": np.array(n)} for n in (3, 5, 2)]
        >>> first, second = batches(rows, 2, (4, 8))
        >>> first["ids"].shape, second["ids"].shape, second["weight"].tolist()
        ((2, 8), (2, 4), [1.0, 0.0])
    """
    lengths = sorted(lengths)
    longest = max((len(row["ids"]) for row in rows), default=None)
    if longest is None:
        raise ValueError("`rows` is empty")
    if longest > lengths[-1]:
        raise ValueError(f"`lengths`: a row has {longest} tokens, the last length is {lengths[-1]}")

    def collate(several: Sequence[Row]) -> Batch:
        return _collate(several, size, lengths, pads or {})

    data = grain.MapDataset.source(rows)
    if seed is not None:
        data = data.seed(seed).shuffle()
    return data.batch(size, batch_fn=collate).repeat(epochs)


def _collate(
    rows: Sequence[Row], size: int, lengths: Sequence[int], pads: Mapping[str, int]
) -> Batch:
    weight = np.array([1.0] * len(rows) + [0.0] * (size - len(rows)), np.float32)
    rows = [*rows, *[rows[0]] * (size - len(rows))]
    masks = [np.ones(len(row["ids"]), np.int32) for row in rows]
    length = next(n for n in lengths if n >= max(map(len, masks)))

    def stack(values: Sequence[np.ndarray], pad: int) -> np.ndarray:
        if values[0].ndim:
            values = [np.pad(x, (0, length - len(x)), constant_values=pad) for x in values]
        return np.stack(values)

    batch = {name: stack([row[name] for row in rows], pads.get(name, 0)) for name in rows[0]}
    return {**batch, "mask": stack(masks, 0), "weight": weight}
