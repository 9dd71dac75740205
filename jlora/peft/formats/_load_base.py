"""Loads a base from a checkpoint, quantized or not, and writes one in floats."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ..._arrays import put_like
from ..._errors import Problem, stop
from ..._folders import fresh, to_path
from ..._progress import progress
from ..._quantized import Quantized, is_quantized
from ..._tree import flatten, leaves_by_path, problems_at
from ..._types import PyTree
from ...sharding._specs import place_codes
from .._checkpoint import open_checkpoint
from .._file import DTYPES, FORMAT, INTEGERS
from .._recognized import MODELS
from ..names._kinds import EMBEDDING, EXPERTS, LINEAR
from ..names._leaves import NamedLeaf
from ..names._names import Name
from ..names._torch_layout import join_weight, take_part
from ..names._weights import explain_narrowing, name_all, quantize_leaf, split_all
from ..places._find import Pairs, find
from ..places._views import Piece, Places, View
from ._codes import make_leaf, take_part_of_codes
from ._format import Format, Unreadable, open_format, read_checked
from ._gguf import Gguf, GgufTensors


def load_base(
    path: str | os.PathLike[str], like: PyTree, names: Sequence[Name], *, renamed: Pairs = ()
) -> PyTree:
    r"""Loads the base from a checkpoint, and keeps quantized weights quantized.

    A Hugging Face folder may be in floats, or in one of these formats:

    - bitsandbytes: NF4 and FP4, with and without double quantization; 8 bits
    - GPTQ: 4 and 8 bits
    - AWQ: 4 bits
    - compressed-tensors: 4 and 8 bits; FP8
    - FP8: one scale for each tensor, output or block
    - MXFP4: experts

    In a `.gguf` file, Q4_0, Q4_1, Q8_0 and MXFP4 stay quantized. Other types are dequantized. The
    values are those of the file: llama.cpp alternates the halves of each head of Llama's queries
    and keys, and adds 1 to Gemma's norms.

    A weight becomes a `jlora.Quantized` leaf with the codes of the file, if its axes can be split
    into the blocks of the file. All others are dequantized exactly. So are codes that no scheme of
    jlora has: inputs that are reordered by activation, and 8 bits with zero points. Scales of
    activations are ignored. Parameters have the names of `names`, or are stored as `transformers` 5
    stores those of the model in `config.json`: under other names, with others in one tensor, or
    single experts.

    Args:
        path: the folder, with `config.json` and `model.safetensors` or shards; or the GGUF file.
        like: the tree of parameters: arrays or `jax.ShapeDtypeStruct`s. Shapes, dtypes and
            shardings matter. A quantized weight has this dtype unless the file has one for it. A
            leaf may be a `jlora.Quantized`, from `jlora.quantize` of a tree of shapes. Its tensors
            are then converted to its dtype and quantized one by one, by the host's CPU, and only
            codes are put on devices. Codes of the file that are like those of the leaf are kept.
        names: the name table of the model; for a GGUF file, a table with its names.
        renamed: as in `export_merged`.

    Returns:
        A tree like `like`. A float leaf has the dtype of the file, an integer leaf that of `like`.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ImportError: for a GGUF file if the extra `gguf` is not installed.
        TypeError: if `names` is not a table.
        ValueError: if tensors are missing, unexpected, misshapen, not finite, of 64 bits without
            jax_enable_x64, or contradict the configuration. All problems are listed, and nothing is
            loaded.

    Source: the files of bitsandbytes 0.50, GPTQModel, AutoAWQ, compressed-tensors 0.20 and
    `transformers` 5.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from jlora import peft
        >>> names = [peft.Name(r"(\w+)/kernel", r"\1", "io")]
        >>> params = {"up": {"kernel": jnp.ones((64, 32))}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save_base(f"{folder}/base", params, names)
        ...     base = peft.load_base(f"{folder}/base", params, names)
        >>> base["up"]["kernel"].shape
        (64, 32)
    """
    path = to_path(path)
    config = {}
    if path.suffix == ".gguf":
        format = Gguf(GgufTensors(path), {})
    else:
        checkpoint = open_checkpoint(path, "path", follow_links=True)
        format = open_format(checkpoint)
        config = checkpoint.config
    quantized = set(format.find())
    leaves = name_all(like, names, "like")
    wanted = [key for leaf in leaves for key in leaf.parameters]
    shapes = {name: format.tensors.shape(name) for name in format.tensors}
    shapes |= dict.fromkeys(quantized, (0, 0))  # that of codes tells nothing
    places = next(find(wanted, shapes, config, renamed, "names"))
    read = functools.partial(_read, format=format, quantized=quantized, places=places)
    values, wrong = [], []
    unread = set[str]()  # modules with tensors that were not read
    for leaf in progress(leaves, "load", unit="leaf"):
        try:
            values.append(_make(leaf, read))
        except Unreadable as e:
            wrong.append(e.problem)
            unread.update(leaf.modules)
            unread.update(places.tensor(key).rpartition(".")[0] for key in leaf.parameters)
    left = [n for n in format.tensors if n not in format.tensors.taken]
    left = [n for n in left if unread.isdisjoint(accumulate(n.split("."), "{}.{}".format))]
    # With a wrong configuration, all leaves have the same problem.
    wrong = list(dict.fromkeys(wrong)) + [Problem(name, "unexpected") for name in left]
    stop(wrong, "path", f"{path} does not fit `like`.", path=path)
    return jax.tree.unflatten(flatten(like)[1], values)


def _read(
    leaf: NamedLeaf, format: Format, quantized: Collection[str], places: Places
) -> np.ndarray | jax.Array | Quantized:
    name, whole = leaf.name, leaf.weight_shape
    views = [places.get(key, View(whole, (Piece(key),))) for key in leaf.parameters]
    if jnp.issubdtype(leaf.value.dtype, jnp.integer):
        return _read_integers(leaf, [view.tensor for view in views], format)
    j, n = name.part or (0, 1)
    pieces = [piece for view in views for piece in view.pieces]
    is_split = any(piece != Piece(piece.tensor) for piece in pieces)
    # Gate and up of each expert are tensors of their own, in turn: part j is each n-th of them.
    is_apart = leaf.kind is EXPERTS and is_split and len(pieces) == len(views) * n * leaf.experts
    tensors = [piece.tensor for piece in (pieces[j::n] if is_apart else pieces)]
    is_matrix = leaf.kind in (EMBEDDING, EXPERTS, LINEAR)
    coded = [tensor for tensor in tensors if is_matrix and tensor in quantized]
    if not coded:
        each = (take_part(_read_dense(format, view, whole), name) for view in views)
        return join_weight(leaf, list(each))
    if is_split and not is_apart:
        raise Unreadable(
            leaf.parameters[0],
            "is stored in parts, which are quantized and cannot be joined to one leaf; for gate "
            "and up of experts give rows with a `part`, or a checkpoint that is not quantized",
        )
    is_swapped = leaf.kind is EXPERTS and name.transposed and format.keeps_axes
    if not name.is_plain or (is_swapped and not is_apart):
        raise Unreadable(
            coded[0],
            "is quantized, but `names` changes the values or their order; load a "
            "checkpoint that is not quantized, and use jlora.quantize",
        )
    if len(coded) < len(tensors):
        why = f"only {len(coded)} of the {len(tensors)} layers of this leaf are quantized"
        raise Unreadable(tensors[0], why)
    *lead, rows, columns = (*whole[:-2], *whole[-2:][::-1]) if name.transposed else whole
    shape = (rows // n, columns) if is_apart else (*lead, rows, columns)
    read = [read_checked(format, tensor, leaf.value.dtype, shape) for tensor in tensors]
    return make_leaf(leaf, read if is_apart else [take_part_of_codes(x, name) for x in read])


def _read_integers(leaf: NamedLeaf, keys: Sequence[str], format: Format) -> np.ndarray:
    """Reads a buffer, such as the count of a batch normalization, in the dtype of the leaf."""
    x = join_weight(leaf, [format.tensors.read(k, INTEGERS, leaf.weight_shape) for k in keys])
    found = x.astype(leaf.value.dtype)
    if not np.array_equal(found, x):
        raise Unreadable(keys[0], f"has values that {leaf.value.dtype} cannot hold")
    return found


def _read_dense(format: Format, view: View, shape: tuple[int, ...]) -> np.ndarray:
    if not view.is_tensor and view.shape != shape:
        raise Unreadable(view.tensor, f"expected shape {shape} in parts, got {view.shape}")

    def read(key: str) -> np.ndarray:
        own = shape if view.is_tensor else format.tensors.shape(key)
        x = format.tensors.read(key, DTYPES, own)
        if why := explain_narrowing(x.dtype):
            raise Unreadable(key, f"{why}")
        if not np.isfinite(x).all():
            raise Unreadable(key, "has values that are not finite")
        return x

    return view.read(read)


def _make(leaf: NamedLeaf, read: Callable[[NamedLeaf], Any]) -> jax.Array | Quantized:
    """Reads a leaf, and shards it like that of `like`, if that is on a mesh."""
    if is_quantized(leaf.value):
        return quantize_leaf(leaf, read, "path")
    x = read(leaf)
    if not is_quantized(x):
        return put_like(x, leaf.value)
    return place_codes(leaf.path, x, getattr(leaf.value, "sharding", None), "like")


def save_base(
    out: str | os.PathLike[str],
    base: PyTree,
    names: Sequence[Name],
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> None:
    """Writes a float base as a Hugging Face checkpoint, with its weights in one safetensors file.

    Dtypes stay. Axes are PyTorch's.

    Args:
        out: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        base: the parameters, in floats.
        names: the name table of the model.
        config: the contents of `config.json`; or the folder of the checkpoint that the base comes
            from. Then configurations, tokenizer files and code are copied, as by `export_merged`,
            and `config.json` gets no `quantization_config`.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        OSError: if `out` cannot be written. Nothing is left of it then.
        TypeError: if `names` is not a table.
        ValueError: if a leaf has no name or is quantized, or `config` is not a checkpoint.

    Examples:
        See `load_base`.
    """
    packed = {path: repr(x) for path, x in leaves_by_path(base) if is_quantized(x)}
    advice = "Save jlora.dequantize(base), and quantize that checkpoint with `transformers` and"
    why = f"must be in floats. {advice} bitsandbytes, or with llm-compressor."
    stop(problems_at(packed), "base", why)
    tensors = split_all(name_all(base, names, "base"))
    source = None
    if isinstance(config, str | os.PathLike):
        source = open_checkpoint(config, "config", copied=True)
        config = source.config_of_floats
    with fresh(out, "out") as folder:
        (name, _) = MODELS[0] if source is None else source.names
        save_file(tensors, folder / name, metadata=FORMAT)
        if source is not None:
            kept = [x for x in source.kept if x != source.names[1]]
            dataclasses.replace(source, kept=kept).copy_others(folder)
        (folder / "config.json").write_bytes(json.dumps(dict(config or {}), indent=2).encode())
