"""A base from a checkpoint as it is shipped, and back."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors.numpy import save_file
from tqdm import tqdm

from ... import sharding
from ..._folders import fresh
from ..._quantized import FP4, NF4, Int8, Quantized, is_quantized, spelled
from ..._tree import flatten
from ..._types import PyTree
from .._checkpoint import ONE, Checkpoint, open_checkpoint
from .._file import DTYPES, brief, listing, shown
from ..names._convert import weight, weights
from ..names._leaves import Leaf
from ..names._names import Name
from ..names._weights import all_named, narrowed
from . import FORMATS, Format, Tensors, Unreadable, _gguf, check_finite, leaf_of
from . import _bitsandbytes as bnb

QUANTIZATION = "quantization_config"  # of `config.json`


def load_base(path: str | os.PathLike[str], names: Sequence[Name], *, like: PyTree) -> PyTree:
    r"""The base that a checkpoint holds, its quantized weights as they are.

    A folder of Hugging Face's: bitsandbytes (NF4, FP4, with and without double quantization, and 8
    bits), GPTQ (4 and 8 bits), AWQ (4 bits), compressed-tensors (4 and 8 bits, and FP8), FP8 with a
    scale for the tensor, for each output or for each block, MXFP4 experts; or float. A file
    `.gguf`: Q4_0, Q4_1, Q8_0 and MXFP4; its other types are dequantized. A weight whose axes can be
    cut into the blocks of the file becomes a `jlora.types.Quantized` leaf with the file's own
    codes; any other is dequantized, exactly, as are codes that no scheme has: those of inputs that
    are reordered by activation, and of 8 bits with zero points. Scales of activations are left out.

    Args:
        path: the folder, with `config.json` and `model.safetensors` or shards; or the GGUF file.
        names: the table that says what the leaves are called in PyTorch, or in the GGUF file.
        like: the tree of parameters, arrays or `jax.ShapeDtypeStruct`s, of which shapes, dtypes and
            shardings matter. The dtype of a quantized weight is that of its file if that says one.

    Returns:
        A tree like `like`. A float leaf has the dtype of the file.

    Raises:
        FileNotFoundError: if there is no such folder, or a file is missing.
        ImportError: for a GGUF file if the package `gguf` is not installed.
        ValueError: if tensors are missing, unexpected, misshapen, not finite, of 64 bits where JAX
            has 32, or contradict the configuration; all of it is listed, and nothing is loaded.

    Source: bitsandbytes 0.50, GPTQModel, AutoAWQ, compressed-tensors 0.20 and `transformers` 5, of
    which it is a reader of its own.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> names = [peft.Name(r"(\w+)/kernel", r"\1", "io")]
        >>> params = {"up": {"kernel": jnp.ones((64, 32))}}
        >>> base = jlora.quantize(params, jlora.NF4("kernel"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save_base(f"{folder}/base", base, names)
        ...     again = peft.load_base(f"{folder}/base", names, like=params)
        >>> again["up"]["kernel"]
        Quantized(float32[64,32], NF4(block=64, double=True))
    """
    leaves = all_named(like, names, "like")
    path = Path(path)
    tensors: Any
    if path.suffix == ".gguf":
        tensors, config, format = _gguf.Tensors(path), {}, _gguf.FORMAT
    else:
        checkpoint = open_checkpoint(path, "path", follow_links=True)
        tensors = Tensors(checkpoint)
        config = configuration_of(checkpoint)
        format = format_of(config)
    values, wrong = [], []
    unread: tuple[str, ...] = ()  # modules of which not all tensors were asked for
    for leaf in tqdm(leaves, "load", unit="leaf", disable=None):
        try:
            values.append(_placed(_read(leaf, tensors, config, format), leaf.value))
        except Unreadable as e:
            wrong.append(str(e))
            unread += leaf.modules
    prefixes = tuple(f"{module}." for module in unread)
    left = [n for n in tensors if n not in tensors.taken and not n.startswith(prefixes)]
    # What the configuration says is wrong of each leaf in the same words.
    wrong = list(dict.fromkeys(wrong)) + [f"{shown(name)}: unexpected" for name in left]
    if wrong:
        raise ValueError(f"`path`: {path} does not fit `like`. {listing(wrong)}")
    return jax.tree.unflatten(flatten(like)[1], values)


def configuration_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """`quantization_config`, also where it is within another part, as of models of models."""
    found = (part.get(QUANTIZATION) for part in _parts(checkpoint.config))
    return next((x for x in found if isinstance(x, dict)), {})


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what `configuration_of` finds, wherever it is."""
    left: dict[str, Any] = json.loads(json.dumps(config))
    for part in _parts(left):
        part.pop(QUANTIZATION, None)
    return left


def _parts(config: Mapping[str, Any]) -> Iterator[Any]:
    """A configuration, and those within it."""
    left: list[Any] = [config]
    while left:
        part = left.pop()
        yield part
        left += [value for value in part.values() if isinstance(value, dict)]


def format_of(config: Mapping[str, Any], argument: str = "path") -> Format | None:
    """The format of a configuration; None if it says of none."""
    method = config.get("quant_method")
    if not config:
        return None
    if not isinstance(method, str) or method not in FORMATS:
        raise ValueError(
            f"`{argument}`: its config.json has the `quant_method` {brief(method)}; known are "
            f"{', '.join(sorted(FORMATS))}. Give the checkpoint that it was made of, and quantize "
            "that by jlora."
        )
    return FORMATS[method]


def _read(leaf: Leaf, tensors: Any, config: dict[str, Any], format: Format | None) -> Any:
    name, whole = leaf.name, leaf.weight_shape
    matrix = name.kind in ("linear", "embedding", "experts")
    if format is not None and matrix and not (name.transposed and name.kind == "linear"):
        each = (*whole[:-2], *whole[-2:][::-1]) if name.swapped else whole
        found = [format.read(tensors, config, m, name.parameter, each) for m in leaf.modules]
        stored = [x for x in found if x is not None]
        if stored and not name.is_plain:
            raise Unreadable(
                f"{leaf.parameters[0]}: is quantized, but `names` changes the values or their "
                "order; load a checkpoint that is not quantized, and use jlora.quantize"
            )
        for key, x in zip(leaf.parameters, found, strict=True):
            if x is not None:
                check_finite(x, key, x.dtype or leaf.value.dtype)
        if len(stored) == len(found):
            return leaf_of(leaf, stored)
        if stored:
            raise Unreadable(
                f"{leaf.parameters[0]}: {len(stored)} of {len(found)} layers that are one leaf "
                "here are quantized"
            )
    parts = [tensors.read(key, DTYPES, whole) for key in leaf.parameters]
    return jnp.asarray(_dense(leaf, parts))


def _dense(leaf: Leaf, parts: Sequence[np.ndarray]) -> np.ndarray:
    for key, x in zip(leaf.parameters, parts, strict=True):
        if why := narrowed(x.dtype):
            raise Unreadable(f"{key}: {why}")
        if not np.isfinite(x).all():
            raise Unreadable(f"{key}: has values that are not finite")
    return weight(leaf, parts)


def _placed(x: Any, like: Any) -> Any:
    """Where `like` lies, if it lies on a mesh."""
    place = getattr(like, "sharding", None)
    if not isinstance(place, NamedSharding):
        return x
    if is_quantized(x):
        place = sharding.specs({"w": place}, {"w": x})["w"]
    return jax.device_put(x, place)


def save_base(
    path: str | os.PathLike[str],
    base: PyTree,
    names: Sequence[Name],
    *,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a base as bitsandbytes does: NF4, FP4 and Int8 leaves, and float ones.

    The tensors are those of the folder that it was read from, byte for byte.

    Args:
        path: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        base: the base, with leaves of `NF4`, `FP4` or `Int8`.
        names: the table that says what the leaves are called in PyTorch.
        config: the other entries of `config.json`, such as those of the model's own.

    Raises:
        FileExistsError: if `path` is there and not an empty folder.
        ValueError: if a leaf has no name, or is quantized in a scheme or in blocks that
            bitsandbytes has not, or some are of 4 and some of 8 bits.

    Examples:
        See `load_base`.
    """
    leaves = all_named(base, names, "base")
    packed = [leaf for leaf in leaves if is_quantized(leaf.value)]
    if wrong := [f"{'/'.join(leaf.path)}: {why}" for leaf in packed if (why := _unwritable(leaf))]:
        raise ValueError(f"`base` cannot be written as bitsandbytes does. {listing(wrong)}")
    kinds = {leaf.value.scheme.bits: spelled(leaf.value.scheme) for leaf in packed}
    if len(kinds) > 1:
        raise ValueError(
            f"`base` has weights of {' and '.join(kinds.values())}, of which a configuration of "
            "bitsandbytes knows one. Quantize all in 4 bits, or all in 8."
        )
    tensors: dict[str, np.ndarray] = {}
    floats = [leaf for leaf in leaves if not is_quantized(leaf.value)]
    for leaf in floats:
        tensors |= dict(zip(leaf.parameters, weights(leaf, leaf.value), strict=True))
    for leaf in packed:
        tensors |= bnb.write(leaf.value, list(leaf.modules), leaf.name.parameter)
    said = dict(config or {})
    if packed:
        modules = [m for leaf in floats if leaf.name.kind == "linear" for m in leaf.modules]
        first = packed[0].value
        said[QUANTIZATION] = bnb.configuration(first.scheme, first.dtype, modules)
    with fresh(path, "`path`") as folder:
        save_file(tensors, folder / ONE, metadata={"format": "pt"})
        (folder / "config.json").write_bytes(json.dumps(said, indent=2).encode())


def _unwritable(leaf: Leaf) -> str | None:
    value: Quantized = leaf.value
    stack, order = leaf.name.where("ls"), (*leaf.name.where("o"), *leaf.name.where("i"))
    if leaf.name.kind == "embedding":
        order = (*leaf.name.where("v"), *leaf.name.where("o"))
    scheme: Any = value.scheme
    if not leaf.name.is_plain:
        return "`names` changes its values or their order; use jlora.dequantize"
    if type(scheme) not in (NF4, FP4) and not (type(scheme) is Int8 and scheme.block is None):
        return f"{spelled(scheme)} is not of bitsandbytes"
    if str(value.dtype) not in bnb.DTYPES:
        return f"{value.dtype} is not of bitsandbytes; expected {', '.join(bnb.DTYPES)}"
    if (value.form.stack, value.form.order) != (stack, order) or leaf.name.transposed:
        return "its blocks do not run along the rows of the file; quantize it with `sites`"
    return None
