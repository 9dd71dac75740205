"""An adapter tree to PEFT's files."""

import collections
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from .._folders import fresh
from .._tree import adapter_leaves, check_fits, is_abstract, name_of
from .._types import Path, PyTree
from ..adapters import LowRank, is_node
from . import _vllm
from ._config import DEFAULTS, dumps, problems
from ._file import CONFIG, DTYPES, TENSORS
from ._load import read_alone
from ._names import Leaf, Name, adapted, by_row, factors, resolve, tied_to, weights
from ._read import BASE, PREFIX, SAVED_BY_NAME, Part, Stored, parse, parts_of
from ._select import Selection, suffixes, with_scales

AB = ("A.weight", "B.weight")
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

    Examples:
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
    fields, found = _files(base, adapter, names, base_model, profile, config)
    write(dir, "`dir`", fields, found)


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
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> for key, x in peft.tensors(base, adapter, peft.LLAMA).items():
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
    """The configuration and the tensors."""
    if profile not in (None, "vllm"):
        raise ValueError(f"`profile` must be None or 'vllm'; got {profile!r}.")
    found = adapter_leaves(adapter)
    check_fits(base, found)
    leaves = by_row(resolve(base, names), names)
    check_writable(found, {leaf.path: leaf for leaf in leaves})
    own = narrowed([leaf for leaf in leaves if is_node(found.get(leaf.path))], found)
    fields = DEFAULTS | dict(config or {})
    if base_model is not None:
        fields["base_model_name_or_path"] = base_model
    if wrong := problems(fields):
        raise ValueError("`config` cannot be written:\n  " + "\n  ".join(wrong))
    parts, _ = from_leaves(own, found)
    tied = {leaf.modules[0]: head for leaf in own if (head := tied_to(leaf, leaves))}
    fields = _with_targets(fields, leaves, own, tied)
    scales = {part.key: (_rank(part, own), part.scale) for part in parts}
    scales |= {head: scales[module] for module, head in tied.items()}
    fields = with_scales(fields, scales) if scales else fields
    fields = _with_full(fields, leaves, own, {p for p, x in found.items() if not is_node(x)})
    fields = _with_training(fields, own, found, config or {})
    full = _full(fields, leaves, own)
    frozen = _frozen(fields, own, tied)
    _check_values([*(leaf for leaf, _ in full if leaf.path not in found), *frozen.values()])
    if profile == "vllm":
        in_full = [key for _, keys in full for key in keys]
        fields, parts = _vllm.flattened(fields, parts, in_full)
    stored = tensors_of([*parts, *(_head(part, tied) for part in parts if part.key in tied)])
    for leaf, keys in full:
        value = found.get(leaf.path, leaf.value)
        stored |= dict(zip(keys, weights(leaf, value), strict=True))
    stored |= {key: weights(leaf, leaf.value)[0] for key, leaf in frozen.items()}
    _check_form(fields, stored, leaves)
    return fields, stored


def narrowed(leaves: Sequence[Leaf], found: Mapping[Path, Any]) -> list[Leaf]:
    """The leaves of an adapter, those of several modules as of the adapted ones alone."""
    nodes = ((leaf, found[leaf.path]) for leaf in leaves)
    return [adapted(leaf, x) if isinstance(x, LowRank) else leaf for leaf, x in nodes]


def from_leaves(
    leaves: Sequence[Leaf], found: Mapping[Path, Any]
) -> tuple[list[Part], dict[str, np.ndarray]]:
    """A and B, and what is in full, by PyTorch's names."""
    full = dict[str, np.ndarray]()
    pieces = collections.defaultdict[str, list[tuple[Leaf, Part]]](list)
    for leaf in leaves:
        x, name = found[leaf.path], leaf.name
        if not isinstance(x, LowRank):
            full |= dict(zip(leaf.parameters, weights(leaf, x), strict=True))
            continue
        # What is swapped has PEFT's B·A in the order of PyTorch's axes.
        transposed = name.transposed
        if name.kind == "experts":
            transposed = False if name.swapped else None
        scale = x.scale / leaf.factor
        each = zip(leaf.parameters, leaf.modules, factors(leaf, x), strict=True)
        for key, module, (a, b) in each:
            part = Part(key, name.kind or "", leaf.key(module), a, b, scale, transposed)
            pieces[key].append((leaf, part))
    return [_joined(own) for own in pieces.values()], full


