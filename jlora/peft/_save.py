"""Writes an adapter tree as PEFT's files."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._adapters import is_node
from .._errors import InputError, shorten, stop
from .._tree import problems_at
from .._types import PyTree
from ._checkpoint import open_checkpoint
from ._file import read_json
from ._load import fit
from ._problems import About
from ._source import Source
from .adapter._arranged import Tree, arrange
from .adapter._config import LIMIT
from .adapter._describe import (
    Configuration,
    describe,
    find_frozen,
    find_full,
    set_training,
)
from .adapter._draft import Draft, make_draft
from .adapter._one_rank import with_profile
from .adapter._parts import Parameters, Part, Values, list_changes, wholes
from .adapter._roles import make_saves
from .adapter._sorted import may_tie
from .adapter._writable import explain_unstored
from .names._leaves import NamedLeaf
from .names._names import Name
from .names._torch_layout import split_weight
from .names._weights import split_all
from .places._find import find


def save(
    out: str | os.PathLike[str],
    base: PyTree,
    adapter: PyTree,
    names: Sequence[Name],
    *,
    base_model: str | os.PathLike[str] | None = None,
    profile: str | None = None,
    config: Mapping[str, Any] | None = None,
    dialect: str = "peft",
    prefix: str | None = None,
) -> None:
    r"""Writes an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    The values of A and B are written bit for bit. Each layer of a scan becomes a module. Axes are
    flattened to PyTorch's. The slots of a fused kernel become one A of rank slots·r, and one B with
    zeros outside each slot. PEFT has one DoRA flag for all sites, so LoRA beside DoRA is refused.
    Rows of an embedding become `trainable_token_indices`. PEFT saves some modules only as a whole:
    then frozen parameters are written too, with the values in `base`.

    Args:
        out: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        base: the frozen tree. `jax.ShapeDtypeStruct`s suffice where no value is written.
        adapter: from `init`, training or `load`. Dropout keys in it are ignored.
        names: a table of `Name` rows, such as `jlora.peft.TABLES["llama"]`.
        base_model: the name of the base model, for PEFT's `base_model_name_or_path`; or the model's
            folder as a `pathlib.Path`. The name is then `_name_or_path` in its `config.json`, or
            else its path.
        profile: `"vllm"` for vLLM: all modules get one rank, which vLLM has kernels for. A and B
            are padded with zeros, and the scales are multiplied into B (alpha = r). A of experts
            has the inputs, where PEFT's may have the outputs.
        config: fields of `adapter_config.json` to keep, such as `read(path).config`. If it has
            `target_modules`, its fields choose the modules and rows, and what is saved whole; they
            must choose those of the adapter. Otherwise jlora chooses them, as it does in a model
            with experts if there is no `peft_version`. Ranks and alphas are replaced unless they
            are those of the adapter.
        dialect: what reads the files. `"peft"`: two files, as above. For image LoRA, one file:
            `pytorch_lora_weights.safetensors` in the folder `out`, or `out` itself if it ends in
            `.safetensors`. `"diffusers"`: keys `prefix.module.lora_A.weight`, and the configuration
            in the file's header. `"kohya"`: keys `lora_prefix_module.lora_down.weight`, with `_`
            for the dots of module, and an `alpha` for each module, as ComfyUI reads them.
        prefix: for `"diffusers"` the model's name in its pipeline, such as `"unet"` or
            `"transformer"`; `""` for none, as `save_lora_adapter` writes. For `"kohya"`
            `"unet"` for a UNet, which is the default, and for Qwen-Image; `"transformer"` for Flux
            and SD 3; or that of a text encoder, such as `"te1"`. No tool reads other models there.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        FileNotFoundError: if `base_model` is a folder without `config.json`.
        OSError: if `out` cannot be written. Nothing is left of it then.
        TypeError: if `adapter` is no adapter of arrays, or `names` is not a table.
        ValueError: if a leaf of the adapter has no name, or no form in PEFT or in the `dialect`;
            image LoRA has only linear and convolutional sites. All are listed. Or if `profile`,
            `dialect`, `prefix` or `config` has a value that cannot be.

    Warns:
        UserWarning: for `"kohya"`, if diffusers would compute something else with the file: with
            DoRA, whose magnitudes it drops, with modules that it does not read there, or with
            several alphas in a UNet. If `base_model` is the folder of a model with a head, and the
            modules have the names of the model inside, which PEFT does not find there.

    Source: PEFT 0.21, `peft.PeftModel.save_pretrained`; diffusers 0.42, `load_lora_adapter`.

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
        ...     fields = peft.read(f"{folder}/adapter").config
        >>> fields["target_modules"], fields["r"], fields["lora_alpha"]
        (['q_proj'], 2, 4)

        For a pipeline of diffusers:

        >>> from safetensors.numpy import load_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/style.safetensors"
        ...     peft.save(file, base, adapter, names, dialect="diffusers", prefix="unet")
        ...     keys = list(load_file(file))
        >>> keys
        ['unet.model.q_proj.lora_A.weight', 'unet.model.q_proj.lora_B.weight']
    """
    draft = _draft(base, adapter, names, base_model, profile, config, dialect, prefix)
    draft.write(out)


def tensors(
    base: PyTree,
    adapter: PyTree,
    names: Sequence[Name],
    *,
    profile: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    r"""Returns the tensors that `save` writes, for an engine that takes weights without files.

    Keys, shapes, dtypes and bits are those of `adapter_model.safetensors`. A tensor may
    share memory with `adapter`, or with `base` if it is frozen. It is copied if it is reordered (as
    A and B of a rank above 1 are), rescaled, padded, joined, or not on a CPU.

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
    return _draft(base, adapter, names, None, profile, config).tensors


