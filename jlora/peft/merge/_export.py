"""Merges an adapter into a checkpoint, in blocks of bounded size."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ..._folders import fresh, scratch
from ..._types import PyTree
from .._checkpoint import Checkpoint, explain_shorter, open_checkpoint, read_pieces
from .._file import COUNTS, DTYPES, open_file
from .._problems import Problems
from ..formats._copy import copy_others
from ..formats._dequantize import dequantize_checkpoint
from ..names._names import Name
from ._blocks import Edit, encode
from ._edits import find_edits
from ._match import check_frozen, match_to_checkpoint
from ._ties import with_copies


def export_merged(
    src_dir: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | PyTree,
    out: str | os.PathLike[str],
    *,
    names: Sequence[Name] | None = None,
    follow_links: bool = False,
) -> list[str]:
    r"""Writes a Hugging Face checkpoint with an adapter merged into it: $W' = W + s \cdot BA$.

    The files, tensors, dtypes and metadata of the new checkpoint are those of the old one; only
    values change. Weights are read, changed and written in blocks, so that memory beside the
    adapter's stays below a hundred megabytes for weights of any size.

    Everything else in `src_dir` is copied: configuration, generation and tokenizer files, code,
    folders. Left out are weights in other formats (`pytorch_model.bin`, `.h5`, `.msgpack`, `.onnx`,
    `.gguf`, other safetensors files and the like), as they would stay unmerged; all pickles
    (`.bin`, `.pt`, `.pkl`); an adapter; linked folders, `.git` and `.cache`.

    B·A is summed in float32 by fused multiply-adds in the order of the rank, times s, plus W in
    float32 (float64 over float64), and rounded once to W's dtype. PEFT's `merge_and_unload` does
    the same in float32, and has the same bits where PyTorch's matrix product sums in this order:
    it does for ranks up to 192 and sides of at least 64. In other cases the two differ by the
    rounding of the product. In bfloat16 and float16 PEFT rounds the ΔW of embeddings and of
    experts before it adds. It keeps `modules_to_save` in their model dtype, here they get W's; to a
    weight that embedding and head share it adds their common ΔW twice, here it is added once. The
    norms of DoRA are of float32 values and are summed in float64; PEFT's are to a few roundings
    the same in float32, and have those of W's dtype in narrower ones.

    A quantized checkpoint is dequantized first, exactly, and the result is in floats, as its
    configuration then says. What of it is neither read nor in floats is an error.

    Args:
        src_dir: a folder with `model.safetensors`, or with shards and
            `model.safetensors.index.json`. Files may be links within it, or within the download
            cache around it.
        adapter: a folder that PEFT or `save` wrote, whose modules are called as the checkpoint's
            tensors, up to a first part such as `bert.`; or an adapter tree.
        out: a folder that does not exist yet, or an empty one. It appears complete or not at
            all.
        names: for a tree, the table of `Name` rows that says what its leaves are called in
            PyTorch, such as `jlora.peft.LLAMA`.
        follow_links: whether files of `src_dir` may be links out of it, whose contents are copied.

    Returns:
        The files of `src_dir` that were left out, as paths in it.

    Raises:
        FileExistsError: if `out` is there and not an empty folder.
        FileNotFoundError: if a folder or a file is missing.
        TypeError: if `adapter` is neither a path nor an adapter tree.
        ValueError: if the checkpoint is damaged, the adapter does not fit it, or merged values
            are not finite; all of it is listed, and nothing is written.

    Source: PEFT 0.21, `peft.tuners.lora.layer.Linear.merge`.

    Examples:
        >>> import pathlib, tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> from safetensors.numpy import load_file, save_file
        >>> params = {"q": {"kernel": jnp.ones((4, 3))}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> lora = jlora.transform(lambda p, x: x @ p["q"]["kernel"], jlora.LoRA("q", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pathlib.Path(folder, "base").mkdir()
        ...     weights = {"q.weight": jnp.ones((3, 4)).__array__()}
        ...     save_file(weights, f"{folder}/base/model.safetensors")
        ...     left_out = peft.export_merged(
        ...         f"{folder}/base", adapter, f"{folder}/merged", names=names
        ...     )
        ...     merged = load_file(f"{folder}/merged/model.safetensors")
        >>> merged["q.weight"].shape, left_out
        ((3, 4), [])
    """
    checkpoint = open_checkpoint(src_dir, follow_links=follow_links, copied=True)
    if checkpoint.quantization:
        with scratch(out, "`out`") as folder:
            dequantize_checkpoint(src_dir, folder / "dense", follow_links=follow_links)
            export_merged(folder / "dense", adapter, out, names=names)
        return checkpoint.left_out
    problems = Problems(
        "`adapter` cannot be merged into the checkpoint of `src_dir`; nothing was written"
    )
    model, contents, is_transposed = match_to_checkpoint(checkpoint, adapter, names, problems)
    edits = find_edits(model, contents, is_transposed, problems)
    problems.stop()
    edits = with_copies(checkpoint, edits, problems)
    check_frozen(checkpoint, model, contents, problems)
    problems.stop()
    problems.warn()
    total = sum(header.size for header in checkpoint.headers.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=None)
    with fresh(out, "`out`") as folder, bar:
        for file in checkpoint.headers:
            with open(folder / file, "wb") as target:
                _write(checkpoint, file, edits, target, bar.update, problems)
        problems.stop()
        copy_others(checkpoint, folder)
    return checkpoint.left_out


@np.errstate(over="ignore", invalid="ignore")  # what is not finite is counted
def _write(
    checkpoint: Checkpoint,
    file: str,
    edits: Mapping[str, Edit],
    target: BinaryIO,
    tick: Callable[[int], object],
    problems: Problems,
) -> None:
    """Writes one file: the header as it is, then the tensors in the order of their data."""
    header = checkpoint.headers[file]
    with open_file(checkpoint.source, file) as (data, _):
        with explain_shorter(checkpoint.source, file):
            for piece in read_pieces(data, header.data):
                target.write(piece)
        for name, entry in sorted(header.entries.items(), key=lambda item: item[1].start):
            if (edit := edits.get(name)) is None:
                pieces = ((piece, 0) for piece in read_pieces(data, entry.stop - entry.start))
            else:
                dtype = (DTYPES | COUNTS)[entry.dtype]
                pieces = (encode(block, dtype) for block in edit.blocks(data, entry))
            bad = 0
            with explain_shorter(checkpoint.source, name):
                for piece, count in pieces:
                    target.write(piece)
                    tick(len(piece))
                    bad += count
            if bad:
                problems.add(name, f"{bad} values are not finite after merging")
