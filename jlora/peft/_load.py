"""Loads PEFT's files as an adapter tree. All headers are checked before any value is read."""

import functools
import os
from collections.abc import Callable, Collection, Sequence

from .._adapters import is_node
from .._tree import leaves_by_path, nest
from .._types import PyTree
from ._problems import About, warn
from .adapter._files import Files
from .adapter._fit_tree import match_to_tree
from .adapter._methods import method_of
from .adapter._open import open_adapter
from .adapter._parameters import Model, assign_parameters, list_missing, list_unmatched
from .adapter._parts import Values, fill, make_node
from .adapter._sorted import Adapter, sort_tensors
from .names._advice import advise
from .names._leaves import NamedLeaf, find_leaves, sort_by_row
from .names._names import Name

WHERE = "`base` under `names`"


def load(
    path: str | os.PathLike[str],
    base: PyTree,
    names: Sequence[Name],
    *,
    ignore: Collection[str] = (),
    prefix: str | None = None,
) -> PyTree:
    r"""Reads an adapter that PEFT, diffusers, kohya's scripts or `save` wrote.

    Args:
        path: the adapter's folder. Only its `adapter_config.json` and `adapter_model.safetensors`
            are read, or the one file of image LoRA, `pytorch_lora_weights.safetensors`. Such a file
            may also be given itself. Its keys show which tool wrote it.
        base: the frozen tree that the adapter is for: arrays or `jax.ShapeDtypeStruct`s.
        names: a table of `Name` rows, such as `jlora.peft.TABLES["llama"]`; for a model of PyTorch,
            `jlora.torch.names(sites, apply)`.
        ignore: names of fields of `adapter_config.json` to read the adapter without: fields that
            jlora does not know, and that you know not to change what the adapter computes. Names
            that the file does not have are fine.
        prefix: for a file of image LoRA with adapters of several models, the one to read, such as
            `"unet"` or `"transformer"`. With kohya's keys `lora_te1_…` it is `"te1"`,
            with `lycoris_…` `"lycoris"`.

    Returns:
        An adapter for `apply` and `merge`, with $\Delta W = s \cdot A B$. A and B have the dtype of
        the file, or float32 if that has 8 bits. The layers of a scan are stacked. `modules_to_save`
        and biases are leaves in full. With `use_dora`, modules have the node of `DoRA`. With
        `trainable_token_indices`, embeddings have the node of `Rows`.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        TypeError: if `names` is not a table, or `ignore` is a string.
        ValueError: if a tensor or field is missing, unexpected, misshapen, of a wrong dtype, not
            finite, duplicate or not supported; if jlora knows a field in `ignore`; if a file of
            image LoRA has several prefixes and `prefix` is None, or has another method, such as
            LoHa. The error lists all problems, and nothing is loaded.

    Warns:
        UserWarning: if a name in the configuration matches nothing, which PEFT accepts; or if
            `lora_dropout` is ignored, as jlora's DoRA has none.

    Source: PEFT 0.21, `peft.utils.save_and_load`.

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
        ...     again = peft.load(f"{folder}/adapter", base, names)
        >>> jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again, adapter))
        True
    """
    leaves = sort_by_row(find_leaves(base, names), names)
    named = {leaf.path for leaf in leaves}
    every = {path: getattr(x, "shape", ()) for path, x in leaves_by_path(base, is_node)}
    lost = {path: shape for path, shape in every.items() if path not in named and len(shape) > 1}
    about = About(
        "path",
        f"the adapter in {path} cannot be loaded onto `base` with `names`; nothing was loaded.",
        path,
    )
    remedy = functools.cache(lambda: advise(names, lost) if lost else "")
    modules = {module for leaf in leaves for module in leaf.modules}
    files = open_adapter(path, "path", ignore, prefix, modules)
    adapter, adapted, own = fit(files, leaves, about, remedy)
    unused = list_unmatched(adapter, own, Model(_shapes(leaves), WHERE))
    fields = files.fields
    method = method_of(fields)
    dropout = float(fields.get("lora_dropout", 0.0))
    if dropout and "lora_dropout" in method.ignored:
        why = f"is ignored, as {method.name} has no dropout in jlora"
        unused.append(f"lora_dropout: {dropout} {why}")
    warn(files.config, unused)
    changed = {x.name: x for x in (*own.parts, *own.full.values())}
    each = ((leaf, [changed[name] for name in leaf.parameters]) for leaf in adapted)
    return nest({leaf.path: make_node(leaf, parts, dropout) for leaf, parts in each})


def fit(
    files: Files,
    leaves: Sequence[NamedLeaf],
    about: About,
    advise: Callable[[], str] = lambda: "",
) -> tuple[Adapter, list[NamedLeaf], Values]:
    """Matches an adapter to the `leaves` of a tree and reads it; raises all problems together.

    Returns:
        The adapter, the adapted leaves, and the values of their parameters.
    """
    shapes = _shapes(leaves)
    adapter, about, problems = sort_tensors(files, about)
    problems += list_missing(adapter, shapes)
    found, unassigned = assign_parameters(adapter, Model(shapes, WHERE, True, advise))
    match, misfits = match_to_tree(found, adapter.heads, leaves, advise)
    about.stop([*problems, *unassigned, *misfits])
    values, problems = files.values(match.own)
    about.stop([*problems, *(match.check(values) if values else ())])
    return adapter, match.leaves, fill(match.own, values)


def _shapes(leaves: Sequence[NamedLeaf]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters."""
    return {name: leaf.weight_shape for leaf in leaves for name in leaf.parameters}