def _joined(pieces: Sequence[tuple[Leaf, Part]]) -> Part:
    """A parameter, from what there is of its parts.

    It has one A if all have the same; else all of them, and a B with zeros outside of each part's
    own outputs.
    """
    leaf, first = pieces[0]
    if leaf.name.part is None:
        return first
    (_, count), experts = leaf.name.part, leaf.experts
    own = {other.name.part[0]: part for other, part in pieces if other.name.part}
    a = [x.a.reshape(experts, -1, x.a.shape[1]) for x in own.values()]
    ends = np.cumsum([x.shape[1] for x in a])
    if len(own) == count and all(_is_alike(x, first) for x in own.values()):
        a, ends = a[:1], [a[0].shape[1]] * count
    b = np.zeros((count, len(first.b), ends[-1], experts), first.b.dtype)
    for (j, x), end in zip(own.items(), ends, strict=True):
        factor = x.b.reshape(len(x.b), -1, experts)
        b[j, :, end - factor.shape[1] : end] = factor * np.asarray(x.scale / first.scale, b.dtype)
    whole = np.concatenate(a, 1).reshape(-1, first.a.shape[1])
    return first._replace(a=whole, b=b.reshape(count * len(first.b), -1))


def _is_alike(x: Part, y: Part) -> bool:
    return x.scale == y.scale and np.array_equal(x.a, y.a)


def tensors_of(parts: Sequence[Part]) -> dict[str, np.ndarray]:
    """A and B by PEFT's keys: each parameter of a module wraps the wrapper of those before it."""
    left = collections.Counter(part.name.rpartition(".")[0] for part in parts)
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        module = part.name.rpartition(".")[0]
        left[module] -= 1
        start = f"{PREFIX}{module}{BASE * left[module]}.lora_"
        ends = ("embedding_A", "embedding_B") if part.kind == "embedding" else AB
        tensors |= {start + end: x for end, x in zip(ends, (part.a, part.b), strict=True)}
    return tensors


def write(
    dir: str | os.PathLike[str],
    what: str,
    fields: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
) -> None:
    """Both files of an adapter in a new folder `dir`, or nothing."""
    with fresh(dir, what) as folder:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        # As bytes: text would get other line ends on Windows.
        (folder / CONFIG).write_bytes(dumps(fields).encode())


