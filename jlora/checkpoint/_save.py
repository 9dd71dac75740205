"""Writes an adapter, or a merged tree, as an Orbax checkpoint."""

import collections
import operator
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp

from .._adapters import is_node
from .._errors import InputError
from .._folders import Where
from .._quantized import is_quantized
from .._site import Full, Rule, check_rules
from .._tree import (
    adapter_leaves,
    adapter_of,
    check_fits,
    is_abstract,
    leaves_by_path,
    name_of,
    nest,
)
from .._types import Holder, Path, PyTree
from ._fingerprint import fingerprint, is_fingerprint, shapes_of
from ._meta import encode, flatten_leaves, node_types
from ._store import by_all, write

ADAPTER, METADATA = "adapter", "jlora"


def save(
    out: Where,
    adapter: PyTree,
    rules: Sequence[Rule],
    *,
    step: int | None = None,
    base: PyTree | None = None,
    hash_values: bool = False,
) -> None:
    """Writes an adapter, without the base, as an Orbax checkpoint.

    The metadata suffice to rebuild the adapter without the training script: rules, layouts, scales,
    shapes, versions and, with `base`, the base's fingerprint. Dtypes are kept. With several
    processes, all of them must call this function, and each writes its own shards. If one fails,
    all raise.

    Args:
        out: a folder that does not exist yet, or an empty one. Orbax makes it appear complete or
            not at all, also in an object store (`gs://…`).
        adapter: from `init`, training or `restore`. Dropout keys in it are ignored. A module from
            `jlora.nnx.adapt` or `jlora.keras.adapt` is saved as its adapter.
        rules: the rules that made the adapter; `()` if there were none.
        step: the training step.
        base: the frozen tree, of arrays or `jax.ShapeDtypeStruct`s, so that `restore` can recognize
            it; or a fingerprint from another checkpoint, `read(path).base`.
        hash_values: whether the fingerprint includes the base's values.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        OSError: if a process cannot write it. No checkpoint is there then.
        RuntimeError: with several processes, if another one raised; it says which, and why.
        TypeError: if `adapter` is no adapter of arrays, such as parameters, a bound tree, the state
            of an optimizer or a table from `jlora.many.prepare`; or if another argument has a wrong
            type.
        ValueError: if `adapter` does not fit `base`, or has keys that Orbax confuses: it treats a
            dot in a key as a level of the tree; or if it is a module with batch statistics, or
            other state that is not in its adapter.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import checkpoint
        >>> rules = (jlora.LoRA("up", rank=2),)
        >>> lora = jlora.transform(lambda p, x: x @ p["up"], *rules)
        >>> params = {"up": jnp.ones((4, 8))}
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(f"{folder}/adapter", adapter, rules, base=base)
        ...     restored = checkpoint.restore(f"{folder}/adapter", base=base)
        >>> restored["up"].scale, bool((restored["up"].a == adapter["up"].a).all())
        (16.0, True)
    """
    saved = items(adapter, rules, step=step, base=base, hash_values=hash_values)
    # Orbax would make folders in the background, wait for them, and lose their errors.
    options = ocp.CompositeOptions(
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False)
    )
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    write(out, handler, ocp.args.Composite(**saved))


def items(
    adapter: PyTree,
    rules: Sequence[Rule],
    *,
    step: int | None = None,
    base: PyTree | None = None,
    hash_values: bool = False,
) -> dict[str, ocp.args.CheckpointArgs]:
    """Returns the items that `save` writes, for a `CheckpointManager` with other items.

    `read` and `restore` then read the folder of a step, which may contain other items.

    Args:
        adapter: as in `save`.
        rules: as in `save`.
        step: as in `save`.
        base: as in `save`.
        hash_values: as in `save`.

    Returns:
        Orbax's arguments for the items `"adapter"` and `"jlora"`.

    Raises:
        RuntimeError: as in `save`.
        TypeError: as in `save`.
        ValueError: as in `save`.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> import orbax.checkpoint as ocp
        >>> from jlora import checkpoint
        >>> saved = checkpoint.items({"head": jnp.ones(3)}, (jlora.Full("head"),), step=7)
        >>> args = ocp.args.Composite(**saved, data=ocp.args.JsonSave({"epoch": 1}))
        >>> sorted(args)
        ['adapter', 'data', 'jlora']
    """
    tree = shapes_of(base) if is_fingerprint(base) else base
    found, given = by_all(lambda: _check(adapter, rules, tree, hash_values))
    if base is not None and (hash_values or not is_fingerprint(base)):
        base = fingerprint(tree, hash_values)
    meta = encode(found, given, None if step is None else operator.index(step), base)
    return {
        ADAPTER: ocp.args.StandardSave(nest(flatten_leaves(found))),
        METADATA: ocp.args.JsonSave(meta),
    }


