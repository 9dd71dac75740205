"""A checkpoint to one with the same tensors in another form: in few bits, or dequantized."""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from ..._folders import fresh
from ..._quantized import FP4, NF4, Int8, Scheme, quantize_weight, spelled
from ..._rules import compile_pattern, explain_no_match, matches, misplaced, rule_name
from .._checkpoint import INDEX, Checkpoint, copy_others, open_checkpoint
from .._file import brief, listing
from . import FLOATS, Tensors, Unreadable, array_of, left_of
from . import _bitsandbytes as bnb
from ._base import QUANTIZATION, configuration_of, without_quantization
from ._matrices import Matrices, Matrix, matrix_of

# What `transformers` leaves as it is: embeddings, and the head.
SKIP = r"[^.]*(embed|wte|wpe|lm_head|cls|classifier|score|head|pooler)[^.]*"
# Models whose weights lie as (inputs, outputs), in a `Conv1D`, which bitsandbytes would turn.
TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


def quantize_checkpoint(
    src_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    scheme: Scheme,
    *,
    skip: str | None = SKIP,
    follow_links: bool = False,
) -> list[Matrix]:
    r"""Writes a Hugging Face checkpoint with its matrices in 4 or 8 bits, as bitsandbytes does.

    One shard after the other is read, quantized and written.

    Args:
        src_dir: a folder with `model.safetensors`, or with shards and their index.
        out_dir: a folder that does not exist yet, or an empty one. It appears complete or not at
            all. Configuration and tokenizer are copied.
        scheme: `NF4`, `FP4` or `Int8`. A pattern matches whole components, between dots, of the
            name of a tensor: `q_proj` or `layers.0`.
        skip: a pattern, likewise, for the tensors that stay as they are: by default those of
            embeddings and of the head. None skips none.
        follow_links: whether files of `src_dir` may be links out of it.

    Returns:
        What was quantized, with the error of each.

    Raises:
        FileExistsError: if `out_dir` is there and not an empty folder.
        ValueError: if the checkpoint is damaged, quantized already, of a model whose weights lie
            turned, or has nothing to quantize; if the scheme is not of bitsandbytes, or a pattern
            matches no tensor.

    Examples:
        >>> import tempfile, jlora, numpy as np
        >>> from pathlib import Path
        >>> from jlora import peft
        >>> from safetensors.numpy import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Path(folder, "base").mkdir()
        ...     weights = {"up.weight": np.ones((32, 64), np.float32)}
        ...     save_file(weights, f"{folder}/base/model.safetensors")
        ...     found = peft.quantize_checkpoint(f"{folder}/base", f"{folder}/nf4", jlora.NF4())
        >>> found[0].name, found[0].shape, found[0].scheme
        ('up.weight', (32, 64), 'NF4(block=64, double=True)')
    """
    if not _is_of_bitsandbytes(scheme):
        got = misplaced(scheme)
        raise ValueError(f"`scheme` must be of bitsandbytes: NF4(), FP4() or Int8(); got {got}.")
    checkpoint = open_checkpoint(src_dir, follow_links=follow_links, copied=True)
    if config := configuration_of(checkpoint):
        raise ValueError(
            f"`src_dir`: {checkpoint.source.folder} is quantized already, by "
            f"{brief(config.get('quant_method'))}. Give the one that it was made of."
        )
    kind = checkpoint.config.get("model_type")
    if kind in TURNED:
        raise ValueError(
            f"`src_dir`: weights of {kind} lie as (inputs, outputs), which bitsandbytes would "
            "turn. Load it, use jlora.quantize, and keep it in Orbax."
        )
    _check_patterns(checkpoint, scheme, skip)
    tensors, found = Tensors(checkpoint), list[Matrix]()
    dtypes, floats = list[Any](), list[str]()

    def convert(name: str) -> dict[str, np.ndarray] | None:
        shape = tensors.shape(name)
        module, _, parameter = name.rpartition(".")
        if len(shape) != 2 or 0 in shape or tensors.dtype(name) not in FLOATS:
            return None
        taken = parameter == "weight" if scheme.pattern is None else matches(scheme, name, ".")
        if not taken or _skips(skip, name):
            floats.append(module)
            return None
        w = jnp.asarray(tensors.read(name, FLOATS, shape))
        if not bool(jnp.isfinite(w).all()):
            raise Unreadable(f"{name}: has values that are not finite")
        leaf = quantize_weight(w, scheme, scheme.form(shape, (), (0, 1), 1))
        found.append(
            Matrix(name, shape, spelled(scheme), leaf.nbytes, float(jnp.max(leaf.error)), scheme)
        )
        dtypes.append(leaf.dtype)
        return bnb.write(leaf, [module], parameter)

    def config_of(config: Mapping[str, Any]) -> dict[str, Any]:
        if not found:
            raise Unreadable(f"no matrix is left to quantize, with `skip` {skip!r}")
        return {**config, QUANTIZATION: bnb.configuration(scheme, dtypes[0], floats)}

    _rewrite(checkpoint, out_dir, convert, config_of, "quantize")
    return found


def _skips(skip: str | None, name: str) -> bool:
    return skip is not None and compile_pattern(skip, ".").search(name) is not None


def _check_patterns(checkpoint: Checkpoint, scheme: Scheme, skip: str | None) -> None:
    """Raises where a pattern that the user wrote matches no tensor."""
    names = [name for header in checkpoint.headers.values() for name in header.entries]
    written = {rule_name(scheme): scheme.pattern, f"`skip` {skip!r}": skip}
    for what, pattern in written.items():
        if pattern is None or pattern == SKIP:
            continue
        try:
            hits = any(compile_pattern(pattern, ".").search(name) for name in names)
        except re.error as e:
            raise ValueError(f"{what} is not a regular expression: {e}.") from None
        if not hits:
            advice = explain_no_match(pattern, names, ".")
            raise ValueError(f"{what} matches no tensor of `src_dir`. {advice}")