def convert(dir: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> None:
    """Writes an adapter of PEFT's as vLLM takes it, as `save` does with `profile="vllm"`.

    Args:
        dir: its folder.
        out_dir: a folder that does not exist yet, or an empty one.

    Raises:
        FileExistsError: if `out_dir` is there and not an empty folder.
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if the files are damaged, or hold what vLLM has not.

    Examples:
        >>> from jlora import peft
        >>> peft.convert("adapter", "for_vllm")  # doctest: +SKIP
    """
    alone = read_alone(dir)
    fields = DEFAULTS | alone.adapter.fields
    fields, parts = _vllm.flattened(fields, alone.parts, list(alone.full))
    write(out_dir, "`out_dir`", fields, tensors_alone(parts, alone.tied, alone.frozen))


def tensors_alone(
    parts: Sequence[Part], tied: Mapping[str, str], frozen: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """All tensors of an adapter without leaves in full, whose model is not at hand."""
    names = {name: name.rpartition(".") for name in frozen}
    return tensors_of([*parts, *(_head(part, tied) for part in parts if part.key in tied)]) | {
        f"{PREFIX}{m}{BASE}.{p}": frozen[name] for name, (m, _, p) in names.items()
    }


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
        return "in full, but is a part of a parameter of PyTorch" if leaf.name.part else None
    if leaf.name.kind is None:
        return (
            f"is adapted, but its row of `names` has axes {leaf.name.axes!r}, which are no matrix"
        )
    ours, wanted = x.layout, leaf.name.layout
    if set(wanted.inputs) <= set(ours.inputs) and set(wanted.outputs) <= set(ours.outputs):
        return None
    return f"expected {wanted} by `names`, got {ours}"


def _rank(part: Part, leaves: Sequence[Leaf]) -> int:
    """The rank in the file, where slots lie beside one another."""
    experts = {leaf.key(module): leaf.experts for leaf in leaves for module in leaf.modules}
    return part.a.shape[0] // experts[part.key]


def _head(table: Part, tied: Mapping[str, str]) -> Part:
    """The head that shares the weight of an embedding."""
    a, b = (np.ascontiguousarray(x.T) for x in (table.b, table.a))
    head = tied[table.key]
    return table._replace(name=f"{head}.weight", kind="linear", key=head, a=a, b=b)


def _with_targets(
    fields: Fields, leaves: Sequence[Leaf], own: Sequence[Leaf], tied: Mapping[str, str]
) -> Fields:
    """`fields` that select the leaves `own`, and the heads `tied` to them, and no others."""
    selection = Selection(fields)
    selection.prepare([m for leaf in leaves for m in leaf.modules])
    chosen = {name for leaf in own for name in leaf.parameters}
    as_wanted = all(
        _adapts(selection, leaf, module) == (name in chosen)
        for leaf in leaves
        for module, name in zip(leaf.modules, leaf.parameters, strict=True)
    )
    if as_wanted and all(ties(fields, m) or selection.adapts(h) for m, h in tied.items()):
        return fields
    others = [_but(leaf, chosen) for leaf in leaves if leaf.name.kind]
    ties_all = {"ensure_weight_tying": True}
    new: Fields = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    new["ensure_weight_tying"] = any(ties(ties_all, module) for module in tied)
    # What PEFT does not tie itself is selected by name.
    heads = [] if new["ensure_weight_tying"] else tied.values()
    wanted = [*_keys(own, experts=False), *heads]
    # By a bare name of these, PEFT would store the frozen weights too.
    whole = [m for m in wanted if m.rpartition(".")[2] in SAVED_BY_NAME]
    short = suffixes([m for m in wanted if m not in whole], _keys(others, experts=False))
    new["target_modules"] = whole + short
    new["target_parameters"] = (
        suffixes(_keys(own, experts=True), _keys(others, experts=True)) or None
    )
    return fields | new


def _but(leaf: Leaf, chosen: Collection[str]) -> Leaf:
    """`leaf` without the modules of which `chosen` has the parameter."""
    each = zip(leaf.modules, leaf.parameters, strict=True)
    return leaf._replace(modules=tuple(module for module, name in each if name not in chosen))


def _adapts(selection: Selection, leaf: Leaf, module: str) -> bool:
    if leaf.name.kind is None or selection.saves(module):
        return False
    if leaf.name.parameter in selection.parameters(module):
        return True
    whole = leaf.name.kind != "experts" and leaf.name.parameter == "weight"
    return whole and selection.adapts(module)


def ties(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT gives the head that is tied to the embedding `module` the same A and B."""
    # It knows embeddings by these names alone.
    return bool(fields.get("ensure_weight_tying")) and module.rpartition(".")[2] in SAVED_BY_NAME


def _keys(leaves: Sequence[Leaf], *, experts: bool) -> list[str]:
    found = (leaf for leaf in leaves if (leaf.name.kind == "experts") == experts)
    return [leaf.key(m) for leaf in found for m in leaf.modules]


def _with_full(
    fields: Fields, leaves: Sequence[Leaf], own: Sequence[Leaf], wanted: set[Path]
) -> Fields:
    """`fields` that save the leaves trained in full: by `bias`, the rest by `modules_to_save`."""

    def saved(fields: Fields) -> set[Path]:
        return {leaf.path for leaf, _ in _full(fields, leaves, own)}

    if saved(fields) == wanted:
        return fields
    every, of_lora = (
        saved(fields | {"modules_to_save": None, "bias": bias}) for bias in ("all", "lora_only")
    )
    # Beside "all", PEFT would store the biases of `modules_to_save` three times.
    bias = "all" if wanted == every else "lora_only" if wanted & of_lora else "none"
    rest = {"all": set(), "lora_only": wanted - of_lora, "none": wanted}[bias]
    modules = [m for leaf in leaves if leaf.path in rest for m in leaf.modules]
    return fields | {"bias": bias, "modules_to_save": list(dict.fromkeys(modules)) or None}


def _full(
    fields: Fields, leaves: Sequence[Leaf], own: Sequence[Leaf]
) -> list[tuple[Leaf, list[str]]]:
    """The leaves that are saved in full, with a key for each of their modules."""
    selection, bias = Selection(fields), fields.get("bias", "none")
    adapted = {module for leaf in own for module in leaf.modules}

    def key(leaf: Leaf, module: str) -> str | None:
        parameter = leaf.name.parameter
        if selection.saves(module):
            return f"{PREFIX}{module}.{parameter}"
        if parameter == "bias" and module in adapted and bias in ("all", "lora_only"):
            return f"{PREFIX}{module}{BASE}.bias"
        return f"{PREFIX}{module}.bias" if parameter == "bias" and bias == "all" else None

    keys = [(leaf, [key(leaf, module) for module in leaf.modules]) for leaf in leaves]
    found = [(leaf, [k for k in each if k]) for leaf, each in keys]
    return [(leaf, each) for leaf, each in found if len(each) == len(leaf.modules)]


def _frozen(fields: Fields, own: Sequence[Leaf], tied: Mapping[str, str]) -> dict[str, Leaf]:
    """The frozen embeddings and heads that PEFT stores beside A and B, by their keys."""
    target = fields["target_modules"]
    lasts = [module.rpartition(".")[2] for leaf in own for module in leaf.modules]
    if not any(name in (target if isinstance(target, list) else lasts) for name in SAVED_BY_NAME):
        return {}
    return {
        f"{PREFIX}{module}{BASE}.weight": leaf
        for leaf in own
        if leaf.name.tied or leaf.modules[0].rpartition(".")[2] in SAVED_BY_NAME
        for module in (*leaf.modules, tied.get(leaf.modules[0]))
        if module
    }


def _with_training(
    fields: Fields, own: Sequence[Leaf], found: Mapping[Path, Any], config: Mapping[str, Any]
) -> Fields:
    """`fields` with dropout and orientation."""
    dropouts = {found[leaf.path].dropout for leaf in own}
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


def _check_values(leaves: Sequence[Leaf]) -> None:
    bare = dict.fromkeys(name_of(leaf.path) for leaf in leaves if is_abstract(leaf.value))
    if bare:
        raise ValueError(
            "`base` must hold arrays where PEFT stores frozen values with the adapter; got "
            f"jax.ShapeDtypeStruct at {', '.join(bare)}."
        )


def stored_as(tensors: Mapping[str, np.ndarray]) -> list[Stored]:
    """The tensors as a file has them."""
    types = {dtype: name for name, dtype in DTYPES.items()}
    return [Stored(key, types[x.dtype], x.shape) for key, x in tensors.items()]


def _check_form(fields: Fields, tensors: Mapping[str, np.ndarray], leaves: Sequence[Leaf]) -> None:
    """What is to be written must be read as the same."""
    adapter = parse(fields, stored_as(tensors), "`config`")
    shapes = {parameter: leaf.weight_shape for leaf in leaves for parameter in leaf.parameters}
    parts_of(adapter, shapes, "`base` under `names`", ordered=True)
    if adapter.wrong:
        raise ValueError(
            "`adapter` has no form in PEFT, as it cannot select its modules apart from others. "
            "Read again, it would have\n  " + "\n  ".join(adapter.wrong)
        )
