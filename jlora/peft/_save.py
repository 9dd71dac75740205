"""An adapter tree to PEFT's files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .._tree import adapter_leaves, check_fits, is_abstract, name_of
from .._types import Path, PyTree
from ..adapters import LowRank, is_node
from . import _vllm
from ._arrays import factors, weights
from ._config import DEFAULTS, dumps, problems
from ._file import DTYPES, write
from ._names import Leaf, Name, resolve, tied_to
from ._plan import SAVED_BY_NAME, Plan, keeps_embedding, make_plan, ties
from ._select import suffixes, with_scales

Fields = dict[str, Any]


def save(
    dir: str | os.PathLike[str],
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
    files is that of the adapter, bit for bit of A and B. What PEFT saves only as a whole, such as
    both parameters of a module, is written whole, with the base's values for what is not trained.

    Args:
        dir: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        base: the frozen tree; `jax.ShapeDtypeStruct`s will do for what is not written.
        adapter: from `init`, training or `load`; dropout keys in it are ignored.
        names: a table of `Name` rows, such as `jlora.peft.LLAMA`.
        base_model: name or path of the base model, for PEFT's `base_model_name_or_path`.
        profile: `"vllm"` for an adapter that vLLM takes: one rank for all modules, from those that
            it has kernels for, with zeros in A and B, and the scales folded into B (alpha = r).
        config: fields of `adapter_config.json` to keep, such as those of `read_config`. Selection,
            ranks and alphas among them are kept where they describe the adapter, else replaced.

    Raises:
        FileExistsError: if `dir` is there and not an empty folder.
        TypeError: if `adapter` is no adapter of arrays.
        ValueError: if a part of the adapter has no name or no form in PEFT; all are listed.

    Source: PEFT 0.21, `peft.PeftModel.save_pretrained`.

    Example:
        >>> import json, pathlib, tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2, alpha=4))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, peft.LLAMA)
        ...     fields = peft.read_config(f"{folder}/adapter")
        >>> fields["target_modules"], fields["r"], fields["lora_alpha"]
        (['q_proj'], 2, 4)
    """
    if profile not in (None, "vllm"):
        raise ValueError(f"`profile` must be None or 'vllm'; got {profile!r}.")
    found = adapter_leaves(adapter)
    check_fits(base, found)
    leaves = resolve(base, names)
    check_writable(found, {leaf.path: leaf for leaf in leaves})
    low = {path: x for path, x in found.items() if is_node(x)}
    fields = DEFAULTS | dict(config or {})
    if base_model is not None:
        fields["base_model_name_or_path"] = base_model
    if wrong := problems(fields):
        raise ValueError("`config` cannot be written:\n  " + "\n  ".join(wrong))
    fields = _with_targets(fields, leaves, names, low)
    fields = _with_full(fields, leaves, names, set(found) - set(low))
    fields = _with_training(fields, leaves, low, config or {})
    plan = make_plan(fields, leaves, names)
    _check_plan(plan, low)
    _check_values(plan, found, keeps_embedding(fields, plan))
    tensors = _tensors(plan, found, keeps_embedding(fields, plan))
    if profile == "vllm":
        fields, tensors = _vllm.convert(fields, tensors, plan)
    write(dir, dumps(fields), tensors)


def check_writable(found: dict[Path, Any], leaves: dict[Path, Leaf]) -> None:
    """Raises, naming every leaf that cannot be written."""
    wrong = [
        f"  {name_of(path)}: {why}"
        for path, x in found.items()
        if (why := _unwritable(x, leaves.get(path)))
    ]
    if wrong:
        raise ValueError(
            "`adapter` cannot be written with `names`:\n"
            + "\n".join(wrong)
            + "\nAdd rows to `names`, such as jlora.peft.Name(r'(.*)/kernel', r'\\1', 'io')."
        )


def _unwritable(x: Any, leaf: Leaf | None) -> str | None:
    if leaf is None:
        return "no row of `names` fits its path and number of axes"
    if is_node(x) and not isinstance(x, LowRank):
        return f"PEFT's files have no place for a {type(x).__name__}"
    arrays = (x.a, x.b) if isinstance(x, LowRank) else (x,)
    if any(isinstance(y, jax.ShapeDtypeStruct) for y in arrays):
        return "expected arrays, got jax.ShapeDtypeStruct"
    if odd := [y.dtype for y in arrays if y.dtype not in DTYPES.values()]:
        return f"expected a dtype of {', '.join(DTYPES)}, got {odd[0]}"
    if any(not np.isfinite(np.asarray(y)).all() for y in arrays):
        return "holds values that are not finite"
    if not isinstance(x, LowRank):
        return None
    if leaf.name.kind is None:
        return (
            f"is adapted, but its row of `names` has axes {leaf.name.axes!r}, which are no matrix"
        )
    ours, wanted = x.layout, leaf.name.layout
    if set(wanted.inputs) <= set(ours.inputs) and set(wanted.outputs) <= set(ours.outputs):
        return None
    return f"expected {wanted} by `names`, got {ours}"


def _rank(x: LowRank) -> int:
    """The rank in the file, where slots lie beside one another."""
    return x.a.shape[-1] * (len(x.layout.slots[1]) if x.layout.slots else 1)


def _with_targets(
    fields: Fields, leaves: Sequence[Leaf], names: Sequence[Name], low: Mapping[Path, LowRank]
) -> Fields:
    """`fields` that select the adapted leaves with their ranks and scales."""
    own = [leaf for leaf in leaves if leaf.path in low]
    plan = make_plan(fields, leaves, names)
    if {a.leaf.path for a in plan.adapted} != set(low) or plan.problems:
        fields = fields | _targets(leaves, own)
    forms = {leaf.path: (_rank(low[leaf.path]), low[leaf.path].scale) for leaf in own}
    scales = {leaf.key(m): forms[leaf.path] for leaf in own for m in leaf.modules}
    scales |= {head: forms[path] for path, head in _heads(leaves, own).items()}
    return with_scales(fields, scales) if scales else fields