def dequantize_checkpoint(
    src_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    follow_links: bool = False,
) -> list[Matrix]:
    """Writes a quantized Hugging Face checkpoint with its weights as plain ones, exactly.

    Args:
        src_dir: a folder in a format that `load_base` reads.
        out_dir: a folder that does not exist yet, or an empty one. It appears complete or not at
            all; its configuration no longer says that it is quantized.
        follow_links: whether files of `src_dir` may be links out of it.

    Returns:
        What was quantized.

    Raises:
        FileExistsError: if `out_dir` is there and not an empty folder.
        ValueError: if the checkpoint is damaged, or not quantized.
    """
    checkpoint = open_checkpoint(src_dir, follow_links=follow_links, copied=True)
    tensors, config = Tensors(checkpoint), configuration_of(checkpoint)
    if not config:
        raise ValueError(
            f"`src_dir`: {checkpoint.source.folder} is not quantized; use it as it is."
        )
    dtype = _float_dtype(checkpoint)
    source = Matrices(tensors, config, "src_dir", dtype)
    found, main, helpers = list[Matrix](), dict[str, str](), set[str]()
    for name in source.modules:
        found.append(matrix_of(name, source.read(name)))
        new = tensors.taken - helpers
        helpers |= new
        main[min(new)] = name  # in its place the weight is written
    if left := left_of(tensors, helpers):
        raise ValueError(_said(checkpoint, config, "these tensors were not read", left))
    if not found:
        raise ValueError(_said(checkpoint, config, "no weight of it is", []))

    def convert(name: str) -> dict[str, np.ndarray] | None:
        if name not in main:
            return {} if name in helpers else None
        stored = source.read(main[name])
        w = np.asarray(array_of(stored, stored.dtype or dtype))
        return {main[name]: w.swapaxes(-1, -2) if w.ndim == 3 else w}

    _rewrite(checkpoint, out_dir, convert, without_quantization, "dequantize")
    return found


def _is_of_bitsandbytes(scheme: Scheme) -> bool:
    return isinstance(scheme, NF4 | FP4) or (isinstance(scheme, Int8) and scheme.block is None)


def _said(
    checkpoint: Checkpoint, config: Mapping[str, Any], what: str, found: Sequence[str]
) -> str:
    method = brief(config.get("quant_method"))
    return (
        f"`src_dir`: {checkpoint.source.folder} is quantized by {method}, as its config.json says, "
        f"but {what}. Give the checkpoint that it was made of, or take out what is not of it."
        + (f" {listing(found)}" if found else "")
    )


def requantized(
    src_dir: str | os.PathLike[str], out_dir: str | os.PathLike[str], old: Sequence[Matrix]
) -> list[Matrix]:
    """Quantizes again what `old` says was."""
    schemes = {m.scheme for m in old}
    first = old[0].made
    if first is None or len(schemes) > 1 or not _is_of_bitsandbytes(first):
        raise ValueError(
            f"`requantize` is of bitsandbytes alone; `src_dir` has {', '.join(sorted(schemes))}."
        )
    names = "|".join(re.escape(m.name) for m in old)
    scheme = dataclasses.replace(first, pattern=f"^({names})$")
    return quantize_checkpoint(src_dir, out_dir, scheme, skip=None)


# --------------------------------------------------------------------------------- tensor by tensor


def _float_dtype(checkpoint: Checkpoint) -> Any:
    """What the configuration says that floats are in; bfloat16 where it says nothing."""
    config = checkpoint.config
    said = config.get("dtype", config.get("torch_dtype"))
    return jnp.dtype(said if said in ("float32", "float16") else "bfloat16")


def _rewrite(
    checkpoint: Checkpoint,
    out_dir: str | os.PathLike[str],
    convert: Callable[[str], Mapping[str, np.ndarray] | None],
    config_of: Callable[[Mapping[str, Any]], dict[str, Any]],
    what: str,
) -> None:
    """Each file with what `convert` makes of its tensors; None is a tensor as it is."""
    tensors = Tensors(checkpoint)
    total = sum(header.size for header in checkpoint.headers.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None)
    weight_map, size = {}, 0
    with fresh(out_dir, "`out_dir`") as folder, bar:
        try:
            for file, header in checkpoint.headers.items():
                written: dict[str, np.ndarray] = {}
                with tempfile.TemporaryFile(dir=folder) as disk:
                    for name, entry in header.entries.items():
                        new = convert(name)
                        new = {name: tensors.as_stored(name)} if new is None else new
                        written |= {name: _on_disk(x, disk) for name, x in new.items()}
                        bar.update(entry.stop - entry.start)
                    save_file(written, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(written, file)
                size += sum(x.nbytes for x in written.values())
            config = config_of(checkpoint.config)
        except Unreadable as e:
            raise ValueError(f"`src_dir`: {listing([str(e)])}") from None
        copy_others(checkpoint, folder)
        _write_json(folder / "config.json", config)
        if INDEX in checkpoint.kept:
            _write_json(
                folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map}
            )


def _on_disk(x: np.ndarray, file: BinaryIO) -> np.ndarray:
    """The same, mapped from the end of a file: the writer of safetensors wants all at once."""
    if not x.size:  # nothing can be mapped
        return x
    start = file.seek(0, os.SEEK_END)
    file.write(x.tobytes())
    file.flush()
    return np.memmap(file, x.dtype, "r", start, x.shape)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_bytes(json.dumps(value, indent=2).encode())
