"""Converts a quantized checkpoint to one in floats."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from ..._folders import fresh
from .._checkpoint import INDEX, Checkpoint, open_checkpoint
from .._file import itemize, shorten
from ._codes import Codes, Dense
from ._copy import copy_others, write_json
from ._format import Format, open_format, read_checked
from ._tensors import Unreadable, list_left


class Matrix(NamedTuple):
    """A quantized tensor of a checkpoint.

    Attributes:
        name: the tensor.
        shape: its shape.
        scheme: what it is in, in words.
        size: the bytes that it takes.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    size: int


def matrices(path: str | os.PathLike[str]) -> list[Matrix]:
    """Lists the quantized tensors of a checkpoint; a checkpoint in floats has none.

    Args:
        path: a folder in a format that `load_base` reads.

    Raises:
        FileNotFoundError: if there is no such folder, or a file is missing.
        ValueError: if the checkpoint is damaged.
    """
    format = open_format(open_checkpoint(path, "path", follow_links=True))
    with _errors_about("path"):
        names = dict.fromkeys(format.find())
        return [_matrix(name, read_checked(format, name, jnp.float32)) for name in names]


def dequantize_checkpoint(
    src_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    follow_links: bool = False,
) -> list[Matrix]:
    """Writes a quantized Hugging Face checkpoint with its weights in floats, exactly.

    Args:
        src_dir: a folder in a format that `load_base` reads.
        out: a folder that does not exist yet, or an empty one. It appears complete or not at
            all; its configuration no longer says that it is quantized.
        follow_links: whether files of `src_dir` may be links out of it.

    Returns:
        The tensors that were quantized.

    Raises:
        FileExistsError: if `out` is there and not an empty folder.
        ValueError: if the checkpoint is damaged, or not quantized.
    """
    checkpoint = open_checkpoint(src_dir, follow_links=follow_links, copied=True)
    if not checkpoint.quantization:
        raise ValueError(
            f"`src_dir`: {checkpoint.source.folder} is not quantized; use it as it is."
        )
    format, dtype = open_format(checkpoint), _float_dtype(checkpoint)
    found = list[Matrix]()
    places: dict[str, str | None] = {}  # the weight in whose place a tensor is read, if any
    with _errors_about("src_dir"):
        for name in dict.fromkeys(format.find()):
            found.append(_matrix(name, read_checked(format, name, dtype)))
            new = sorted(format.tensors.taken - places.keys())
            places |= dict.fromkeys(new) | {new[0]: name}
        left = list_left(format.tensors, places)
        if left or not found:
            method = shorten(checkpoint.quantization.get("quant_method"))
            what = "these tensors were not read" if left else "no weight of it is"
            raise ValueError(
                f"`src_dir`: {checkpoint.source.folder} is quantized by {method}, as its "
                f"config.json says, but {what}. Give the checkpoint that it was made of, or take "
                "out what is not of it." + (f" {itemize(left)}" if left else "")
            )
        _write(checkpoint, format, out, places, dtype)
    return found


def _matrix(name: str, x: Codes | Dense) -> Matrix:
    return Matrix(name, x.shape, x.spelling, x.nbytes)


@contextlib.contextmanager
def _errors_about(argument: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as e:
        raise ValueError(f"`{argument}`: {e}.") from None


def _float_dtype(checkpoint: Checkpoint) -> Any:
    """Returns the dtype of floats by the configuration; bfloat16 if it names none."""
    config = checkpoint.config
    dtype = config.get("dtype", config.get("torch_dtype"))
    return jnp.dtype(dtype if dtype in ("float32", "float16") else "bfloat16")


def _write(
    checkpoint: Checkpoint,
    format: Format,
    out: str | os.PathLike[str],
    places: Mapping[str, str | None],
    dtype: Any,
) -> None:
    """Writes file by file: weights in the `places` of tensors, and the others."""
    total = sum(header.size for header in checkpoint.headers.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="dequantize", disable=None)
    weight_map, size = {}, 0
    with fresh(out, "`out`") as folder, bar:
        for file, header in checkpoint.headers.items():
            written: dict[str, np.ndarray] = {}
            with tempfile.TemporaryFile(dir=folder) as disk:
                for name, entry in header.entries.items():
                    if name not in places:
                        written[name] = _map_to_disk(format.tensors.as_stored(name), disk)
                    elif weight := places[name]:
                        values = _values(format, weight, dtype)
                        written[weight] = _map_to_disk(values, disk)
                    bar.update(entry.stop - entry.start)
                save_file(written, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(written, file)
            size += sum(x.nbytes for x in written.values())
        copy_others(checkpoint, folder)
        if INDEX in checkpoint.kept:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(folder / INDEX, index)


def _values(format: Format, name: str, dtype: Any) -> np.ndarray:
    x = read_checked(format, name, dtype)
    w = np.asarray(x.array(x.dtype or dtype))
    return w if w.ndim == 2 or format.keeps_axes else w.swapaxes(-1, -2)


def _map_to_disk(x: np.ndarray, file: BinaryIO) -> np.ndarray:
    """Maps an array from the end of a file: the writer of safetensors wants all at once."""
    if not x.size:  # nothing can be mapped
        return x
    start = file.seek(0, os.SEEK_END)
    file.write(x.tobytes())
    file.flush()
    return np.memmap(file, x.dtype, "r", start, x.shape)
