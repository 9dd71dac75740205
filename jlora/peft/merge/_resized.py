"""Gives the tables of a checkpoint the rows of an adapter whose vocabulary was resized."""

from collections.abc import Mapping
from typing import Any

from .._problems import Problems
from .._vocabulary import copy_config, is_table, walk_objects
from ..adapter._parts import Parameters, T
from ..adapter._sorted import explain_resized
from ._target import Target


def fit_vocabulary(target: Target, found: Parameters[T], problems: Problems) -> Target:
    """Resizes embedding and head, and what else has a number for each token, as the adapter did.

    Adds a problem if the adapter does not hold all of these.
    """
    checkpoint, model = target
    whole = {n: x for n, x in {**found.frozen, **found.full}.items() if n in model}
    tables = {n for n, x in whole.items() if explain_resized(n, x.shape, model[n].shape)}
    sizes = {(model[name].shape[0], whole[name].shape[0]) for name in tables}
    if len(sizes) != 1:
        return target
    [(old, new)] = sizes
    shapes = {
        name: x.shape
        for name, x in whole.items()
        if (old, new) == (*model[name].shape[:1], *x.shape[:1])
        and model[name].shape[1:] == x.shape[1:]
        and model[name].is_tensor
    }
    columns = {shape[1] for shape in shapes.values() if len(shape) == 2}
    resized = {model.tensor(name) for name in shapes}
    for tensor, shape in checkpoint.shapes.items():
        is_matrix = shape[:1] == (old,) and is_table(tensor.rpartition(".")[0])
        is_vector = shape in ((old,), (1, old)) and old not in columns
        if tensor not in resized and (is_matrix or is_vector):
            problems.add(
                tensor,
                f"is for {old} tokens, and the adapter, whose vocabulary was resized to {new}, has "
                "no values of it",
                f"Call resize_token_embeddings({new}) on the base in `transformers`, and save it.",
            )
    return target.resize(shapes, _resize(checkpoint.config, old, new))


def _resize(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Sets the size of the vocabulary in a configuration, if there is one."""
    found = copy_config(config)
    parts = [part for part in walk_objects(found) if part.get("vocab_size") == old]
    # A size that is the default of a class may be left out.
    texts = [x for part in walk_objects(found) if isinstance(x := part.get("text_config"), dict)]
    for part in parts or texts[:1] or [found] * bool(found):
        part["vocab_size"] = new
    return found
