"""Reads and writes adapters without their model."""

import dataclasses
import functools
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from .._adapters import Decomposed, LowRank, Replaced, is_node, state, weight_shape
from .._arrays import put
from .._errors import InputError, Problem
from .._types import Layout, short
from ._file import COUNT, COUNTS, DTYPES
from ._problems import Problems
from .adapter._arranged import explain_unstored
from .adapter._config import DEFAULTS, ROWS_ALONE, ROWS_DEFAULTS, problems_of
from .adapter._describe import NO_MODULE, find_scales, set_scales
from .adapter._draft import make_draft
from .adapter._files import Files, fill, list_tensors
from .adapter._fit_tree import refuse_wide
from .adapter._one_rank import with_profile
from .adapter._open import open_adapter
from .adapter._parameters import assign_parameters, find_twins, refuse_biases
from .adapter._patterns import Clock
from .adapter._roles import resolve
from .adapter._sorted import Parameters, Part, is_of_vocabulary, may_tie, sort_tensors
from .adapter._tokens import INDICES, Tokens, find_rows
from .names._leaves import NamedLeaf
from .names._names import Name
from .names._torch_layout import join_factors, split_factors

Leaf = LowRank | Decomposed | Replaced | np.ndarray | jax.Array
_ROWS = Layout((), (0,), (1,))
# The axes of the weights of linear modules, embeddings, experts, and convolutions.
_AXES = {Name("", "", axes).layout: axes for axes in ("oi", "vo", "eoi", "oik", "oikk", "oikkk")}


@dataclasses.dataclass(frozen=True)
class Contents:
    """An adapter without its model.

    Attributes:
        leaves: the leaves by PyTorch's names, with the axes of PyTorch's weights: a `LowRank` node
            for each module or parameter of experts (with DoRA a `Decomposed`), a `Replaced` for
            rows of an embedding, and an array for a parameter in full.
        config: the fields of `adapter_config.json`.
        tied: a dict from each adapted embedding to the head that shares its weight; the head has no
            leaf of its own.
        frozen: parameters of the base that PEFT stores with A and B, by name.
    """

    leaves: Mapping[str, Leaf]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    frozen: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def read(
    path: str | os.PathLike[str], *, ignore: Collection[str] = (), prefix: str | None = None
) -> Contents:
    r"""Reads an adapter without its model, to inspect it, or to change and `write` it.

    The file is checked as in `load`, but not against a model. If several parameters of a module of
    experts are adapted, the file does not distinguish them. They are then assigned in the order of
    `target_parameters` for which ranks and numbers of experts agree. But gate_up_proj is what has
    twice the outputs that down_proj has inputs, whatever the order.

    A file of kohya has `_` for the dots of module names. Without a model the two cannot be told
    apart, so that leaves have the names of its keys, such as `lora_unet_mid_block_0_to_q`. `write`
    can write such an adapter in the same dialect only.

    Args:
        path: the adapter's folder, or a file of image LoRA.
        ignore: as in `load`. The result does not have these fields.
        prefix: as in `load`.

    Returns:
        Leaves, configuration, ties and frozen values.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: as in `load`.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> names = [peft.Name(r"(.*)/kernel", r"\1", "io")]
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, names)
        ...     contents = peft.read(f"{folder}/adapter")
        >>> contents.leaves["model.q_proj"].b.shape
        (2, 3)
    """
    problems = Problems(f"`path`: the adapter in {path} cannot be read", path)
    return _read(open_adapter(path, "path", ignore, prefix), problems)


