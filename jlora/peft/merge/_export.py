"""Merges an adapter into a checkpoint, in blocks of bounded size."""

import os
from collections.abc import Sequence

from ..._folders import fresh
from ..._types import PyTree
from .._checkpoint import open_checkpoint
from .._problems import Problems
from .._write import write_tensors
from ..formats._dequantize import open_dequantized
from ..names._names import Name
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
    values change. Up to four threads read, change and write weights in blocks, so that memory
    beside the adapter's stays below a hundred megabytes for weights of any size.

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

    A quantized checkpoint is dequantized first, exactly and one weight at a time, and the result is
    in floats, as its configuration then says. What of it is neither read nor in floats is an error.

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
        checkpoint = open_dequantized(checkpoint)
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
    with fresh(out, "`out`") as folder:
        for name, count in write_tensors(checkpoint, folder, edits, "merge").items():
            problems.add(name, f"{count} values are not finite after merging")
        problems.stop()
    return checkpoint.left_out
