"""Checkpoints whose tensors or configuration differ from those on disk."""

import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from ._checkpoint import Checkpoint, Opener
from ._file import DTYPES, FileHeader, TensorInfo, make_header


def rearrange(
    checkpoint: Checkpoint,
    files: Mapping[str, list[TensorInfo]],
    config: Mapping[str, Any],
    openers: Mapping[str, Opener],
) -> Checkpoint:
    """Returns the checkpoint with the tensors of each file, and with a configuration.

    Args:
        checkpoint: the checkpoint.
        files: the tensors of each file.
        config: the configuration.
        openers: the openers of the tensors that are not those of this name in `checkpoint`.
    """
    headers = dict[str, FileHeader]()
    where = dict[str, str]()
    for file, entries in files.items():
        if entries == [*checkpoint.headers[file].entries.values()]:
            headers[file] = checkpoint.headers[file]
        elif entries:
            # That of a quantized file describes its codes.
            metadata = {} if checkpoint.quantization else checkpoint.headers[file].metadata
            headers[file] = make_header(entries, metadata)
        where |= dict.fromkeys((entry.key for entry in entries), file)
    texts: dict[str, Any] = {} if config == checkpoint.config else {"config.json": config}
    if (index := checkpoint.names[1]) in checkpoint.kept:
        every = [x for header in headers.values() for x in header.entries.values()]
        size = sum(x.stop - x.start for x in every)
        texts[index] = {"metadata": {"total_size": size}, "weight_map": where}
    kept = {n: functools.partial(checkpoint.open, n) for n in where if n in checkpoint.where}
    return dataclasses.replace(
        checkpoint,
        headers=headers,
        where=where,
        config=config,
        texts={**checkpoint.texts, **texts},
        openers={**kept, **openers},
    )


def change(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    prefix: str = "",
    resized: Mapping[str, tuple[int, ...]] = {},
    added: Mapping[str, tuple[TensorInfo, str | None]] = {},
) -> Checkpoint:
    """Changes the tensors and the configuration of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        config: its new configuration.
        prefix: a prefix that all of its tensors get.
        resized: new shapes of some of its tensors, which then have no old values.
        added: new tensors by name, each with the tensor of `checkpoint` that has its old values, if
            any. It goes to the file of that tensor, or to the last file.
    """
    files = {
        file: [
            x._replace(key=prefix + x.key, shape=resized.get(x.key, x.shape))
            for x in header.entries.values()
        ]
        for file, header in checkpoint.headers.items()
    }
    for info, origin in added.values():
        files[checkpoint.where[origin] if origin else max(files)].append(info)
    origins = {prefix + n: None if n in resized else n for n in checkpoint.where}
    origins |= {name: origin for name, (_, origin) in added.items()}
    openers: dict[str, Opener] = {
        name: functools.partial(checkpoint.open, origin) if origin else io.BytesIO
        for name, origin in origins.items()
    }
    return rearrange(checkpoint, files, config, openers)


def with_values(checkpoint: Checkpoint, values: Mapping[str, np.ndarray]) -> Checkpoint:
    """Returns the checkpoint with other values of some tensors."""

    def open(name: str) -> io.BytesIO:
        return io.BytesIO(values[name].astype(DTYPES[checkpoint.entry(name).dtype]).tobytes())

    made = {name: functools.partial(open, name) for name in values}
    return dataclasses.replace(checkpoint, openers={**checkpoint.openers, **made})
