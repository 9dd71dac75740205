"""Converts a quantized checkpoint to floats."""

import contextlib
import functools
import io
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ..._errors import InputError, shorten
from ..._folders import fresh
from .._changed import rearrange
from .._checkpoint import Checkpoint, explain_shorter, open_checkpoint
from .._file import DTYPES, TensorInfo
from .._write import write_tensors
from ..places._declared import find_transposed
from ..places._views import last_of
from ._codes import Codes, Dense
from ._format import Unreadable, list_left, open_format, read_checked


class Matrix(NamedTuple):
    """A quantized tensor of a checkpoint.

    Attributes:
        name: its name.
        shape: the shape of the weight.
        scheme: its scheme, in words.
        size: the bytes of its codes and scales.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    size: int


def matrices(path: str | os.PathLike[str]) -> list[Matrix]:
    r"""Lists the quantized tensors of a checkpoint.

    Args:
        path: a folder in a format that `load_base` reads.

    Returns:
        A `Matrix` for each quantized tensor; an empty list for a checkpoint in floats.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the checkpoint is damaged.
    """
    format = open_format(open_checkpoint(path, follow_links=True))
    with _errors_about("path"):
        names = dict.fromkeys(format.find())
        return [_matrix(name, read_checked(format, name, jnp.float32)) for name in names]


def dequantize_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    follow_links: bool = False,
) -> list[Matrix]:
    """Writes a quantized Hugging Face checkpoint with its weights in floats, exactly.

    Quantized weights get the dtype that their file stores (4-bit bitsandbytes), or else the `dtype`
    of `config.json` if it is float32 or float16, or else bfloat16. They are dequantized one at a
    time. The new `config.json` has no `quantization_config`.

    Args:
        path: a folder in a format that `load_base` reads.
        out: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        follow_links: whether files of `path` may be links out of it. Their content is copied.

    Returns:
        A `Matrix` for each tensor that was quantized.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        FileNotFoundError: if the folder or a file is missing.
        OSError: if `out` cannot be written. Nothing is left of it then.
        ValueError: if the checkpoint is damaged, or not quantized.

    Examples:
        >>> import json, pathlib, tempfile, numpy as np
        >>> from jlora import peft
        >>> from safetensors.numpy import load_file, save_file
        >>> codes = {"up.weight": np.full((3, 4), 127, np.int8), "up.SCB": np.ones(3, np.float32)}
        >>> config = {"quantization_config": {"quant_method": "bitsandbytes"}, "dtype": "float32"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base = pathlib.Path(folder, "base")
        ...     base.mkdir()
        ...     _ = (base / "config.json").write_text(json.dumps(config))
        ...     save_file(codes, base / "model.safetensors")
        ...     [matrix] = peft.dequantize_checkpoint(base, f"{folder}/floats")
        ...     weights = load_file(f"{folder}/floats/model.safetensors")
        >>> matrix.name, matrix.shape, weights["up.weight"].dtype, weights["up.weight"].max()
        ('up.weight', (3, 4), dtype('float32'), np.float32(1.0))
    """
    checkpoint = open_checkpoint(path, follow_links=follow_links, copied=True)
    if not checkpoint.quantization:
        source = checkpoint.source
        raise source.error(f"{source.folder} is not quantized. Use it directly.")
    dense, matrices = dequantized(checkpoint)
    with fresh(out, "out") as folder:
        write_tensors(dense, folder, {}, "dequantize")
    return matrices


@contextlib.contextmanager
def _errors_about(argument: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as e:
        raise InputError(argument, "cannot be read.", problems=[e.problem]) from None


@_errors_about("path")
def dequantized(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Matrix]]:
    """Checks all codes of a quantized checkpoint, and presents it in floats.

    A tensor is dequantized when it is opened. Only one is at a time, to save memory.

    Raises:
        ValueError: if the checkpoint is damaged, or has codes that the format does not read.
    """
    dtype = _float_dtype(checkpoint)
    transposed = find_transposed(checkpoint.config) or ()
    format = open_format(checkpoint)
    turned = set[str]()  # whose inputs are before outputs in floats
    matrices = dict[str, Matrix]()
    # Each tensor that is read, with the weight that is written for it, if any.
    places: dict[str, TensorInfo | None] = {}
    for name in dict.fromkeys(format.find()):
        x = read_checked(format, name, dtype)
        matrices[name] = _matrix(name, x)
        *lead, rows, columns = x.shape
        if not format.keeps_axes if lead else last_of(name) in transposed:
            turned |= {name}
        order = (columns, rows) if name in turned else (rows, columns)
        spelling = next(key for key, known in DTYPES.items() if known == (x.dtype or dtype))
        weight = TensorInfo(name, spelling, (*lead, *order))
        new = sorted(n for n in format.tensors.taken if n not in places)
        format.tensors.taken.clear()
        places |= dict.fromkeys(new) | {new[0]: weight}
        if name in format.tensors and name not in places:
            raise Unreadable(name, "is there in codes and in floats", "Remove one of them.")
    left = list_left(format.tensors, places)
    if left or not matrices:
        method = shorten(checkpoint.quantization.get("quant_method"))
        what = "these tensors are not in that format" if left else "no weight is"
        why = f"by its config.json, {checkpoint.source.folder} is quantized by {method}, but {what}"
        advice = "Give the original checkpoint, or correct this one."
        raise checkpoint.source.error(f"{why}. {advice}", problems=left)
    files = dict[str, list[TensorInfo]]()
    for file, header in checkpoint.headers.items():
        both = (places.get(name, entry) for name, entry in header.entries.items())
        files[file] = [entry for entry in both if entry is not None]
    lock = threading.Lock()

    def open(name: str) -> io.BytesIO:
        of_name = explain_shorter(checkpoint.source, name)
        with lock, _errors_about(checkpoint.source.argument), of_name:
            w = np.asarray(format.read(name).array(DTYPES[found.entry(name).dtype]))
        return io.BytesIO((w.swapaxes(-1, -2) if name in turned else w).tobytes())

    openers = {name: functools.partial(open, name) for name in matrices}
    found = rearrange(checkpoint, files, checkpoint.config_of_floats, openers)
    return found, list(matrices.values())


def _matrix(name: str, x: Codes | Dense) -> Matrix:
    return Matrix(name, x.shape, x.spelling, x.nbytes)


def _float_dtype(checkpoint: Checkpoint) -> np.dtype:
    """Returns the dtype of floats by the configuration, bfloat16 by default."""
    config = checkpoint.config
    dtype = config.get("dtype", config.get("torch_dtype"))
    return jnp.dtype(dtype if dtype in ("float32", "float16") else "bfloat16")