def export(out: Where, merged: PyTree) -> None:
    """Writes merged weights as a plain Orbax checkpoint. Each process writes its own shards.

    `ocp.StandardCheckpointer().restore(path, like)` reads it.

    Args:
        out: as in `save`.
        merged: a tree of arrays, as from `jlora.merge`. Shapes and dtypes are kept.

    Raises:
        FileExistsError: if `out` exists and is not an empty folder.
        OSError: as in `save`.
        RuntimeError: as in `save`.
        TypeError: if `merged` has no leaf, or a leaf that is not a plain array.
        ValueError: if it has keys that Orbax confuses, as in `save`.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> import orbax.checkpoint as ocp
        >>> from jlora import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.export(f"{folder}/merged", {"w": jnp.ones((2, 2))})
        ...     ocp.StandardCheckpointer().restore(f"{folder}/merged")["w"].shape
        (2, 2)
    """
    by_all(lambda: _check_merged(merged))
    write(out, ocp.StandardCheckpointHandler(), ocp.args.StandardSave(merged))


def _check(
    adapter: PyTree, rules: Sequence[Rule], base: PyTree | None, hash_values: bool
) -> tuple[dict[Path, Any], tuple[Rule, ...]]:
    """Returns the leaves of the adapter by path, and the rules; raises for what cannot be saved."""
    _check_state(adapter)
    found = adapter_leaves(adapter_of(adapter))
    _check_arrays(flatten_leaves(found), "adapter")
    given = check_rules(rules)
    _check_full(found, given)
    _check_nodes(found)
    if base is not None:
        check_fits(base, found)
    elif hash_values:
        raise TypeError("`hash_values` needs the base, whose values it hashes. Give `base` too.")
    return found, given


def _check_state(adapter: PyTree) -> None:
    """Raises for a module whose base has state: read into a fresh base, it is another model."""
    if names := adapter.find_state() if isinstance(adapter, Holder) else []:
        raise InputError(
            "adapter",
            f"is a module with state that is not in its adapter, but that calls may change: "
            f"{', '.join(names)}.",
            remedy="Give adapted.adapter, and save the state beside it. The guide "
            '"Load a checkpoint, and export" has the lines, under "Statistics".',
        )


def _check_full(found: dict[Path, Any], rules: tuple[Rule, ...]) -> None:
    """Raises if leaves are trained in full, but by no rule: parameters look like such an adapter.

    An adapter that comes from a file has no rules, but some node.
    """
    full = [name_of(path) for path, x in found.items() if not is_node(x)]
    if not full or any(isinstance(rule, Full) for rule in rules):
        return
    if rules or len(full) == len(found):
        raise TypeError(
            f"`adapter` has arrays at {', '.join(full)}, as parameters have, but `rules` has no "
            "jlora.Full, which alone trains leaves as they are. Give the adapter that `init` "
            "returned, or all rules that made it."
        )


def _check_nodes(found: dict[Path, Any]) -> None:
    """Raises for nodes whose class `restore` would not know."""
    nodes = {name_of(path): type(x) for path, x in found.items() if is_node(x)}
    known = node_types().values()
    if wrong := [f"{name}: {x.__name__}" for name, x in nodes.items() if x not in known]:
        raise TypeError(
            f"`adapter` has nodes that no registered rule makes, so that no checkpoint of them can "
            f"be read: {', '.join(wrong)}. Register their rule. Of a table, save what you gave to "
            "jlora.many.prepare."
        )


def _check_merged(merged: PyTree) -> None:
    flat = dict(leaves_by_path(merged))
    if not flat:
        raise TypeError(f"`merged` must be a tree of arrays; got {merged!r}, which has none.")
    if found := [name_of(path) for path, x in flat.items() if is_quantized(x)]:
        raise TypeError(
            f"`merged` must have plain arrays; got quantized leaves at {', '.join(found)}. Give "
            "jlora.dequantize(merged), or merge without requantize=True."
        )
    _check_arrays(flat, "merged")


def _check_arrays(flat: dict[Path, Any], argument: str) -> None:
    """Raises for leaves that are not arrays, and for paths that Orbax would confuse."""
    wrong = [
        f"{name_of(path)}: {type(x).__name__}"
        for path, x in flat.items()
        if is_abstract(x) or is_quantized(x) or not hasattr(x, "dtype")
    ]
    if wrong:
        raise TypeError(f"`{argument}` must have arrays to be saved; got {', '.join(wrong)}.")
    names = collections.Counter(".".join(path) for path in flat)
    if twice := [name for name, n in names.items() if n > 1]:
        raise InputError(
            argument,
            f"has paths that Orbax confuses, as it treats a dot in a key as a level "
            f"of the tree: {', '.join(twice)}. Rename one of each.",
        )