def _draft(
    base: PyTree,
    adapter: PyTree,
    names: Sequence[Name],
    base_model: str | os.PathLike[str] | None,
    profile: str | None,
    config: Mapping[str, Any] | None,
    dialect: str = "peft",
    prefix: str | None = None,
) -> Draft:
    """Makes the files, and checks that `load` would read them."""
    tree = arrange(base, adapter, names)
    given = dict(config or {})
    if base_model is not None:
        given["base_model_name_or_path"] = _name_model(base_model)
    parts = tree.parts
    fields = describe(given, tree, parts, About("config", "cannot be written."))
    fields = set_training(fields, given, tree)
    fields, own = with_profile(profile, fields, _collect(fields, tree, parts))
    draft = make_draft(fields, own, tree.tied, dialect, prefix, tree.modules)
    about = About(
        "adapter",
        "cannot be written so that `load` reads the same adapter: its modules cannot be selected "
        "apart from others or from those that PEFT saves as a whole, or `config` selects others. "
        "Then leave target_modules out of it; or train these leaves in full, or merge them.",
    )
    _, _, again = fit(draft.as_files("config", tree.modules), tree.leaves, about)
    about.stop(list_changes(own, again))
    if base_model is not None:
        _warn_of_prefix(Path(base_model), own)
    return draft


def _name_model(given: str | os.PathLike[str]) -> str:
    """Returns a name, or the name of the model in a folder."""
    if isinstance(given, str):
        return given
    config = read_json(Source(Path(given), "base_model"), "config.json", LIMIT)
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and name else os.fspath(given)


def _warn_of_prefix(folder: Path, own: Values) -> None:
    """Warns if a model has the modules of an adapter inside of another, where PEFT has no such.

    A folder that cannot be read, or is none, is not compared.
    """
    with contextlib.suppress(ValueError, OSError):
        checkpoint = open_checkpoint(folder, "base_model", follow_links=True)
        places = next(find(own.changed, checkpoint.shapes, checkpoint.config))
        if places.prefix is None and (name := next(filter(places.get, own.changed), None)):
            warnings.warn(
                f"`base_model`: {folder} has {shorten(places.tensor(name))} for the adapter's "
                f"{shorten(name)}. PEFT adapts the model inside, which AutoModel loads, and "
                "nothing in a model with a head, whose modules have longer names.",
                stacklevel=4,
            )


def _collect(fields: Configuration, tree: Tree, parts: list[Part[np.ndarray]]) -> Values:
    """Collects what PEFT stores of an adapter, with what it saves as a whole."""
    # What has A and B too, `fit` refuses.
    saved = [x for x in find_full(fields, tree) if not is_node(tree.found.get(x.path))]
    _refuse_lost(saved, fields, tree)
    frozen = find_frozen(fields, tree)
    _check_values([*(x for x in saved if x.path not in tree.found), *frozen.values()])
    full = tree.whole
    for leaf in saved:
        if leaf.path not in tree.found:
            full |= wholes(split_weight(leaf, leaf.value))
        elif head := tree.tied.get(leaf.modules[0]):
            name = f"{head}.weight"
            full[name] = full[leaf.parameters[0]]._replace(name=name)
    own = split_all(frozen.values())  # a head has the values of its embedding
    values = {name: own.get(name, own[leaf.parameters[0]]) for name, leaf in frozen.items()}
    return Parameters(parts, full, wholes(values))


def _refuse_lost(saved: Sequence[NamedLeaf], fields: Configuration, tree: Tree) -> None:
    """Raises for leaves in full, and heads tied to them, that a given configuration leaves out."""
    saves = make_saves(fields)
    heads = filter(None, (tree.tied.get(leaf.modules[0]) for leaf in tree.full))
    paths = {leaf.path for leaf in saved}
    lost = [module for leaf in tree.full if leaf.path not in paths for module in leaf.modules]
    lost += [head for head in heads if not (saves(head) or may_tie(fields, head))]
    if lost:
        raise InputError(
            "config",
            "has a modules_to_save and a bias that leave out what the adapter has in full: "
            f"{shorten(lost)}.",
            remedy="Leave target_modules out of it, so that jlora chooses.",
        )


def _check_values(leaves: Iterable[NamedLeaf]) -> None:
    wrong = {x.path: why for x in leaves if (why := explain_unstored(x.value))}
    why = "must hold values where PEFT stores frozen ones with the adapter."
    remedy = "Give such arrays, adapt other leaves, or export the merged model."
    stop(problems_at(wrong), "base", why, remedy)
