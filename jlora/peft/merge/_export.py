"""Merges an adapter into a checkpoint, in blocks of bounded size."""

import os
from collections.abc import Collection, Sequence

from ..._errors import Problem
from ..._folders import fresh
from ..._types import PyTree
from .._checkpoint import open_checkpoint
from .._problems import About, warn
from .._write import write_tensors
from ..formats._dequantize import dequantized
from ..names._names import Name
from ._blocks import check_cpu
from ._edits import find_edits
from ._fit_checkpoint import list_changed, match_to_checkpoint
from ._ties import with_copies


def export_merged(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | PyTree,
    out: str | os.PathLike[str],
    *,
    names: Sequence[Name] | None = None,
    follow_links: bool = False,
    ignore: Collection[str] = (),
    prefix: str | None = None,
    renamed: Sequence[tuple[str, str]] = (),
) -> list[str]:
    r"""Writes a Hugging Face checkpoint with an adapter merged into it: $W' = W + s \cdot BA$.

    The new checkpoint has the files, tensors, dtypes and metadata of the old one; only values
    change. Up to four threads read, change and write weights in blocks. Besides the adapter, this
    takes less than a hundred megabytes of memory for weights of any size.

    The checkpoint grows where the adapter was trained on a larger model:

    - If the vocabulary was resized, and the adapter holds all rows, embedding and head get these
      rows, and `config.json` their number. The tokenizer is that of `path`.
    - A head in `modules_to_save` that the checkpoint lacks is added. Its class and its labels go to
      `config.json`, as `LABEL_0` and so on, because the adapter does not have their names. Weights
      that neither has, such as a new pooler, stay missing; an old head stays too, and
      `transformers` ignores it.
    - If the output head shares the weight of the embedding, and the adapter changes only one of
      them, or both differently, the head gets a weight of its own, and `tie_word_embeddings`
      becomes false. Such an adapter is refused if the class of `config.json` shares more than this
      one weight, or is not in `transformers`, and nothing denies it.

    All other files in `path` are copied: configuration, generation and tokenizer files, code,
    folders. Not copied are weights in other formats, as they would stay unmerged
    (`pytorch_model.bin`, `.h5`, `.msgpack`, `.onnx`, `.gguf`, other safetensors files and the
    like), pickles (`.bin`, `.pt`, `.pkl`), an adapter, linked folders, `.git` and `.cache`.

    A quantized checkpoint is dequantized exactly, one weight at a time. The result and its
    configuration are in floats. A tensor that is neither in floats nor in the format of the
    quantization raises.

    B·A is computed in float32 by fused multiply-adds in the order of the rank. It is multiplied by
    s, added to W in float32 (float64 if W is), and rounded once to W's dtype. In float32, PEFT's
    `merge_and_unload` has the same bits, on a CPU with fused multiply-adds, for ranks up to 192 and
    sides of at least 64; otherwise PyTorch's product sums in another order. There are four more
    differences:

    - In bfloat16 and float16, PEFT rounds the ΔW of embeddings and experts before the sum.
    - `modules_to_save` keep the model's dtype in PEFT. Here they get W's.
    - To a weight that embedding and head share, PEFT adds ΔW twice, jlora once.
    - jlora computes DoRA's norms in float64 from float32 values, PEFT in W's dtype.

    Args:
        path: a folder with `model.safetensors`, or with shards and
            `model.safetensors.index.json`; for diffusers with `diffusion_pytorch_model` instead of
            `model`. If it has both, what the library reads: transformers the one file, diffusers
            the shards. Its files, and those of `adapter`, may be links within the folder, or to
            files of models in the Hub's cache (`models--…/blobs`).
        adapter: a folder or file that `load` reads, or an adapter tree. The modules in a folder
            have the names of the checkpoint's tensors, or those of `transformers` 5 in memory; a
            first component such as `bert.` may differ. The checkpoint may fuse modules that
            `transformers` splits on loading, such as q, k and v; it stays fused.
        out: a folder that does not exist yet, or an empty one. It appears complete or not at
            all.
        names: for an adapter tree, its table of `Name` rows, such as `jlora.peft.TABLES["llama"]`.
        follow_links: whether files of `path` may be links out of it. Their content is copied.
        ignore: for an adapter in a folder, as in `load`.
        prefix: for a file of image LoRA, as in `load`.
        renamed: for other names, pairs of a regular expression and what replaces it in the names of
            tensors. They are replaced in this order, as by `re.sub`, and then are the adapter's.

    Returns:
        The files of `path` that were not copied, as paths in it.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        FileNotFoundError: if a folder or a file is missing.
        OSError: if `out` cannot be written. Nothing is left of it then.
        TypeError: if `adapter` is neither a path nor an adapter tree.
        ValueError: if the checkpoint is damaged, the adapter does not fit it, or merged values
            are not finite. All problems are listed, and nothing is written. Or if `JAX_PLATFORMS`
            leaves out the CPU, which computes.

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
    check_cpu()
    checkpoint = open_checkpoint(path, follow_links=follow_links, copied=True)
    if checkpoint.quantization:
        checkpoint, _ = dequantized(checkpoint)
    about = About("adapter", "cannot be merged into the checkpoint of `path`; nothing was written.")
    target, contents, shared, found = match_to_checkpoint(
        checkpoint, adapter, names, about, ignore, prefix, renamed
    )
    about = found.about
    edits, problems = find_edits(target.model, contents)
    about.stop([*found.problems, *problems])
    checkpoint = target.checkpoint
    edits = with_copies(edits, shared)
    about.stop(list_changed(target, contents))
    warn(found.config, found.unused)
    with fresh(out, "out") as folder:
        counts = write_tensors(checkpoint, folder, edits, "merge")
        why = "{} values are not finite after merging"
        about.stop(Problem(name, why.format(count)) for name, count in counts.items())
    return checkpoint.left_out