def write(
    path: str | os.PathLike[str],
    contents: Contents,
    profile: str | None = None,
    dialect: str = "peft",
    prefix: str | None = None,
) -> dict[str, Any]:
    r"""Writes an adapter without its model; inverts `read`.

    Values are written bit for bit. The fields that choose modules, ranks, alphas and rows are kept
    if they describe the leaves. Otherwise they are replaced: modules are then chosen by their whole
    names. If you leave out leaves, leave `target_modules` out of `contents.config` too: its short
    names would go on choosing their modules.

    Args:
        path: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        contents: from `read` or `combine`, or made of leaves.
        profile: as in `save`: `"vllm"` pads A and B with zeros to one rank, and multiplies the
            scales into B.
        dialect: as in `save`.
        prefix: as in `save`.

    Returns:
        The fields that were written. In other dialects than PEFT's, a file does not have them all.

    Raises:
        FileExistsError: if `path` exists and is not an empty folder.
        OSError: if `path` cannot be written. Nothing is left of it then.
        ValueError: if a leaf has other axes than PyTorch's weights; if `read` would refuse the
            files, such as for values that are not finite; if the `profile` does not support a leaf.

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
        ...     contents = peft.read(f"{folder}/adapter")
        ...     fields = peft.write(f"{folder}/served", contents, profile="vllm")
        >>> fields["r"], fields["lora_alpha"]
        (8, 8)
    """
    own = _as_parameters(contents)
    fields, own = with_profile(profile, _describe(contents, own), own)
    draft = make_draft(fields, own, contents.tied, dialect, prefix)
    title = "`contents` cannot be written so that `read` reads the same adapter"
    _read(draft.as_files("contents", contents.leaves), Problems(title))
    draft.write(path, "path")
    return fields


def _read(files: Files, problems: Problems) -> Contents:
    adapter = sort_tensors(files, problems)
    refuse_biases(adapter, problems)
    own = assign_parameters(adapter, None, "", problems)
    if not files.is_own:
        refuse_wide(list_tensors(own), problems)
    values = files.values(own, problems)
    problems.stop()
    own = fill(own, values)
    twins = find_twins(own.parts)
    is_table = {part.name: part.kind == "embedding" for part in own.parts}
    tied = {x.key: twins[x.name].key for x in own.parts if x.name in twins and is_table[x.name]}
    dropout = float(files.fields.get("lora_dropout", 0.0))
    nodes = {
        x.key: join_factors(_as_leaf(x), [x.arrays], scale=x.scale, dropout=dropout)
        for x in own.parts
        if is_table[x.name] or x.name not in twins
    }
    rows = {x.module: Replaced(put(x.v), x.rows, _ROWS) for x in own.tokens.values()}
    return Contents({**nodes, **rows, **own.full}, files.fields, tied, own.frozen)


def _as_leaf(part: Part) -> NamedLeaf:
    """Makes the leaf that a part adapts, with PyTorch's axes."""
    rows, columns = part.matrix
    axes, shape = {
        "embedding": ("vo", (columns, rows)),
        "linear": ("oi", (rows, columns)),
        "conv": ("oi" + "k" * (len(part.a.shape) - 2), (rows, *part.a.shape[1:])),
        "experts": ("eoi", (part.experts, rows, columns)),
    }[part.kind]
    return NamedLeaf((), None, shape, _name(axes), ("",))


@functools.cache
def _name(axes: str) -> Name:
    return Name("", "", axes)


def _as_parameters(contents: Contents) -> Parameters:
    """Converts the leaves to PEFT's layout."""
    parts, tokens, full = list[Part](), dict[str, Tokens](), dict[str, np.ndarray]()
    wrong = list[Problem]()
    for name, x in contents.leaves.items():
        is_array = isinstance(x, np.ndarray | jax.Array)
        arrays = state(x).values() if is_node(x) else [x] * is_array
        dtypes = COUNTS if name.endswith(COUNT) else DTYPES
        if odd := next(filter(None, (explain_unstored(y, dtypes) for y in arrays)), None):
            wrong.append(Problem(name, odd))
        elif is_array and "." in name:
            full[name] = np.asarray(x)
        elif isinstance(x, Replaced) and x.layout == _ROWS:
            tokens[f"{name}.weight"] = Tokens(name, x.rows, np.asarray(x.v))
        elif isinstance(x, LowRank | Decomposed) and (axes := _AXES.get(x.layout)):
            parts.append(_as_part(name, x, axes))
        else:
            why = f"expected a node with the axes of PyTorch's weight, or an array; got {short(x)}"
            wrong.append(Problem(name, why))
    if wrong:
        raise InputError("`contents` has leaves that cannot be written.", problems=wrong)
    return Parameters(parts, full, dict(contents.frozen), tokens, {})


