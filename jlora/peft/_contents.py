"""Reads and writes adapters without their model."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any, TypeGuard

import jax
import numpy as np

from .._adapters import Node, Replaced, is_node, state, weight_shape
from .._errors import Problem, stop
from .._types import short
from ._file import COUNT, COUNTS, DTYPES
from ._problems import About
from .adapter._arranged import Tree, make_tree
from .adapter._describe import describe
from .adapter._draft import make_draft
from .adapter._files import Files
from .adapter._methods import Factored
from .adapter._one_rank import with_profile
from .adapter._open import open_adapter
from .adapter._parameters import Model, assign_parameters, find_twins
from .adapter._parts import Parameters, Values, fill, list_changes, make_node, wholes
from .adapter._sorted import sort_tensors
from .adapter._writable import explain_unstored
from .names._kinds import EMBEDDING, EXPERTS, KINDS, ROWS
from .names._leaves import NamedLeaf, own_leaf
from .names._names import Name

ContentsLeaf = Factored | Replaced | np.ndarray | jax.Array
# The axes of the weights of linear modules, embeddings, experts, and convolutions.
_AXES = {
    Name("", "", axes).layout: axes for axes in (*(kind.axes for kind in KINDS), "oikk", "oikkk")
}


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

    leaves: Mapping[str, ContentsLeaf]
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
    about = About("path", f"the adapter in {path} cannot be read.", path)
    return _as_contents(*_read(open_adapter(path, "path", ignore, prefix), about))


def write(
    out: str | os.PathLike[str],
    contents: Contents,
    profile: str | None = None,
    dialect: str = "peft",
    prefix: str | None = None,
) -> dict[str, Any]:
    r"""Writes an adapter without its model; inverts `read`.

    Values are written bit for bit. If `contents.config` has `target_modules`, its fields choose the
    modules and rows, and what is saved whole. If you add, rename or leave out leaves, leave
    `target_modules` out of it: modules are then chosen by their whole names. Ranks and alphas are
    replaced unless they are those of the leaves.

    Args:
        out: a folder that does not exist yet, or an empty one. It appears complete or not at all.
        contents: from `read`, or made of leaves.
        profile: as in `save`: `"vllm"` pads A and B with zeros to one rank, and multiplies the
            scales into B.
        dialect: as in `save`.
        prefix: as in `save`.

    Returns:
        The fields that were written. In other dialects than PEFT's, a file does not have them all.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        OSError: if `out` cannot be written. Nothing is left of it then.
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
    tree = _as_tree(contents)
    own = Parameters(tree.parts, tree.whole, wholes(contents.frozen))
    about = About("contents", "has a configuration that cannot be written.")
    fields = describe(dict(contents.config), tree, own.parts, about)
    fields, own = with_profile(profile, fields, own)
    draft = make_draft(fields, own, contents.tied, dialect, prefix, contents.leaves)
    about = About(
        "contents",
        "cannot be written so that `read` reads the same adapter. If leaves were added or renamed, "
        "leave target_modules out of its `config`.",
    )
    _, again = _read(draft.as_files("contents", contents.leaves), about)
    about.stop(list_changes(own, again))
    draft.write(out)
    return fields


def _read(files: Files, about: About) -> tuple[dict[str, Any], Values]:
    """Reads the configuration, and the values of all parameters."""
    adapter, about, problems = sort_tensors(files, about)
    own, unassigned = assign_parameters(adapter, Model(None))
    about.stop([*problems, *unassigned])
    values, problems = files.values(own)
    about.stop(problems)
    return adapter.fields, fill(own, values)


def _as_contents(fields: dict[str, Any], own: Values) -> Contents:
    twins = find_twins(own.parts)
    tied = {x.key: twins[x.name].key for x in own.parts if x.kind is EMBEDDING and x.name in twins}
    dropout = float(fields.get("lora_dropout", 0.0))
    parts = (x for x in own.parts if x.kind is EMBEDDING or x.name not in twins)
    nodes: dict[str, Any] = {x.key: make_node(x.leaf, [x], dropout) for x in parts}
    nodes |= {x.module: make_node(x.leaf, [x], dropout) for x in own.tokens.values()}
    full = {x.name: x.x for x in own.full.values() if not x.rows}
    frozen = {x.name: x.x for x in own.frozen.values()}
    return Contents(nodes | full, fields, tied, frozen)


def _as_tree(contents: Contents) -> Tree:
    """Names the leaves, as those of a model whose other leaves are not known."""
    leaves, wrong = list[NamedLeaf](), list[Problem]()
    for name, x in contents.leaves.items():
        arrays = state(x).values() if is_node(x) else [x] if _is_array(x) else []
        dtypes = COUNTS if name.endswith(COUNT) else DTYPES
        if odd := next(filter(None, (explain_unstored(y, dtypes) for y in arrays)), None):
            wrong.append(Problem(name, odd))
        elif leaf := _name_leaf(name, x):
            leaves.append(leaf)
        else:
            why = f"expected a node with the axes of PyTorch's weight, or an array; got {short(x)}"
            wrong.append(Problem(name, why))
    stop(wrong, "contents", "has leaves that cannot be written.")
    found = {(name,): x for name, x in contents.leaves.items()}
    return make_tree(leaves, found, contents.tied, is_whole=False)


def _name_leaf(name: str, x: object) -> NamedLeaf | None:
    """Returns the leaf that has PyTorch's axes; None if it has others."""
    if _is_array(x):
        return own_leaf(name, "o"[: x.ndim] + "k" * (x.ndim - 1), x.shape) if "." in name else None
    axes = _AXES.get(x.layout) if isinstance(x, Factored | Replaced) else None
    if not isinstance(x, Node) or axes is None or (isinstance(x, Replaced) and axes != ROWS.axes):
        return None
    is_parameter = axes == EXPERTS.axes or name.endswith(".weight")
    leaf = own_leaf(name if is_parameter else f"{name}.weight", axes, weight_shape(x))
    return leaf._replace(path=(name,), by_parameter=is_parameter)


def _is_array(x: object) -> TypeGuard[np.ndarray | jax.Array]:
    return isinstance(x, np.ndarray | jax.Array)