def _targets(leaves: Sequence[Leaf], own: Sequence[Leaf]) -> Fields:
    """The fields that select the leaves `own` and no others."""
    paths = {leaf.path for leaf in own}
    others = [leaf for leaf in leaves if leaf.path not in paths and leaf.name.kind]
    ties_all = {"ensure_weight_tying": True}
    new: Fields = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    new["ensure_weight_tying"] = any(
        tied_to(leaf, leaves) and ties(ties_all, leaf.modules[0]) for leaf in own
    )
    # What PEFT does not tie itself is selected by name.
    heads = [] if new["ensure_weight_tying"] else _heads(leaves, own).values()
    wanted = [*_keys(own, experts=False), *heads]
    # By a bare name of these, PEFT would store the frozen weights too.
    whole = [m for m in wanted if m.rpartition(".")[2] in SAVED_BY_NAME]
    short = suffixes([m for m in wanted if m not in whole], _keys(others, experts=False))
    new["target_modules"] = whole + short
    new["target_parameters"] = (
        suffixes(_keys(own, experts=True), _keys(others, experts=True)) or None
    )
    return new


def _keys(leaves: Sequence[Leaf], *, experts: bool) -> list[str]:
    found = (leaf for leaf in leaves if (leaf.name.kind == "experts") == experts)
    return [leaf.key(m) for leaf in found for m in leaf.modules]


def _heads(leaves: Sequence[Leaf], own: Sequence[Leaf]) -> dict[Path, str]:
    """The heads that are tied to an adapted embedding."""
    found = {leaf.path: tied_to(leaf, leaves) for leaf in own}
    return {path: head for path, head in found.items() if head}


def _with_full(
    fields: Fields, leaves: Sequence[Leaf], names: Sequence[Name], full: set[Path]
) -> Fields:
    """`fields` that save the leaves trained in full: by `bias`, the rest by `modules_to_save`."""
    if _saved(fields, leaves, names) == full:
        return fields
    every, of_lora = (
        _saved(fields | {"modules_to_save": None, "bias": bias}, leaves, names)
        for bias in ("all", "lora_only")
    )
    # Beside "all", PEFT would store the biases of `modules_to_save` three times.
    bias = "all" if full == every else "lora_only" if full & of_lora else "none"
    rest = {"all": set(), "lora_only": full - of_lora, "none": full}[bias]
    modules = [m for leaf in leaves if leaf.path in rest for m in leaf.modules]
    return fields | {"bias": bias, "modules_to_save": list(dict.fromkeys(modules)) or None}


def _saved(fields: Fields, leaves: Sequence[Leaf], names: Sequence[Name]) -> set[Path]:
    return {s.leaf.path for s in make_plan(fields, leaves, names).saved}


def _with_training(
    fields: Fields,
    leaves: Sequence[Leaf],
    low: Mapping[Path, LowRank],
    config: Mapping[str, Any],
) -> Fields:
    """`fields` with dropout, orientation and tying."""
    own = [leaf for leaf in leaves if leaf.path in low]
    dropouts = {x.dropout for x in low.values()}
    if "lora_dropout" not in config and len(dropouts) > 1:
        raise ValueError(
            f"`adapter` has the dropout rates {sorted(dropouts)}, but PEFT has one for all. "
            "Choose it by config={'lora_dropout': 0.1}."
        )
    new: Fields = {}
    if "lora_dropout" not in config:
        new["lora_dropout"] = next(iter(dropouts), 0.0)
    if "fan_in_fan_out" not in config:
        new["fan_in_fan_out"] = any(
            leaf.name.transposed for leaf in own if leaf.name.kind == "linear"
        )
    return fields | new


def _check_plan(plan: Plan, low: Mapping[Path, LowRank]) -> None:
    planned = {a.leaf.path for a in plan.adapted}
    wrong = plan.problems + [
        f"{name_of(path)}: PEFT cannot select its module apart from others"
        for path in planned ^ set(low)
    ]
    if wrong:
        raise ValueError("`adapter` has no form in PEFT:\n  " + "\n  ".join(wrong))


def _check_values(plan: Plan, found: Mapping[Path, Any], embedding: bool) -> None:
    used = [s.leaf for s in plan.saved if s.leaf.path not in found]
    used += plan.copies.values() if embedding else []
    bare = dict.fromkeys(name_of(leaf.path) for leaf in used if is_abstract(leaf.value))
    if bare:
        raise ValueError(
            "`base` must hold arrays where PEFT stores frozen values with the adapter; got "
            f"jax.ShapeDtypeStruct at {', '.join(bare)}."
        )


def _tensors(plan: Plan, found: Mapping[Path, Any], embedding: bool) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for leaf, _, _, keys in plan.adapted:
        for pair, arrays in zip(keys, factors(leaf, found[leaf.path]), strict=True):
            tensors |= dict(zip(pair, arrays, strict=True))
    for leaf, keys in plan.saved:
        value = found.get(leaf.path, leaf.value)
        tensors |= dict(zip(keys, weights(leaf, value), strict=True))
    for key, source in plan.tied.items():
        tensors[key] = np.ascontiguousarray(tensors[source].T)
    if embedding:
        tensors |= {key: weights(leaf, leaf.value)[0] for key, leaf in plan.copies.items()}
    return tensors