def _as_part(key: str, x: LowRank | Decomposed, axes: str) -> Part:
    row = Name("", "", axes)
    leaf = NamedLeaf((), None, weight_shape(x), row, ("",))
    [(a, b, *m)] = split_factors(leaf, x)
    name = key if row.kind == "experts" else f"{key}.weight"
    return Part(name, row.kind or "", key, a, b, x.scale, None, m[0] if m else None, leaf.experts)


# ------------------------------------------------------------------------------- the configuration


def _describe(contents: Contents, own: Parameters) -> dict[str, Any]:
    """Makes a configuration that describes the contents; keeps the fields that do."""
    is_alone = contents.config.get("peft_type") == ROWS_ALONE
    fields = {**(ROWS_DEFAULTS if is_alone else DEFAULTS), **contents.config}
    if own.parts:
        fields["use_dora"] = any(part.m is not None for part in own.parts)
    elif not is_alone:
        fields["target_modules"] = NO_MODULE
    if wrong := problems_of(fields, is_file=False):
        raise InputError("`contents` has a configuration that cannot be written:", problems=wrong)
    rows = {x.module: x.rows for x in own.tokens.values()}
    keys = {part.key: part.kind == "experts" for part in own.parts}
    heads = [contents.tied[key] for key in keys if key in contents.tied]
    if is_alone:
        return _select(fields | _list_rows(rows), dict.fromkeys(rows, False), ())
    fields = _save(_select(fields, keys, heads), own)
    listed, _ = find_rows(fields, rows, problems := Problems(""))
    if listed != rows or problems.found:
        fields[INDICES] = {module: list(own) for module, own in rows.items()} or None
    return set_scales(fields, find_scales(own.parts, contents.tied)) if keys else fields


def _list_rows(rows: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Lists the rows of an adapter of rows alone; PEFT has one list for all embeddings."""
    lists = set(rows.values())
    if len(lists) > 1:
        each = [Problem(module, f"rows {own}") for module, own in rows.items()]
        why = "`contents` has different rows of embeddings, but `TRAINABLE_TOKENS` has one list."
        raise InputError(why, problems=each, remedy="Write each embedding by itself.")
    return {"token_indices": list(*lists)} if lists else {}


def _select(
    fields: dict[str, Any], keys: Mapping[str, bool], heads: Iterable[str]
) -> dict[str, Any]:
    """Selects modules, parameters of experts (True) and tied heads, if they are not all."""
    modules = {key: key.rpartition(".")[0] if is_deep else key for key, is_deep in keys.items()}
    roles = resolve(fields, {*modules.values(), *heads}, Clock())
    each = [
        key.rpartition(".")[2] in roles[modules[key]].parameters
        if is_deep
        else roles[key].adapts and not roles[key].saves
        for key, is_deep in keys.items()
    ]
    if all(each) and all(may_tie(fields, head) or roles[head].adapts for head in heads):
        return fields
    named = {
        "target_modules": [*(key for key, is_deep in keys.items() if not is_deep), *heads],
        "target_parameters": [key for key, is_deep in keys.items() if is_deep] or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return fields | {key: x for key, x in named.items() if key in fields}


def _save(fields: dict[str, Any], own: Parameters) -> dict[str, Any]:
    """Saves the modules of parameters in full, if not all are saved."""
    homes = {name: name.rpartition(".")[::2] for name in own.full}
    roles = resolve(fields, {module for module, _ in homes.values()}, Clock())
    adapted = {part.name.rpartition(".")[0] for part in own.parts}
    lost = dict.fromkeys(
        module
        for module, parameter in homes.values()
        if not roles[module].saves_whole(fields, parameter, module in adapted)
        and not may_tie(fields, module)
        and not is_of_vocabulary(module, parameter)
    )
    return fields | {"modules_to_save": [*(fields["modules_to_save"] or ()), *lost] or None}
