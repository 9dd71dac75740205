"""Restores an adapter from an Orbax checkpoint, and checks that it fits."""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from .._adapters import AdapterLeaf, arrays, is_node, state, static
from .._arrays import AnyArray
from .._errors import InputError, Problem, shorten, show, stop
from .._folders import Where
from .._tree import adapter_leaves, adapter_of, is_abstract, leaves_by_path, name_of, nest
from .._types import Path, PyTree
from ._fingerprint import Leaf, differences, fingerprint, is_fingerprint, leaf_of, shapes_of
from ._meta import FORMAT, FULL, Saved, decode, digest, flatten_leaves
from ._save import ADAPTER, METADATA
from ._store import by_all, check_files, damage, find, in_step, place

NEWER = "Update jlora."
OLDER = (
    "Its arrays are an Orbax tree, and fit the adapter that lora.init makes with its rules. The "
    'guide "From 0.2 to 0.3" has the lines, under "Checkpoints".'
)


def read(path: Where) -> Saved:
    """Reads the metadata of a checkpoint, but no arrays.

    Args:
        path: a folder that `save` wrote, or a step of a `CheckpointManager` that saved `items`.

    Returns:
        Rules, step, versions, the base's fingerprint, and the adapter as shapes.

    Raises:
        FileNotFoundError: if `path` does not exist.
        ValueError: if `path` is not such a checkpoint, is damaged, or another version of jlora
            wrote it in another format.

    Examples:
        >>> import tempfile, jax.numpy as jnp, jlora
        >>> from jlora import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapter = {"head": jnp.ones((2, 3))}
        ...     checkpoint.save(f"{folder}/adapter", adapter, (jlora.Full("head"),), step=7)
        ...     saved = checkpoint.read(f"{folder}/adapter")
        >>> saved.rules, saved.step, saved.adapter["head"].shape
        ((Full(pattern='head'),), 7, (2, 3))
    """
    folder = find(path)
    file = folder / METADATA / "metadata"
    if not folder.is_dir() or not file.exists():
        raise InputError("path", f"{folder} {_explain(folder)}", path=folder)
    check_files(folder)
    damaged = f"the metadata of {folder} are damaged"
    with damage(folder, damaged):
        fields = json.loads(file.read_text())
        number = fields["format"]
        version = show(str(fields["versions"]["jlora"]))
    if number != FORMAT:
        raise InputError(
            "path",
            f"jlora {version} wrote {folder} in format {shorten(number)}; this version of "
            f"jlora reads format {FORMAT}. {OLDER if number in range(FORMAT) else NEWER}",
            path=folder,
        )
    with damage(folder, damaged):
        if fields.get("sha256") != digest(fields):
            raise ValueError("their hash is wrong")
        saved = decode(fields)
        adapter_leaves(saved.adapter)  # raises unless it is an adapter
        shapes_of(saved.base or {})  # raises unless all dtypes are known
    return saved


def _explain(folder: epath.Path) -> str:
    """Explains why a folder is not a checkpoint of an adapter."""
    names = sorted(x.name for x in folder.iterdir()) if folder.is_dir() else []
    if steps := sorted(filter(str.isdigit, names), key=int):
        return (
            f"has the steps {', '.join(steps)} of a CheckpointManager; give one of them, such as "
            f"{folder.name}/{steps[-1]}."
        )
    empty = "is an empty folder" if folder.is_dir() else "is a file"
    held = f"has {', '.join(map(show, names))}" if names else empty
    return (
        f"is not a checkpoint of an adapter: expected {ADAPTER!r} and {METADATA!r} in it, but it "
        f"{held}. Give a folder that jlora.checkpoint.save wrote."
    )


def restore(path: Where, *, like: PyTree | None = None, base: PyTree | None = None) -> PyTree:
    """Reads an adapter that `save` wrote, on any mesh and number of processes.

    Each array is checked against the hash that was saved with it. With several processes, all of
    them must call this function.

    Args:
        path: as in `read`.
        like: an adapter of arrays or `jax.ShapeDtypeStruct`s, whose paths, shapes, dtypes, layouts
            and scales must be those of the checkpoint; or a module that holds one, from
            `jlora.nnx.adapt` or `jlora.keras.adapt`. The result has the adapter's structure,
            shardings, `dropout` and `materialize`. Without `like`, or where it has no sharding, the
            result has NumPy arrays on the host.
        base: the base that the adapter will be used with: arrays, `jax.ShapeDtypeStruct`s, or a
            fingerprint from another checkpoint, `read(path).base`. It is compared with the saved
            fingerprint. Values are compared if they were hashed and `base` has arrays. Dtypes of 64
            and of 32 bits count as equal, as jax_enable_x64 may differ between sessions; the values
            of such a leaf are not compared. Schemes are compared where the checkpoint says them.

    Returns:
        The adapter, with the saved values and dtypes.

    Raises:
        FileNotFoundError: if `path` does not exist.
        RuntimeError: with several processes, if another one raised; it says which, and why.
        TypeError: if `like` is not an adapter.
        ValueError: if `save` did not write the checkpoint, or it is damaged; if `like` or `base`
            differs from it (all differences are listed); if `base` is given, but no fingerprint was
            saved.

    Examples:
        See `save`.
    """
    saved = by_all(lambda: read(path))
    like = adapter_of(like)
    if base is not None:
        by_all(lambda: _check_base(path, saved, base))
    wanted = by_all(lambda: _check_like(path, saved, like))
    flat = _read_arrays(path, flatten_leaves(wanted))
    _check_arrays(path, saved, flat)
    leaves = {p: _fill(x, p, flat) for p, x in wanted.items()}
    if like is None:
        return nest(leaves)
    structure = jax.tree.structure(like, is_leaf=is_node)
    return jax.tree.unflatten(structure, list(leaves.values()))


