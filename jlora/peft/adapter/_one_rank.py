"""Writes adapters for vLLM: one rank, no patterns, only A and B."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..._errors import InputError, Problem
from .._problems import Problems
from ._alone import read_alone, write_alone
from ._config import DEFAULTS
from ._contents import Part

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def to_vllm(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, ignore: Collection[str] = ()
) -> None:
    r"""Rewrites a PEFT adapter for vLLM, as `save` writes it with `profile="vllm"`.

    All modules get one rank: A, (r, inputs), and B, (outputs, r), are padded with zeros, and the
    scales are multiplied into B. Dtypes do not change.

    Args:
        path: the adapter's folder.
        out: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        ignore: as in `load`. The new configuration does not have these fields.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged, or the adapter has a rank above 512, or anything other
            than LoRA of linear and embedding modules.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2, alpha=4))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, names)
        ...     peft.to_vllm(f"{folder}/adapter", f"{folder}/served")
        ...     fields = peft.read_config(f"{folder}/served")
        >>> fields["r"], fields["lora_alpha"]
        (8, 8)
    """
    alone = read_alone(path, ignore=ignore)
    fields = DEFAULTS | alone.adapter.fields
    found = alone.contents
    fields, parts = flatten_for_vllm(fields, found.parts, list(found.full), list(alone.rows))
    problems = Problems(f"`path`: the adapter in {path} cannot be written for vLLM", path)
    write_alone(out, fields, parts, [alone], problems, "path")


def flatten_for_vllm(
    fields: Mapping[str, Any], parts: Sequence[Part], full: Sequence[str], rows: Sequence[str]
) -> tuple[dict[str, Any], list[Part]]:
    """Pads all parts to one rank, and multiplies their scales into B.

    Raises:
        ValueError: if vLLM does not support a part, or if there are keys in `full` or `rows`.
    """
    wrong = [Problem(key, "trained in full") for key in full]
    wrong += [Problem(key, "rows of an embedding") for key in rows]
    wrong += [Problem(x.key, "DoRA") for x in parts if x.m is not None]
    odd = (x for x in parts if x.kind not in ("linear", "embedding"))
    wrong += [Problem(x.key, f"of kind {x.kind}") for x in odd]
    if wrong:
        raise InputError(
            "`profile` 'vllm' supports only LoRA of linear and embedding sites; got:",
            problems=wrong,
            remedy="Leave these out of the rules, or merge the adapter and serve the merged model.",
        )
    largest = max(x.a.shape[0] for x in parts)
    rank = next((r for r in RANKS if r >= largest), None)
    if rank is None:
        raise InputError(
            f"`profile` 'vllm' supports ranks up to {RANKS[-1]}; got {largest}. Lower it with "
            "jlora.arithmetic.truncate.",
        )
    new = [
        x._replace(
            a=np.pad(x.a, ((0, rank - len(x.a)), (0, 0))),
            b=np.pad(x.b * np.asarray(x.scale, x.b.dtype), ((0, 0), (0, rank - x.b.shape[1]))),
            scale=1.0,
        )
        for x in parts
    ]
    flat = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    return dict(fields) | flat, new
