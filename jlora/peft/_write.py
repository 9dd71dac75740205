"""Writes a checkpoint with the tensors of another, edited, in several threads."""

import functools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from .._progress import progress
from ._checkpoint import Checkpoint, read_pieces
from ._file import COUNTS, DTYPES, TensorInfo

THREADS = min(os.cpu_count() or 1, 4)  # each keeps a block in memory


class Edit(Protocol):
    """Computes the new values of a tensor from the old ones."""

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields the new values in any dtype. The next bytes of `data` are the old values."""
        ...


def write_tensors(
    checkpoint: Checkpoint, folder: Path, edits: Mapping[str, Edit], title: str
) -> dict[str, int]:
    """Writes the edited tensors of a checkpoint, and its other files, to `folder`.

    Returns:
        The number of values that are not finite, for each edited tensor with such values.
    """
    for file, header in checkpoint.headers.items():
        (folder / file).write_bytes(header.start)
    names = checkpoint.where
    write = functools.partial(_write, checkpoint, folder, edits)
    with ThreadPoolExecutor(THREADS) as pool:
        counts = progress(pool.map(write, names), title, len(names), unit="tensor")
        found = dict(zip(names, counts, strict=True))
    checkpoint.copy_others(folder)
    return {name: count for name, count in found.items() if count}


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is counted
def _write(checkpoint: Checkpoint, folder: Path, edits: Mapping[str, Edit], name: str) -> int:
    file = checkpoint.where[name]
    entry = checkpoint.entry(name)
    bad = 0
    with checkpoint.open(name) as data, open(folder / file, "rb+") as target:
        target.seek(len(checkpoint.headers[file].start) + entry.start)
        if (edit := edits.get(name)) is None:
            for piece in read_pieces(data, entry.stop - entry.start):
                target.write(piece)
        else:
            for block in edit.blocks(data, entry):
                piece, count = encode(block, (DTYPES | COUNTS)[entry.dtype])
                target.write(piece)
                bad += count
    return bad


def encode(x: np.ndarray, dtype: np.dtype) -> tuple[memoryview, int]:
    """Returns numbers as bytes of a dtype, and how many of them are not finite."""
    x = np.ascontiguousarray(x, dtype).reshape(-1)
    bad = 0
    if dtype.kind != "i":  # all exponent bits are 1
        whole = np.dtype(f"u{dtype.itemsize}")
        infinite = np.full(1, np.inf, dtype).view(whole)
        bad = int(np.count_nonzero(x.view(whole) & infinite == infinite))
    return x.view(np.uint8).data, bad