def _fill(x: AdapterLeaf, path: Path, flat: dict[Path, Any]) -> AdapterLeaf:
    """Puts the arrays that were read into the leaf `x`."""
    if not is_node(x):
        return flat[*path, FULL]
    return x._replace(**{n: flat[*path, n] if n in state(x) else None for n in arrays(x)})


def _read_arrays(path: Where, wanted: dict[Path, Any]) -> dict[Path, Any]:
    folder = place(path)
    with (
        damage(folder, f"the arrays of {folder} cannot be read, as it is truncated or damaged"),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        template = nest({p: _template(x) for p, x in wanted.items()})
        args = ocp.args.Composite(**{ADAPTER: ocp.args.StandardRestore(template)})
        tree = in_step(lambda: checkpointer.restore(folder, args=args)[ADAPTER])
    return dict(leaves_by_path(tree))


def _template(x: AnyArray) -> Any:
    """Returns Orbax's template for an array: sharded like `x`, or NumPy's without a sharding."""
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


# ---------------------------------------------------------------------------------------- checking


def _check_arrays(path: Where, saved: Saved, flat: dict[Path, Any]) -> None:
    """Raises unless the arrays have the shapes, dtypes and hashes of the metadata."""
    expected = flatten_leaves(adapter_leaves(saved.adapter))
    forms = {
        p: leaf_of(x, values=False)._replace(hash=saved.hashes[p]) for p, x in expected.items()
    }
    if wrong := [name_of(_place_of(p)) for p, x in flat.items() if leaf_of(x, True) != forms[p]]:
        raise InputError(
            "path",
            f"{place(path)} is damaged: the values of {', '.join(wrong)} are not those "
            "that were saved. Take another checkpoint.",
            path=place(path),
        )


def _check_base(path: Where, saved: Saved, base: PyTree) -> None:
    if saved.base is None:
        raise InputError(
            "base",
            f"cannot be checked: {place(path)} was saved without one. "
            "Restore without `base`, or save with it.",
        )
    hashed = any(leaf.hash for leaf in saved.base.values())
    values = hashed and not any(map(is_abstract, jax.tree.leaves(base)))
    got = base if is_fingerprint(base) else fingerprint(base, values)
    wrong = differences(saved.base, got, any_width=True)
    why = f"is not the one that the adapter in {place(path)} was trained on."
    remedy = "Give the base that it was saved with, or an adapter of this base."
    stop(wrong, "base", why, f"{remedy} To use it with this base all the same, leave out `base`.")


def _check_like(path: Where, checkpoint: Saved, like: PyTree | None) -> dict[Path, Any]:
    """Returns the leaves to restore by path: those of `like`, or else those of the file."""
    saved = adapter_leaves(checkpoint.adapter)
    if like is None:
        return saved
    like = adapter_leaves(like)
    wrong = differences(_forms(saved), _forms(like))
    for p in saved.keys() & like.keys():
        if is_node(saved[p]) and is_node(like[p]):
            for name in static(saved[p]).keys() - {"dropout", "materialize"}:
                a, b = getattr(saved[p], name), getattr(like[p], name, None)
                if a != b:
                    wrong.append(Problem(name_of(p), f"expected {name} {a}, got {b}"))
    why = f"does not have the form of the adapter in {place(path)}."
    remedy = "Make it with the rules of the checkpoint, jlora.checkpoint.read(path).rules."
    stop(sorted(wrong), "like", why, remedy)
    return like


def _forms(found: dict[Path, Any]) -> dict[Path, Leaf]:
    return {_place_of(p): leaf_of(x, values=False) for p, x in flatten_leaves(found).items()}


def _place_of(path: Path) -> Path:
    """Returns the path of an array for the user; a leaf in full has the path of its weight."""
    return path[:-1] if path[-1] == FULL else path
