"""An adapter in memory, before it is written as PEFT's two files, or as one file of image LoRA."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from ..._folders import fresh, fresh_file
from .._file import CONFIG, DTYPES, TENSORS, TensorInfo, make_header
from .._recognized import IMAGE
from ._arranged import make_tensors
from ._config import dumps
from ._files import Files, as_files
from ._image import Image, check_dialect, decode, encode, refuse_mangled
from ._sorted import Parameters


class Draft(NamedTuple):
    """The contents of an adapter's files.

    Attributes:
        fields: the configuration.
        tensors: the tensors, by the keys of the dialect.
        prefix: the prefix of the keys, in other dialects than PEFT's.
        metadata: the texts in the header of the one file; None for PEFT's two files.
    """

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]
    prefix: str
    metadata: Mapping[str, str] | None

    def as_files(self, argument: str, modules: Collection[str]) -> Files:
        """Presents the draft as `open_adapter` would its files."""
        files = as_files(self.fields, self.tensors, argument)
        if self.metadata is None:
            return files
        image = Image(files.tensors, self.metadata, files.read, "the file", argument, True)
        return decode(image, (), self.prefix, modules)

    def write(self, path: str | os.PathLike[str], argument: str) -> None:
        """Writes the files to a new folder `path`, or to a new file in other dialects."""
        if self.metadata is not None and Path(path).suffix == ".safetensors":
            with fresh_file(path, argument) as file:
                self._write_one(file)
            return
        with fresh(path, argument) as folder:
            if self.metadata is not None:
                self._write_one(folder / IMAGE)
                return
            save_file(self.tensors, folder / TENSORS, metadata={"format": "pt"})
            # As bytes, as text would get other line ends on Windows.
            (folder / CONFIG).write_bytes(dumps(self.fields).encode())

    def _write_one(self, path: Path) -> None:
        """Writes one file; safetensors would write the texts of its header in any order."""
        types = {dtype: name for name, dtype in DTYPES.items()}
        infos = [TensorInfo(key, types[x.dtype], x.shape) for key, x in self.tensors.items()]
        header, start = make_header(infos, self.metadata or {})
        with open(path, "wb") as file:
            file.write(start)
            for key in header.entries:
                file.write(self.tensors[key].tobytes())


def make_draft(
    fields: dict[str, Any],
    own: Parameters,
    tied: Mapping[str, str],
    dialect: str,
    prefix: str | None,
) -> Draft:
    """Makes the files of an adapter in a dialect."""
    prefix = check_dialect(dialect, prefix)
    if dialect != "kohya":
        refuse_mangled(part.key for part in own.parts)
    if dialect == "peft":
        return Draft(fields, make_tensors(fields, own, tied), prefix, None)
    metadata, tensors = encode(dialect, prefix, fields, own)
    return Draft(fields, tensors, prefix, metadata)
