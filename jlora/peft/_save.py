"""An adapter tree to PEFT's files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._adapters import Decomposed, Replaced, is_node
from .._tree import adapter_leaves, check_fits, is_abstract, name_of
from .._types import Path, PyTree
from ._file import DTYPES, PREFIX, listing
from ._load import fitted
from .adapter import _vllm
from .adapter._alone import alone_in, read_alone
from .adapter._config import DEFAULTS, MISS, MISS_DEFAULTS, ROWS_DEFAULTS, problems
from .adapter._fields import (
    Fields,
    frozen_beside,
    saved_in_full,
    with_full,
    with_targets,
    with_training,
)
from .adapter._miss import fields_of_lora, from_lora, is_miss, problems_of_miss
from .adapter._parts import (
    check_one_method,
    check_writable,
    from_leaves,
    head_of,
    is_factored,
    narrowed,
    rank_of,
    tensors_alone,
    tensors_of,
)
from .adapter._saved import in_memory, write
from .adapter._select import with_scales
from .adapter._tokens import DELTA, DELTA_ALONE, tokens_of, with_rows_alone, with_tokens
from .names._arrays import weights
from .names._names import Leaf, Name, by_row, resolve, tied_to


def save(
    path: str | os.PathLike[str],
    base: PyTree,
    adapter: PyTree,
    names: Sequence[Name],
    *,
    base_model: str | None = None,
    profile: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    r"""Writes an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    The layers of a scan become a module each, axes are flattened to PyTorch's, slots of a fused
    kernel become one A of rank slots·r and one B with zeros outside of each slot. The ΔW in the
    files is that of the adapter, bit for bit of A and B. DoRA is one flag for all sites; rows of an
    embedding are `trainable_token_indices`, or, if there is nothing else, `TRAINABLE_TOKENS`. What
    PEFT saves only as a whole, such as both parameters of a module, is written whole, with the
    base's values for what is not trained.

    Args:
        path: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        base: the frozen tree; `jax.ShapeDtypeStruct`s will do for what is not written.
        adapter: from `init`, training or `load`; dropout keys in it are ignored.
        names: a table of `Name` rows, such as `jlora.peft.LLAMA`.
        base_model: name or path of the base model, for PEFT's `base_model_name_or_path`.
        profile: `"vllm"` for an adapter that vLLM takes: one rank for all modules, from those that
            it has kernels for, with zeros in A and B, and the scales folded into B (alpha = r).
        config: fields of `adapter_config.json` to keep, such as those of `read_config`. Selection,
            ranks and alphas among them are kept where they describe the adapter, else replaced.
            With `{"peft_type": "MISS"}` what `initializers.miss` started is written as MiSS.

    Raises:
        FileExistsError: if `path` is there and not an empty folder.
        TypeError: if `adapter` is no adapter of arrays.
        ValueError: if a part of the adapter has no name or no form in PEFT; all are listed.

    Source: PEFT 0.21, `peft.PeftModel.save_pretrained`.

    Examples:
        >>> import json, pathlib, tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2, alpha=4))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, names)
        ...     fields = peft.read_config(f"{folder}/adapter")
        >>> fields["target_modules"], fields["r"], fields["lora_alpha"]
        (['q_proj'], 2, 4)
    """
    fields, found = _files(base, adapter, names, base_model, profile, config)
    write(path, "`path`", fields, found)


def tensors(
    base: PyTree,
    adapter: PyTree,
    names: Sequence[Name],
    *,
    profile: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    r"""The tensors that `save` writes, in memory: for an engine that takes weights without files.

    Keys, shapes, dtypes and bits are those of `adapter_model.safetensors`. Only what has another
    order of axes in PyTorch is copied; the rest shares memory with `adapter` where that lies on a
    CPU. What is on other devices is fetched from them.

    Args:
        base: as `save`.
        adapter: as `save`.
        names: as `save`.
        profile: as `save`.
        config: as `save`.

    Returns:
        Arrays by PEFT's keys.

    Raises:
        TypeError: as `save`.
        ValueError: as `save`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> for key, x in peft.tensors(base, adapter, names).items():
        ...     print(key, x.shape)
        base_model.model.model.q_proj.lora_A.weight (2, 4)
        base_model.model.model.q_proj.lora_B.weight (3, 2)
    """
    return _files(base, adapter, names, None, profile, config)[1]


def _files(
    base: PyTree,
    adapter: PyTree,
    names: Sequence[Name],
    base_model: str | None,
    profile: str | None,
    config: Mapping[str, Any] | None,
) -> tuple[Fields, dict[str, np.ndarray]]:
    """The configuration and the tensors, of which `load` makes the same adapter."""
    leaves = by_row(resolve(base, names), names)
    fields, stored = _of_leaves(leaves, base, adapter, names, base_model, profile, config)
    fitted(in_memory(fields, stored, "config"), leaves, _refuse)
    return fields, stored


def _of_leaves(
    leaves: Sequence[Leaf],
    base: PyTree,
    adapter: PyTree,
    names: Sequence[Name],
    base_model: str | None,
    profile: str | None,
    config: Mapping[str, Any] | None,
) -> tuple[Fields, dict[str, np.ndarray]]:
    if profile not in (None, "vllm"):
        raise ValueError(f"`profile` must be None or 'vllm'; got {profile!r}.")
    found = adapter_leaves(adapter)
    check_fits(base, found)
    check_writable(found, {leaf.path: leaf for leaf in leaves}, names)
    own = narrowed([leaf for leaf in leaves if is_factored(found.get(leaf.path))], found)
    with_rows = [leaf for leaf in leaves if isinstance(found.get(leaf.path), Replaced)]
    check_one_method(own, leaves, found)
    given = dict(config or {})
    as_miss = is_miss(given)
    if as_miss:
        config = fields_of_lora(given)
        _refuse_config(problems_of_miss(MISS_DEFAULTS | given))
        if profile is not None:
            raise ValueError(
                f"`profile` {profile!r} is of LoRA, and `config` asks for {MISS}. "
                "Leave peft_type out of it."
            )
    if base_model is not None:
        given["base_model_name_or_path"] = base_model
    if len(with_rows) == len(found):
        return _rows_alone(given, with_rows, leaves, found, profile)
    fields = DEFAULTS | (fields_of_lora(given) if as_miss else given)
    if own:
        fields["use_dora"] = any(isinstance(found[leaf.path], Decomposed) for leaf in own)
    _refuse_config(problems(fields))
    parts, tokens = from_leaves(own, found)[0], tokens_of(with_rows, found)
    tied = {leaf.modules[0]: head for leaf in own if (head := tied_to(leaf, leaves))}
    fields = with_targets(fields, leaves, own, tied)
    scales = {part.key: (rank_of(part, own), part.scale) for part in parts}
    scales |= {head: scales[module] for module, head in tied.items()}
    fields = with_scales(fields, scales) if scales else fields
    in_full = {path for path, x in found.items() if not is_node(x)}
    heads = {
        leaf.modules[0]: head
        for leaf in leaves
        if leaf.path in in_full and (head := tied_to(leaf, leaves))
    }
    fields = with_full(fields, leaves, own, in_full, heads)
    fields = with_training(fields, own, found, config or {})
    fields = with_tokens(fields, with_rows, leaves, found)
    full = saved_in_full(fields, leaves, own)
    frozen = frozen_beside(fields, own, tied)
    _check_values([*(leaf for leaf, _ in full if leaf.path not in found), *frozen.values()])
    if profile == "vllm":
        keys = [key for _, keys in full for key in keys]
        fields, parts = _vllm.flattened(fields, parts, keys, [x.module for x in tokens])
    stored = tensors_of([*parts, *(head_of(part, tied) for part in parts if part.key in tied)])
    for leaf, keys in full:
        value = found.get(leaf.path, leaf.value)
        stored |= dict(zip(keys, weights(leaf, value), strict=True))
        if head := heads.get(leaf.modules[0]):
            stored[f"{PREFIX}{head}.weight"] = weights(leaf, value)[0]
    stored |= {key: weights(leaf, leaf.value)[0] for key, leaf in frozen.items()}
    stored |= {f"{PREFIX}{x.module}{DELTA}": x.v for x in tokens}
    return from_lora(given, fields, parts, stored) if as_miss else (fields, stored)


def _rows_alone(
    given: Fields,
    own: Sequence[Leaf],
    leaves: Sequence[Leaf],
    found: Mapping[Path, Any],
    profile: str | None,
) -> tuple[Fields, dict[str, np.ndarray]]:
    """Those of an adapter that has nothing but the rows of `own`."""
    fields, tokens = (
        with_rows_alone(ROWS_DEFAULTS | given, own, leaves, found),
        tokens_of(own, found),
    )
    _refuse_config(problems(fields))
    if profile is not None:
        _vllm.flattened(fields, [], [], [x.module for x in tokens])
    heads = {leaf.modules[0]: tied_to(leaf, leaves) for leaf in own}
    each = ((m, x.v) for x in tokens for m in (x.module, heads[x.module]) if m)
    stored = {f"{PREFIX}{m}{DELTA_ALONE}": v for m, v in each}
    return fields, stored


def _refuse_config(wrong: Sequence[str]) -> None:
    if wrong:
        raise ValueError("`config` cannot be written:\n  " + "\n  ".join(wrong))


def to_vllm(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes an adapter of PEFT's as vLLM takes it, as `save` does with `profile="vllm"`.

    Args:
        path: its folder.
        out: a folder that does not exist yet, or an empty one.

    Raises:
        FileExistsError: if `out` is there and not an empty folder.
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged, or hold what vLLM has not.

    Examples:
        >>> from jlora import peft
        >>> peft.to_vllm("adapter", "for_vllm")  # doctest: +SKIP
    """
    alone = read_alone(path)
    fields = DEFAULTS | alone.adapter.fields
    fields, parts = _vllm.flattened(fields, alone.parts, list(alone.full), list(alone.rows))
    tensors = tensors_alone(parts, alone.tied, alone.frozen)

    def refuse(wrong: Sequence[str]) -> None:
        if wrong:
            raise ValueError(
                f"`path`: the adapter in {path} has no form for vLLM that would be read as the "
                f"same. {listing(wrong)}"
            )

    alone_in(in_memory(fields, tensors, "path"), refuse)
    write(out, "`out`", fields, tensors)


def _check_values(leaves: Sequence[Leaf]) -> None:
    bare = dict.fromkeys(name_of(leaf.path) for leaf in leaves if is_abstract(leaf.value))
    if bare:
        raise ValueError(
            "`base` must hold arrays where PEFT stores frozen values with the adapter; got "
            f"jax.ShapeDtypeStruct at {', '.join(bare)}."
        )
    odd = {
        name_of(leaf.path): leaf.value.dtype
        for leaf in leaves
        if leaf.value.dtype not in DTYPES.values()
    }
    if odd:
        raise ValueError(
            f"`base` must hold floats, of {', '.join(DTYPES)}, where PEFT stores frozen values "
            f"with the adapter; got {', '.join(f'{x} at {name}' for name, x in odd.items())}. "
            "Adapt another leaf, or export the merged model."
        )


def _refuse(wrong: Sequence[str]) -> None:
    if wrong:
        raise ValueError(
            "`adapter` has no form in PEFT that `load` would read as the same, as where its "
            f"modules cannot be selected apart from others. {listing(wrong)}"
        )
