"""A checkpoint whose tensors or configuration differ from those on disk."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from ._checkpoint import INDEX, Checkpoint
from ._file import DTYPES, Header, TensorInfo, make_header
from ._vocabulary import find_vocabulary


class Changed(Checkpoint):
    """A checkpoint with other headers and texts than the one that is stored.

    Attributes:
        stored: the checkpoint on disk.
        heads: the new headers, as bytes, of the files whose tensors change.
        texts: the new JSON of other files.
        origins: the tensors whose old values are those of another in `stored`, or None if they have
            no old values.
        values: the tensors whose old values are not in `stored`.
    """

    stored: Checkpoint
    heads: dict[str, bytes]
    texts: dict[str, Any]
    origins: dict[str, str | None]
    values: dict[str, np.ndarray]

    @classmethod
    def make(
        cls,
        stored: Checkpoint,
        files: Mapping[str, list[TensorInfo]],
        config: Mapping[str, Any],
    ) -> Self:
        """Makes a checkpoint with the tensors of each file, and a configuration."""
        headers, heads, where = dict[str, Header](), dict[str, bytes](), dict[str, str]()
        for file, entries in files.items():
            if entries == [*stored.headers[file].entries.values()]:
                headers[file] = stored.headers[file]
            elif entries:
                headers[file], heads[file] = make_header(entries)
            where |= dict.fromkeys((entry.key for entry in entries), file)
        texts: dict[str, Any] = {} if config == stored.config else {"config.json": config}
        if INDEX in stored.kept:
            every = [x for header in headers.values() for x in header.entries.values()]
            size = sum(x.stop - x.start for x in every)
            texts[INDEX] = {"metadata": {"total_size": size}, "weight_map": where}
        vocabulary = find_vocabulary(config, headers)
        fields = {"headers": headers, "where": where, "vocabulary": vocabulary, "config": config}
        found = cls(*stored._replace(**fields))
        found.stored, found.heads, found.texts = stored, heads, texts
        found.origins, found.values = {}, {}
        return found

    def copy_others(self, folder: Path) -> None:
        """Copies the other files of the checkpoint, and writes those that change."""
        self.stored.copy_others(folder)
        for name, value in self.texts.items():
            (folder / name).write_bytes(json.dumps(value, indent=2).encode())

    def head(self, file: str) -> bytes:
        """Returns the bytes of a safetensors file before its tensors."""
        return self.heads[file] if file in self.heads else self.stored.head(file)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Yields a file whose next bytes are the old values of a tensor."""
        origin = self.origins.get(name, name)
        if name in self.values:
            dtype = DTYPES[self.entry(name).dtype]
            yield io.BytesIO(self.values[name].astype(dtype).tobytes())
        elif origin is None:
            yield io.BytesIO()
        else:
            with self.stored.open(origin) as data:
                yield data


def change(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    *,
    prefix: str = "",
    resized: Mapping[str, tuple[int, ...]] = {},
    added: Mapping[str, tuple[TensorInfo, str | None]] = {},
) -> Changed:
    """Changes the tensors and the configuration of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        config: its new configuration.
        prefix: a prefix that all of its tensors get.
        resized: new shapes of some of its tensors.
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
    found = Changed.make(checkpoint, files, config)
    found.origins |= {prefix + name: name for name in checkpoint.where}
    found.origins |= {name: origin for name, (_, origin) in added.items()}
    return found
